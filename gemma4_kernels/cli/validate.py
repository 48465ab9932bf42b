"""`gemma4-kernels validate`: every case of the list on every backend of a device, against the fp64 reference.

Results go to stdout, progress to stderr.

Exit status: 0 every case that was checked held; 1 at least one failed; 2 wrong arguments; 3 nothing was checked, or a
backend named by --require checked nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from gemma4_kernels import environment
from gemma4_kernels._version import __version__
from gemma4_kernels.backends import BACKENDS
from gemma4_kernels.bench import machine
from gemma4_kernels.bench.cases import Case, all_cases, parse, select
from gemma4_kernels.bench.validation import Check, check_all

HELD, FAILED, NOTHING_CHECKED = 0, 1, 3
USAGE = 2


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate", help="hold every kernel against the reference on this device",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_selection(parser)
    parser.add_argument(
        "--require", action="append", choices=BACKENDS, default=[], metavar="NAME",
        help="fail if this backend checks nothing here; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--emulate", action="store_true", help="run CUDA kernels on the CPU, thread by thread (GEMMA4_EMULATE=1)"
    )
    parser.add_argument("--list", action="store_true", help="print the selected cases, one a line, and stop")
    parser.add_argument("--json", action="store_true", help="print every check as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each skipped case, not only their number")
    parser.set_defaults(run=run)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The options that `validate` and `bench` have in common."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few cases of every kind")
    extent.add_argument("--full", action="store_true", help="also the long contexts of `bench`, as far as memory goes")
    parser.add_argument("--only", action="append", metavar="CASE", help="one case by its string; may be repeated")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this backend; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, or the CPU")


def run(arguments: argparse.Namespace) -> int:
    if arguments.emulate:
        environment.emulate()
        arguments.device = arguments.device or "cpu"
    try:
        device = machine.known_device(arguments.device) if arguments.device else machine.default_device()
        cases = selected(arguments)
    except ValueError as error:
        print(f"validate: {error}", file=sys.stderr)
        return USAGE
    if arguments.list:
        print("\n".join(map(str, cases)))
        return HELD
    start = time.perf_counter()
    names = tuple(dict.fromkeys([*(arguments.backend or BACKENDS)]))
    checks: list[Check] = []
    # A case asked for by name runs, however long a CPU takes over it.
    for number, found in enumerate(check_all(cases, names, device, limit_cpu=not arguments.only), start=1):
        checks += found
        _progress(number, len(cases), found)
    seconds = time.perf_counter() - start
    status, sentence = _status(checks, arguments.require)
    if arguments.json:
        print(json.dumps(_as_json(checks, device, status, seconds), indent=1, allow_nan=False))
    else:
        print(render(checks, device, seconds, arguments.verbose))
        print(sentence)
    return status


def selected(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the arguments name. Raises ValueError for a string that is no case."""
    if arguments.only:
        return list({text: parse(text) for text in arguments.only}.values())
    cases = all_cases()
    chosen: list[Case] = select(cases, "quick" if arguments.quick else "full")
    return chosen + (select(cases, "bench") if arguments.full else [])


def render(checks: Sequence[Check], device: torch.device, seconds: float, verbose: bool) -> str:
    lines = [
        f"gemma4-kernels {__version__} validate on {device} ({machine.device_name(device)}), "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    ]
    for check in checks:
        if check.status == "failed":
            lines += ["", f"FAILED  {check.case} on {check.backend}"]
            lines += [f"        {reason}" for reason in check.reasons]
            lines += [f"        replay: {check.replay}"]
    skipped = [check for check in checks if check.status == "skipped"]
    if skipped:
        lines += ["", "skipped"]
        reasons = Counter((check.backend, check.reasons[0]) for check in skipped)
        for (backend, reason), count in reasons.items():
            lines.append(f"  {count:>4} on {backend:<7} {reason}")
            if verbose:
                lines += [f"       {c.case}" for c in skipped if (c.backend, c.reasons[0]) == (backend, reason)]
    lines += ["", "backend  held  failed  skipped  worst error / budget"]
    for backend in dict.fromkeys(check.backend for check in checks):
        own = [check for check in checks if check.backend == backend]
        counts = Counter(check.status for check in own)
        worst = max((c for c in own if c.status != "skipped"), key=lambda c: c.worst, default=None)
        at = "-" if worst is None else f"{worst.worst:.2f}  {worst.case}"
        lines.append(f"{backend:<7}  {counts['held']:>4}  {counts['failed']:>6}  {counts['skipped']:>7}  {at}")
    total = Counter(check.status for check in checks)
    lines += [
        "",
        f"{total['held']} checks held, {total['failed']} failed, {total['skipped']} were skipped, in {seconds:.0f} s.",
    ]
    return "\n".join(lines)


def _status(checks: Sequence[Check], required: Sequence[str]) -> tuple[int, str]:
    """Exit status and the sentence that says it."""
    checked = {check.backend for check in checks if check.status != "skipped"}
    if any(check.status == "failed" for check in checks):
        return FAILED, "FAILED: a kernel breaks the rule; the lines above say where."
    if absent := [name for name in required if name not in checked]:
        return NOTHING_CHECKED, f"FAILED: {', '.join(absent)} was required and checked nothing here."
    if not checked:
        return NOTHING_CHECKED, "FAILED: nothing was checked."
    return HELD, "Everything that was checked holds."


def _progress(number: int, total: int, found: Sequence[Check]) -> None:
    """On a terminal one line that is overwritten; in a log every tenth case and every failure."""
    failed = any(check.status == "failed" for check in found)
    if sys.stderr.isatty():
        end = "\n" if failed or number == total else ""
        print(f"\r\033[K[{number}/{total}] {'FAILED ' if failed else ''}{found[0].case}", end=end, file=sys.stderr)
    elif failed or number % 10 == 0 or number == total:
        print(f"[{number}/{total}] {'FAILED ' if failed else ''}{found[0].case}", file=sys.stderr)
    sys.stderr.flush()


def _as_json(checks: Sequence[Check], device: torch.device, status: int, seconds: float) -> dict[str, Any]:
    counts = Counter(check.status for check in checks)
    return {
        "package": __version__,
        "device": str(device),
        "name": machine.device_name(device),
        "torch": torch.__version__,
        "status": status,
        "held": counts["held"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "seconds": round(seconds, 2),
        "checks": [check.as_dict() for check in checks],
    }
