"""One benchmark from a list of cases to the rows of a record.

Each case is validated first (`validation`); a kernel that breaks the rule is not timed, and its row says why. What is left is
timed in groups that fit into memory together: all kernels, all baselines and both ceilings of a group take turns in each
round (`timing`), so that they can be compared with one another whatever the machine does meanwhile.
"""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma4_kernels import backends
from gemma4_kernels._version import __version__
from gemma4_kernels.bench import ceilings, machine, records
from gemma4_kernels.bench.cases import Case
from gemma4_kernels.bench.timing import (
    Action,
    Clock,
    Subject,
    are_cold,
    clock_for,
    copies_needed,
    interleave,
    summarise,
    threads,
)
from gemma4_kernels.bench.validation import Check, check_case, too_large, too_slow, verdict

# Share of the free memory that the copies of one group may take: the calls themselves need some too.
GROUP_MEMORY_SHARE = 4
GROUP_CASES = 16
UNKNOWN_FREE_MEMORY = 4 << 30
# transformers' products in bf16 on a CPU that cannot multiply bf16 would take most of the time of a run.
MAX_BASELINE_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    device: torch.device
    backends: Sequence[str]
    baselines: bool = True
    rounds: int = 20
    slice_seconds: float = 0.03
    """Of each subject in each round; at least one batch."""
    ceiling_scale: float = 1.0
    limit_cpu: bool = True
    threads: int = 1
    """Of torch while it times; one, on a CPU, keeps neighbours out of the figure (`timing.HostClock`)."""


@dataclass
class _Entry:
    """A case that is to be timed: its rows so far, and the subjects of the rows that are still without a time."""

    case: Case
    rows: list[dict[str, Any]]
    subjects: dict[str, Subject]
    copies: int


Progress = Callable[[str], None]


def run(
    cases: Sequence[Case], settings: Settings, progress: Progress, given_clock: Clock | None = None
) -> list[dict[str, Any]]:
    """Validate and time the cases; one row per case and kernel or baseline."""
    rows: list[dict[str, Any]] = []
    for group in _groups(cases, settings):
        entries = [_prepare(case, settings, progress) for case in group]
        subjects = [subject for entry in entries for subject in entry.subjects.values()]
        if subjects:
            dtypes = [entry.case.dtype for entry in entries if entry.subjects]
            measured = ceilings.CeilingSubjects(settings.device, dtypes, settings.ceiling_scale)

            def report(done: int, count: int = len(subjects)) -> None:
                progress(f"round {done} of {settings.rounds}, {count} kernels and baselines")

            with threads(settings.threads):
                clock = given_clock or clock_for(settings.device)
                interleave([*measured.subjects, *subjects], clock, settings.rounds, settings.slice_seconds, report)
            for entry in entries:
                _fill_in(entry, measured.result(), settings)
        rows += [row for entry in entries for row in entry.rows]
        del entries, subjects
        gc.collect()
    return rows


def make_record(
    rows: list[dict[str, Any]], settings: Settings, before: dict[str, Any], arguments: Sequence[str]
) -> dict[str, Any]:
    """A record around the rows.

    Args:
        before: `machine.describe` from before the run: clocks and temperature of a card at rest.
        arguments: of the command; of a path only its last part is kept.
    """
    package = before.pop("package", __version__)
    return {
        "schema": records.SCHEMA,
        "package": package,
        **machine.git_state(),
        "command": " ".join(["gemma4-kernels bench", *(shlex.quote(_last_part(text)) for text in arguments)]),
        "sheet_source": ceilings.data_sheet(settings.device).source,
        "temperature_after_c": machine.describe(settings.device)["temperature_c"],
        "machine": {**before, "threads": settings.threads},
        "rows": rows,
    }


def _last_part(text: str) -> str:
    return Path(text).name if "/" in text or "\\" in text else text


def _groups(cases: Sequence[Case], settings: Settings) -> Iterator[list[Case]]:
    room = _room(settings.device)
    cache = machine.cache_bytes(settings.device)
    group: list[Case] = []
    taken = 0
    for case in cases:
        size = case.input_bytes() * copies_needed(case.bytes_moved(), case.input_bytes(), cache, room)
        if group and (taken + size > room or len(group) == GROUP_CASES):
            yield group
            group, taken = [], 0
        group.append(case)
        taken += size
    if group:
        yield group


def _room(device: torch.device) -> int:
    return (machine.free_memory(device) or UNKNOWN_FREE_MEMORY) // GROUP_MEMORY_SHARE


def _prepare(case: Case, settings: Settings, progress: Progress) -> _Entry:
    """Validate a case, and make the calls of what held."""
    device = settings.device
    copies = copies_needed(case.bytes_moved(), case.input_bytes(), machine.cache_bytes(device), _room(device))
    entry = _Entry(case, [], {}, copies)
    reason = too_large(case, device) or (too_slow(case, device) if settings.limit_cpu else None)
    if reason is not None:
        entry.rows = [_row(case, name, "kernel", "skipped", reason) for name in settings.backends]
        return entry
    progress(f"validating {case}")
    checks = check_case(case, settings.backends, device)
    held = [check.backend for check in checks if check.status == "held"]
    entry.rows = [_row_of_check(case, check) for check in checks]
    if not held:
        return entry
    made = case.inputs(device)
    sets = [made] + [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
        for _ in range(copies - 1)
    ]
    for name in held:
        entry.subjects[name] = Subject(name, [_kernel_call(case, name, inputs) for inputs in sets])
    if settings.baselines:
        _add_baselines(entry, sets)
    return entry


