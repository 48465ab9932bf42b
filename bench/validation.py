"""Hold one case against the rule on every backend of a device. No test framework, no printing.

The order matters: first the kernel of each backend, on inputs between guards, twice; only then the reference, so that no
kernel can profit from what the reference left in memory. A check is held, failed or skipped, and a skipped one has a reason.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import backends
from gemma4_kernels.bench import machine
from gemma4_kernels.bench.attention_calls import Inputs
from gemma4_kernels.bench.cases import Case
from gemma4_kernels.bench.errors import Verdict, judge
from gemma4_kernels.bench.guards import GuardedInputs, poisoned_memory, same_bits
from gemma4_kernels.checks import BackendError

# A CPU would take minutes over one such case.
CPU_OPERATIONS = 2e10
# The inputs, as drawn and between guards, the reference's fp64 copies of an excerpt, and what the kernel itself needs.
MEMORY_PER_INPUT_BYTE = 4


@dataclass(frozen=True)
class Check:
    """One case on one backend."""

    case: str
    family: str
    backend: str
    device: str
    status: str
    """held, failed or skipped."""
    reasons: tuple[str, ...] = ()
    """Why it failed or was skipped, each a sentence."""
    outputs: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """Largest error of any output as a share of its budget; inf where something else is wrong."""
        if self.status == "failed" and not any(not verdict.ok for verdict in self.outputs.values()):
            return float("inf")
        return max((verdict.worst for verdict in self.outputs.values()), default=0.0)

    @property
    def replay(self) -> str:
        return replay_command(self.case, self.backend, self.device)

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case, "family": self.family, "backend": self.backend, "device": self.device,
            "status": self.status, "reasons": list(self.reasons),
            "outputs": {name: _verdict_dict(verdict) for name, verdict in self.outputs.items()},
            "seconds": round(self.seconds, 4), "replay": self.replay,
        }  # fmt: skip


def replay_command(case: str, backend: str, device: str) -> str:
    emulated = "--emulate " if backend == "cuda" and device == "cpu" else ""
    return f"gemma4-kernels validate --device {device} --backend {backend} {emulated}--only {shlex.quote(case)}"


def check_all(
    cases: Iterable[Case], names: Iterable[str], device: torch.device, limit_cpu: bool = True
) -> Iterator[list[Check]]:
    """`check_case`, case after case. With limit_cpu, a CPU skips what would take it minutes."""
    names = tuple(names)
    lost: str | None = None
    for case in cases:
        reason = lost or too_large(case, device) or (too_slow(case, device) if limit_cpu else None)
        if reason is not None:
            yield [_skipped(case, name, device, reason) for name in names]
        else:
            yield check_case(case, names, device)
            if not machine.answers(device):
                lost = f"the device was lost after {case}: nothing after that says anything"


def too_slow(case: Case, device: torch.device) -> str | None:
    if device.type == "cpu" and case.operations() > CPU_OPERATIONS:
        return f"more than {CPU_OPERATIONS:.0e} operations take a CPU minutes"
    return None


def too_large(case: Case, device: torch.device) -> str | None:
    """Why the case does not fit into the memory of the device or of the host; None if it does, or nobody knows."""
    need = MEMORY_PER_INPUT_BYTE * case.input_bytes()
    for where in {device.type: device, "cpu": torch.device("cpu")}.values():
        free = machine.free_memory(where)
        if free is not None and need > free:
            return f"needs about {need / 1e9:.1f} GB of memory on {where.type}, {free / 1e9:.1f} GB are free"
    return None


def check_case(case: Case, names: Iterable[str], device: torch.device) -> list[Check]:
    """Hold a case against the rule on each named backend."""
    made = case.inputs()
    expected_inputs = {**made, **case.changes(made)}
    runs = [(name, _run(case, name, made, expected_inputs, device)) for name in names]
    checks = []
    exact: tuple[Tensor, ...] | None = None
    for name, run in runs:
        if run.refusal is not None:
            checks.append(_skipped(case, name, device, run.refusal))
            continue
        reasons, outputs = list(run.reasons), {}
        if run.results:
            if exact is None:
                exact, plain = case.reference(made), case.plain(made)
            outputs = _verdicts(case, run.results[0], exact, plain, reasons)
            reasons += _repeatability(case, run.results, exact, plain)
        status = "failed" if reasons else "held"
        checks.append(Check(str(case), case.family, name, str(device), status, tuple(reasons), outputs, run.seconds))
    return checks


class _Run(NamedTuple):
    """What the kernel of one backend did: its results in order (usual, poisoned, perhaps usual again)."""

    results: list[tuple[Tensor, ...]]
    reasons: list[str]
    refusal: str | None
    seconds: float


def _run(case: Case, name: str, made: Inputs, expected_inputs: Inputs, device: torch.device) -> _Run:
    start = time.perf_counter()
    results: list[tuple[Tensor, ...]] = []
    reasons: list[str] = []
    refusal = None
    try:
        with backends.use_backend(name):
            refusal = _refusal(case, name, made, device)
            if refusal is None:
                results.append(_call(case, made, expected_inputs, device, reasons))
                with poisoned_memory():
                    results.append(_call(case, made, expected_inputs, device, reasons))
                if not _all_same(*results):
                    results.append(_call(case, made, expected_inputs, device, reasons))
    except BackendError as error:  # a part of the call, an append for instance, has no kernel in this backend
        results = []
        if not reasons:  # what it did before it gave up counts
            refusal = str(error).splitlines()[0]
    except Exception as error:
        results = []
        reasons.append(f"raised {type(error).__name__}: {error}".strip())
    return _Run(results, list(dict.fromkeys(reasons)), refusal, time.perf_counter() - start)


def _refusal(case: Case, name: str, made: Inputs, device: torch.device) -> str | None:
    """Why the backend cannot serve the call, None if it can; it has been asked for by name."""
    stand_ins = {key: _stand_in(value, device) for key, value in made.items()}
    explanation = backends.explain(case.op, **case.arguments(stand_ins))
    if explanation.taken == name:
        return None
    return next(choice.reason for choice in explanation.choices if choice.backend == name)


def _stand_in(value: Any, device: torch.device) -> Any:
    """An argument for `explain`, which computes nothing: a long cache need not travel for it."""
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    return torch.empty_like(value, device=device)


def _call(
    case: Case, made: Inputs, expected_inputs: Inputs, device: torch.device, reasons: list[str]
) -> tuple[Tensor, ...]:
    guarded = GuardedInputs(made, device)
    result = case.run(guarded.arguments)
    # Brought to the host before anything else is allocated on the device.
    kept = tuple(tensor.detach().cpu() for tensor in case.judged(result))
    reasons += guarded.damage(expected_inputs)
    return kept


def _verdicts(
    case: Case, result: tuple[Tensor, ...], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...], reasons: list[str]
) -> dict[str, Verdict]:
    """Each output against the rule; failures are added to the reasons."""
    verdicts = {}
    for name, got, expected, ordinary in zip(case.outputs, result, exact, plain, strict=True):
        if got.shape != expected.shape:
            reasons.append(f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
            continue
        verdicts[name] = verdict(got, expected, ordinary)
        if not verdicts[name].ok:
            reasons.append(f"{name} {verdicts[name]}")
    return verdicts


def verdict(got: Tensor, expected: Tensor, ordinary: Tensor) -> Verdict:
    """One output against the rule; whole numbers have no budget."""
    if got.is_floating_point():
        return judge(got, expected, ordinary)
    unequal = (got != expected).flatten()
    if not bool(unequal.any()):
        return Verdict(True, 0.0, (), 0.0, 0.0, 0.0)
    index = tuple(int(i) for i in torch.unravel_index(unequal.int().argmax(), got.shape))
    return Verdict(False, float("inf"), index, float(got[index]), float(expected[index]), 0.0)


def _repeatability(
    case: Case, results: list[tuple[Tensor, ...]], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> list[str]:
    """Sentences about a kernel that gave other bits the second time, or left elements unwritten."""
    if len(results) < 3:
        return []
    usual, poisoned, again = results
    if not _all_same(usual, again):
        return ["two runs on the same inputs gave different bits"]
    # Other bits from deterministic algorithms are allowed, wrong numbers from unwritten memory are not.
    wrong: list[str] = []
    _verdicts(case, poisoned, exact, plain, wrong)
    return [f"with its memory poisoned, {sentence}: some of it is read or returned unwritten" for sentence in wrong]


def _all_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(same_bits(one, other) for one, other in zip(left, right, strict=True))


def _skipped(case: Case, name: str, device: torch.device, reason: str) -> Check:
    return Check(str(case), case.family, name, str(device), "skipped", (reason,))


def _verdict_dict(verdict: Verdict) -> dict[str, Any]:
    """JSON has no NaN and no infinity: those become strings."""
    found = {
        "ok": verdict.ok, "worst": verdict.worst, "index": list(verdict.index), "got": verdict.got,
        "expected": verdict.expected, "budget": verdict.budget,
    }  # fmt: skip
    return {
        key: repr(value) if isinstance(value, float) and not abs(value) < float("inf") else value
        for key, value in found.items()
    }
