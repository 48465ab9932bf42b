"""The cases of `gemma4-kernels bench --quick` as pytest-benchmark entries, for those who keep histories with it.

    pytest bench/pytest_entries.py --benchmark-autosave

It is not part of the tests. One set of inputs, so small cases are timed with warm caches; `bench` is what figures are quoted
from. Needs gemma4-kernels[benchmark].
"""

from __future__ import annotations

import pytest

from gemma4_kernels.backends import BACKENDS, use_backend
from gemma4_kernels.bench import machine
from gemma4_kernels.bench.cases import Case, all_cases, select
from gemma4_kernels.bench.validation import check_case

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", select(all_cases(), "bench-quick"), ids=str)
def test_time(benchmark, case: Case, backend: str) -> None:  # type: ignore[no-untyped-def]
    device = machine.default_device()
    (check,) = check_case(case, [backend], device)
    if check.status == "skipped":
        pytest.skip(check.reasons[0])
    assert check.status == "held", check.reasons
    made = case.inputs(device)

    def call() -> None:
        case.run(made)
        machine.synchronize(device)

    benchmark.group = str(case)
    with use_backend(backend):
        benchmark.pedantic(call, rounds=10, warmup_rounds=1)