def _kernel_call(case: Case, name: str, made: dict[str, Any]) -> Action:
    def call() -> object:
        with backends.use_backend(name):
            return case.run(made)

    return call


def _add_baselines(entry: _Entry, sets: list[dict[str, Any]]) -> None:
    case = entry.case
    first = case.baselines(sets[0])
    expected = plain = None
    for name, ready in first.items():
        if isinstance(ready, str):
            entry.rows.append(_row(case, name, "baseline", "skipped", ready))
            continue
        try:
            start = time.perf_counter()
            got = ready()
            machine.synchronize(got.device)
            seconds = time.perf_counter() - start
        except Exception as error:  # out of memory, a shape that its kernels refuse: its business, not ours
            entry.rows.append(_row(case, name, "baseline", "skipped", f"raised {type(error).__name__}"))
            continue
        if seconds > MAX_BASELINE_SECONDS:
            entry.rows.append(
                _row(case, name, "baseline", "skipped", f"one call takes more than {MAX_BASELINE_SECONDS} s")
            )
            continue
        if case.result_depends_on_the_noise:
            reason = "it draws its own random numbers: its tokens are others, of the same distribution"
            entry.rows.append(_row(case, name, "baseline", "held", reason))
        else:
            if expected is None or plain is None:
                expected, plain = case.reference(sets[0])[0], case.plain(sets[0])[0]
            found = verdict(case.judged((got,))[0].cpu(), expected, plain)
            outside = None if found.ok else f"it is outside the rule that kernels are held to: {found}"
            entry.rows.append(_row(case, name, "baseline", "held" if found.ok else "failed", outside, found.worst))
        calls: list[Action] = [ready]
        for other in sets[1:]:
            call = case.baselines(other)[name]
            assert not isinstance(call, str)  # the copies differ in nothing that a baseline asks about
            calls.append(call)
        entry.subjects[name] = Subject(name, calls)


def _fill_in(entry: _Entry, measured: ceilings.Ceilings, settings: Settings) -> None:
    case = entry.case
    cache = machine.cache_bytes(settings.device)
    for row in entry.rows:
        subject = entry.subjects.get(row["by"])
        if subject is None:
            continue
        if subject.error is not None:
            row.update(status="skipped", reason=subject.error)
            continue
        summary = summarise(subject.rounds)
        gbs, tflops = case.bytes_moved() / summary.median / 1e9, case.operations() / summary.median / 1e12
        shares = {
            "bytes": _share(gbs, measured.copy_gbs),
            "operations": _share(tflops, measured.matmul_tflops[case.dtype]),
        }
        bound = max(shares, key=lambda name: shares[name] or 0.0)
        # The data sheet's rate is the one of bf16.
        sheet = measured.sheet_gbs if bound == "bytes" else measured.sheet_tflops if case.dtype == "bf16" else None
        row.update(
            median_us=_digits(1e6 * summary.median),
            quartile_us=_digits(1e6 * summary.quartile),
            fastest_us=_digits(1e6 * summary.fastest),
            spread=_digits(summary.spread),
            rounds=len(subject.rounds),
            calls=subject.num_calls,
            copies=entry.copies,
            cold=are_cold(entry.copies, case.bytes_moved(), cache),
            timed_with=subject.batches[0].method,
            gbs=_digits(gbs),
            tflops=_digits(tflops),
            copy_gbs=_digits(measured.copy_gbs),
            matmul_tflops=_digits(measured.matmul_tflops[case.dtype]),
            bound=bound,
            share=_digits(shares[bound]),
            sheet_share=_digits(_share(gbs if bound == "bytes" else tflops, sheet)),
        )


def _row_of_check(case: Case, check: Check) -> dict[str, Any]:
    worst = check.worst if check.outputs and check.worst < float("inf") else None
    return _row(case, check.backend, "kernel", check.status, "; ".join(check.reasons) or None, worst)


def _row(
    case: Case, by: str, kind: str, status: str, reason: str | None, worst: float | None = None
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = dict.fromkeys(records.ROW)
    row.update(
        case=str(case), family=case.family, op=case.op, dtype=case.dtype, by=by, kind=kind, status=status,
        reason=reason, worst=_digits(worst), bytes=case.bytes_moved(), operations=case.operations(),
    )  # fmt: skip
    return row


def _share(value: float, ceiling: float | None) -> float | None:
    return value / ceiling if ceiling else None


def _digits(value: float | None) -> float | None:
    """Five significant digits; more would be noise in a file that people compare."""
    return None if value is None or not abs(value) < float("inf") else float(f"{value:.5g}")


def on_stderr(message: str) -> None:
    """Progress that does not mix with results."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    else:
        print(message, file=sys.stderr, flush=True)
