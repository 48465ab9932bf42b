"""Two records side by side: which rows became faster, which slower, which are the same.

Noise of a machine only ever adds time, so a row's true cost lies near its fastest round, and a quarter of its rounds lie
below its lower quartile. A row is SLOW when even its fastest round takes more than 10 % longer than the other record's lower
quartile, FAST the other way round, and SAME otherwise. Two runs of one kernel on a busy machine overlap: that all of 20 rounds
miss the lower quarter by chance happens once in 300 times. A kernel that lost a third does not overlap, unless a run was so
noisy that its lower quartile lies a fifth above its fastest round. The column `sees` says how large a slowdown would have
shown, so that SAME from a noisy run is not mistaken for evidence.

What the whole machine did between the runs (a neighbour, a clock) shows in the rows that are the same code in both, the
baselines. Where torch and the device are the same too, and the baselines moved together by more than 5 %, times of the second
record are divided by the baselines' median ratio first, and the output says so.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any, NamedTuple

from gemma4_kernels.bench.tables import table

# Two processes that run the same code are up to 8 % apart, with nothing but the placement of their memory between them.
MARGIN = 1.1
# Many baselines together say more than one row.
CONTROL_MARGIN = 1.05
MIN_CONTROLS = 3
SLOWDOWN_TO_SEE = 4 / 3


class Line(NamedTuple):
    case: str
    by: str
    verdict: str
    before_us: float
    after_us: float
    """Lower quartiles; of the second record as it stands."""
    ratio: float
    """Of the quartiles, after the machine's own change has been taken out."""
    sees: float
    """The smallest slowdown that would have been called SLOW."""


class Comparison(NamedTuple):
    lines: list[Line]
    machine_ratio: float
    """By how much the baselines moved; 1.0 where that was not used."""
    only_before: int
    only_after: int
    remarks: list[str]

    @property
    def counts(self) -> Counter[str]:
        return Counter(line.verdict for line in self.lines)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Row by row what two records have in common: kernels only, baselines serve as control."""
    rows_before, rows_after = _timed(before), _timed(after)
    common = [key for key in rows_before if key in rows_after]
    remarks = _differences(before, after)
    factor = _machine_ratio(before, after, [(rows_before[key], rows_after[key]) for key in common], remarks)
    lines = []
    for key in common:
        a, b = rows_before[key], rows_after[key]
        if a["kind"] == "kernel":
            lines.append(_line(a, b, factor))
    kernels = [{key for key, row in rows.items() if row["kind"] == "kernel"} for rows in (rows_before, rows_after)]
    return Comparison(lines, factor, len(kernels[0] - kernels[1]), len(kernels[1] - kernels[0]), remarks)


def render(comparison: Comparison) -> str:
    head = ("case", "by", "before us", "after us", "ratio", "sees", "verdict")
    cells = [
        (
            line.case, line.by, f"{line.before_us:.1f}", f"{line.after_us:.1f}", f"{line.ratio:.2f}",
            f"{line.sees:.2f}", line.verdict,
        )
        for line in comparison.lines
    ]  # fmt: skip
    lines = [*table(head, cells, numbers=range(2, 6)), ""]
    lines += comparison.remarks
    for count, which in ((comparison.only_before, "first"), (comparison.only_after, "second")):
        if count:
            lines.append(f"{count} rows are in the {which} record only.")
    blind = sum(line.verdict == "SAME" and line.sees > SLOWDOWN_TO_SEE for line in comparison.lines)
    if blind:
        lines.append(f"{blind} rows that are SAME were too noisy to show a slowdown by a third: time them again.")
    counts = comparison.counts
    lines.append(f"{counts['SAME']} SAME, {counts['FAST']} FAST, {counts['SLOW']} SLOW.")
    return "\n".join(lines)


def _timed(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["case"], row["by"]): row for row in record["rows"] if row["quartile_us"] and row["fastest_us"]}


def _line(a: dict[str, Any], b: dict[str, Any], factor: float) -> Line:
    fastest, quartile = b["fastest_us"] / factor, b["quartile_us"] / factor
    if fastest > MARGIN * a["quartile_us"]:
        verdict = "SLOW"
    elif MARGIN * quartile < a["fastest_us"]:
        verdict = "FAST"
    else:
        verdict = "SAME"
    # A kernel that became s times slower would have had, at best, s times the fastest round of either.
    sees = MARGIN * a["quartile_us"] / min(fastest, a["fastest_us"])
    return Line(
        a["case"],
        a["by"],
        verdict,
        a["quartile_us"],
        b["quartile_us"],
        b["quartile_us"] / factor / a["quartile_us"],
        sees,
    )


def _machine_ratio(
    before: dict[str, Any],
    after: dict[str, Any],
    pairs: list[tuple[dict[str, Any], dict[str, Any]]],
    remarks: list[str],
) -> float:
    if _same_code(before) != _same_code(after):
        return 1.0
    ratios = [b["quartile_us"] / a["quartile_us"] for a, b in pairs if a["kind"] == "baseline"]
    if len(ratios) < MIN_CONTROLS:
        return 1.0
    ratio = float(statistics.median(ratios))
    if 1 / CONTROL_MARGIN <= ratio <= CONTROL_MARGIN:
        return 1.0
    remarks.append(
        f"The machine itself was {_times(ratio)} in the second run: the median of {len(ratios)} baselines, which are the "
        "same code in both. Ratios and verdicts are free of it."
    )
    return ratio


def _same_code(record: dict[str, Any]) -> tuple[Any, ...]:
    machine = record["machine"]
    return tuple(machine[name] for name in ("name", "torch", "transformers", "threads"))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = ("name", "torch", "triton", "driver", "threads", "power_limit_w")
    pairs = [(name, before["machine"][name], after["machine"][name]) for name in names]
    return [f"The records differ in {name}: {a}, {b}." for name, a, b in pairs if a != b]


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times slower" if ratio > 1 else f"{1 / ratio:.2f} times faster"
