"""Tables from the records: `docs/gpus.md`, and what stands between the markers of README.md.

    python -m gemma4_kernels.bench.report            write both
    python -m gemma4_kernels.bench.report --check    write nothing; exit 1 if either is out of date

It works on a checkout: the folder in --root, by default the current one. Every figure of a card in the documentation comes
through here, out of a record that `records.objections` has nothing against.

Exit status: 0; 1 out of date (--check); 2 a record that cannot be read or quoted, or README.md without markers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma4_kernels.bench import records
from gemma4_kernels.bench.tables import escape, markdown, table

BEGIN, END = "<!-- benchmarks: begin, written by bench/report.py -->", "<!-- benchmarks: end -->"
PYTORCH = ("sdpa", "dense")  # the baseline of each family that a summary compares with; a case has one of them
NO_RECORD = (
    "No card has been measured yet. `make gpu-check` on a machine with a GPU writes a record; "
    "`bench/records/README.md` says how to submit it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gemma4_kernels.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--check", action="store_true")
    parsed = parser.parse_args(arguments)
    try:
        found = load_all(parsed.root / "bench" / "records")
        readme = (parsed.root / "README.md").read_text(encoding="utf-8")
        wanted = {
            parsed.root / "docs" / "gpus.md": gpus_page(found),
            parsed.root / "README.md": between_markers(readme, summary(found)),
        }
    except (records.RecordError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if parsed.check:
            print(f"report: {path} is out of date: run python -m gemma4_kernels.bench.report", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and parsed.check else 0


def load_all(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder, by the name of its machine. Raises RecordError for one that may not be quoted."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = records.load(path)
        if objections := records.objections(record):
            raise records.RecordError(f"{path.name} cannot be quoted: {objections[0]}")
        found.append(record)
    return sorted(found, key=lambda record: str(record["machine"]["name"]))


def gpus_page(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Cards that were measured",
        "",
        "Written by `python -m gemma4_kernels.bench.report` from `bench/records/`; do not edit. What each column means:",
        "[benchmarking.md](benchmarking.md). How to add a card: [validating-a-gpu.md](validating-a-gpu.md).",
    ]
    if not found:
        lines += ["", NO_RECORD]
    for record in found:
        machine = record["machine"]
        lines += ["", f"## {escape(machine['name'])}", ""]
        facts = [
            ("architecture", machine["architecture"]),
            ("memory", None if machine["memory_gib"] is None else f"{machine['memory_gib']} GiB"),
            ("driver", machine["driver"]),
            ("power limit", None if machine["power_limit_w"] is None else f"{machine['power_limit_w']:.0f} W"),
            ("temperature before, after", _temperatures(record)),
            ("torch, Triton", f"{machine['torch']}, {machine['triton'] or 'none'}"),
            ("gemma4-kernels", f"{record['package']} at {record['commit'][:12]}"),
            ("ceilings measured", _ceilings(record)),
            ("data sheet", record["sheet_source"]),
            ("command", record["command"]),
        ]
        lines += [f"* {name}: {escape(str(value))}" for name, value in facts if value is not None]
        lines += ["", markdown(record["rows"])]
    return "\n".join(lines) + "\n"


def summary(found: Sequence[dict[str, Any]]) -> str:
    """For README.md: each card's kernels of the package, where it stands against PyTorch and against its own ceiling."""
    cells = []
    for record in found:
        baseline = {
            row["case"]: row["median_us"] for row in record["rows"] if row["by"] in PYTORCH and row["median_us"]
        }
        kernels = [row for row in record["rows"] if row["kind"] == "kernel" and row["median_us"]]
        fastest: dict[str, dict[str, Any]] = {}
        for row in kernels:
            if row["case"] not in fastest or row["median_us"] < fastest[row["case"]]["median_us"]:
                fastest[row["case"]] = row
        for case, row in fastest.items():
            ratio = f"{baseline[case] / row['median_us']:.2f}" if case in baseline else "-"
            share = f"{100 * row['share']:.0f} %"
            name = escape(record["machine"]["name"])
            cells.append((name, f"`{case}`", escape(row["by"]), f"{row['median_us']:.1f}", ratio, share))
    if not cells:
        return NO_RECORD
    head = ("card", "case", "fastest kernel", "median us", "PyTorch's time / ours", "of ceiling")
    return "\n".join(table(head, cells, numbers=range(3, 6)))


def between_markers(page: str, text: str) -> str:
    """The page with `text` between the markers. Raises RecordError where they are missing or out of order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise records.RecordError(f"README.md needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _temperatures(record: dict[str, Any]) -> str | None:
    before, after = record["machine"]["temperature_c"], record["temperature_after_c"]
    return None if before is None or after is None else f"{before:.0f}, {after:.0f} °C"


def _ceilings(record: dict[str, Any]) -> str | None:
    copies = [row["copy_gbs"] for row in record["rows"] if row["copy_gbs"]]
    rates = [row["matmul_tflops"] for row in record["rows"] if row["matmul_tflops"] and row["dtype"] == "bf16"]
    if not copies:
        return None
    return f"copy {max(copies):.0f} GB/s" + (f", bf16 product {max(rates):.1f} TFLOP/s" if rates else "")


if __name__ == "__main__":
    raise SystemExit(main())
