"""`gemma4-kernels bench`: time every kernel that holds, beside what others offer and what the device can do.

Results go to stdout, progress to stderr.

    gemma4-kernels bench --quick                       nineteen cases, a minute or two on a CPU
    gemma4-kernels bench --save a.json --plot a.png    the same rows as a record and a picture
    gemma4-kernels bench show a.json -o csv            a record as a table
    gemma4-kernels bench compare a.json b.json         SAME, FAST or SLOW for each row
    gemma4-kernels bench --static                      what compiled kernels say without a GPU

Exit status: 0; 1 a kernel failed its validation and was not timed, `compare` found a SLOW row, or --static could not compile or
read a kernel; 2 wrong arguments or an unreadable record; 3 nothing was timed or read, or a kernel held and could not be, or the
records have no row in common.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gemma4_kernels.backends import BACKENDS
from gemma4_kernels.bench import cards, compare, machine, plot, records, running, static, static_tables, tables
from gemma4_kernels.bench.cases import Case, all_cases, parse, select
from gemma4_kernels.cli.validate import add_selection

OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3
ROUNDS = 20


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench", help="time every kernel that holds, with its share of the device's ceilings",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_selection(parser)
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help=f"rounds of all kernels, by default {ROUNDS}")
    parser.add_argument(
        "--threads", type=_positive, default=1,
        help="of torch on a CPU; one, the default, is timed by processor time, more by the wall's clock",
    )  # fmt: skip
    parser.add_argument("--no-baselines", action="store_true", help="time this package's kernels only")
    add_static(parser)
    parser.add_argument("--list", action="store_true", help="print the selected cases, one a line, and stop")
    parser.add_argument("-o", dest="form", choices=tables.FORMATS, default="md", help="form of the table")
    parser.add_argument("--save", metavar="FILE", help="write a record (see bench/records/README.md)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture; needs matplotlib")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(metavar="show | compare")
    shown = actions.add_parser("show", help="print a record as a table, or draw it")
    shown.add_argument("record")
    shown.add_argument("-o", dest="form", choices=tables.FORMATS, default="md")
    shown.add_argument("--plot", metavar="FILE")
    shown.set_defaults(run=show)
    compared = actions.add_parser("compare", help="hold a record against an earlier one")
    compared.add_argument("before")
    compared.add_argument("after")
    compared.set_defaults(run=run_compare)


def add_static(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compiled kernels, without a GPU")
    group.add_argument("--static", action="store_true", help="read compiled kernels instead of timing them")
    group.add_argument(
        "--architecture", action="append", choices=static.ARCHITECTURES, metavar="sm_86",
        help=f"of {', '.join(static.ARCHITECTURES)}; may be repeated, by default all",
    )  # fmt: skip
    group.add_argument("--kernel", action="append", metavar="TEXT", help="only kernels with this in their names")
    group.add_argument(
        "--card", action="append", choices=(*cards.predictable(), "all"), metavar="NAME",
        help='predict for this card ("rtx 3090") or for all; by default one card for each architecture',
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.static:
        return run_static(arguments)
    try:
        device = machine.known_device(arguments.device) if arguments.device else machine.default_device()
        cases = selected(arguments)
    except ValueError as error:
        return _refuse(error)
    if arguments.list:
        print("\n".join(map(str, cases)))
        return OK
    if arguments.save and not Path(arguments.save).absolute().parent.is_dir():
        return _refuse(f"the folder of --save {arguments.save} does not exist")
    settings = running.Settings(
        device=device,
        backends=tuple(dict.fromkeys(arguments.backend or BACKENDS)),
        baselines=not arguments.no_baselines,
        rounds=arguments.rounds,
        threads=arguments.threads,
        limit_cpu=not (arguments.full or arguments.only),
    )
    before = machine.describe(device)
    rows = running.run(cases, settings, running.on_stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    record = records.scrub(running.make_record(rows, settings, before, _as_typed(arguments)))
    print(tables.render(record["rows"], arguments.form))
    status = _status(rows)
    try:
        if arguments.save:
            records.save(record, arguments.save)
        if arguments.plot:
            _draw(record, arguments.plot)
    except (OSError, ImportError, ValueError) as error:
        return _refuse(error)
    return status


def run_static(arguments: argparse.Namespace) -> int:
    chosen = arguments.card or cards.REPRESENTATIVES
    names = cards.predictable() if "all" in chosen else tuple(dict.fromkeys(chosen))
    asked = dict.fromkeys(arguments.architecture or static.ARCHITECTURES)
    found = static.collect(asked, arguments.kernel or ())
    print(static_tables.render(found, arguments.form, names))
    if found.failures:
        # Markdown carries them on stdout already.
        lines = [] if arguments.form == "md" else found.failures
        print(*lines, "bench: not every kernel could be compiled and read", sep="\n", file=sys.stderr)
        return FAILED
    if arguments.kernel and not found.readings:
        print(f"bench: no compiled kernel is called {' or '.join(arguments.kernel)}", file=sys.stderr)
        return NOTHING
    return OK


def show(arguments: argparse.Namespace) -> int:
    try:
        record = records.load(arguments.record)
        print(tables.render(record["rows"], arguments.form))
        if arguments.plot:
            _draw(record, arguments.plot)
    except (OSError, ImportError, ValueError) as error:
        return _refuse(error)
    return OK


def run_compare(arguments: argparse.Namespace) -> int:
    try:
        found = compare.compare(records.load(arguments.before), records.load(arguments.after))
    except ValueError as error:
        return _refuse(error)
    print(compare.render(found))
    if not found.lines:
        return NOTHING
    return FAILED if found.counts["SLOW"] else OK


def selected(arguments: argparse.Namespace) -> list[Case]:
    """--quick: nineteen cases that a CPU times in a minute or two; else all, of which a CPU skips the largest unless --full."""
    if arguments.only:
        return list({text: parse(text) for text in arguments.only}.values())
    chosen: list[Case] = select(all_cases(), "bench-quick" if arguments.quick else "bench")
    return chosen


def _status(rows: list[dict[str, Any]]) -> int:
    kernels = [row for row in rows if row["kind"] == "kernel"]
    if any(row["status"] == "failed" for row in kernels):
        print("bench: a kernel failed its validation and was not timed", file=sys.stderr)
        return FAILED
    if untimed := [row for row in kernels if row["worst"] is not None and row["status"] == "skipped"]:
        print(f"bench: {untimed[0]['case']} on {untimed[0]['by']} held and could not be timed", file=sys.stderr)
        return NOTHING
    if not any(row["median_us"] for row in kernels):
        print("bench: nothing was timed", file=sys.stderr)
        return NOTHING
    return OK


def _as_typed(arguments: argparse.Namespace) -> list[str]:
    """The options that decide what was measured and how."""
    words = [f"--{name}" for name in ("quick", "full") if getattr(arguments, name)]
    words += [part for case in arguments.only or () for part in ("--only", case)]
    words += [part for name in arguments.backend or () for part in ("--backend", name)]
    words += ["--device", arguments.device] if arguments.device else []
    words += ["--rounds", str(arguments.rounds)] if arguments.rounds != ROUNDS else []
    words += ["--threads", str(arguments.threads)] if arguments.threads != 1 else []
    return words + (["--no-baselines"] if arguments.no_baselines else [])


def _draw(record: dict[str, Any], path: str) -> None:
    for written in plot.draw(record, path):
        print(f"wrote {written}", file=sys.stderr)


def _refuse(error: object) -> int:
    print(f"bench: {error}", file=sys.stderr)
    return USAGE


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
