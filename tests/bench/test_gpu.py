"""On a GPU only: guards, clocks and ceilings on the device."""

from __future__ import annotations

import pytest
import torch
from bench_helpers import APPENDING, SMALL

from gemma4_kernels.bench import ceilings, machine, timing, validation
from gemma4_kernels.bench.timing import Subject, interleave

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [SMALL, APPENDING], ids=str)
def test_eager_holds_on_the_gpu(case):
    (found,) = validation.check_case(case, ["eager"], torch.device("cuda"))
    assert (found.status, found.reasons) == ("held", ())


def test_a_captured_copy_takes_time_and_its_ceiling_is_plausible():
    device = torch.device("cuda")
    measured = ceilings.CeilingSubjects(device, ["bf16"], scale=1 / 4)
    interleave(measured.subjects, timing.clock_for(device), rounds=3, slice_seconds=0.01)
    found = measured.result()
    assert measured.copy.batches[0].method == "graph"
    assert 10 < found.copy_gbs < 20_000
    assert found.matmul_tflops["bf16"] > 1


def test_calls_that_cannot_be_captured_are_timed_all_the_same():
    x = torch.ones(8, device="cuda")
    subject = Subject("reads a number back", [lambda: x.sum().item()])
    subject.play_round(timing.clock_for(torch.device("cuda")), 1e-3)
    assert subject.batches[0].method == "events"
    assert subject.rounds[0] > 0
    torch.ones(4, device="cuda").sum().item()  # a capture that broke off leaves the device usable


def test_the_card_is_described():
    described = machine.describe(torch.device("cuda"))
    assert described["architecture"].startswith("sm_")
    assert described["memory_gib"] > 1
    assert described["driver"] or described["unknown_because"]
    assert machine.cache_bytes(torch.device("cuda")) > 1 << 18
