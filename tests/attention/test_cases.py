"""Every case of the list, on every backend that this machine has, against the reference and the error rule."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import use_backend
from gemma4_kernels.bench.cases import attention_cases, parse
from gemma4_kernels.bench.errors import judge

CASES = attention_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_keeps_the_error_rule(case):
    made = case.inputs()
    with use_backend("eager"):
        out, lse = case.run(made)  # the kernel before the reference, so that it cannot profit from it
    fresh = case.inputs()  # a call that appends has changed its cache
    expected_out, expected_lse = case.reference(fresh)
    plain_out, plain_lse = case.plain(fresh)
    assert out.dtype == made["q"].dtype
    assert (verdict := judge(out, expected_out, plain_out)).ok, f"out of {case}: {verdict}"
    assert (verdict := judge(lse, expected_lse, plain_lse)).ok, f"lse of {case}: {verdict}"


def test_a_case_is_its_string():
    for case in CASES:
        assert parse(str(case)) == case
    assert len({case.seed for case in CASES}) == len(CASES)


def test_inputs_of_a_case_are_the_same_every_time():
    case = CASES[0]
    first, second = case.inputs(), case.inputs()
    assert all(torch.equal(first[name], second[name]) for name in ("q", "k", "v"))


@pytest.mark.parametrize(
    "text", ["", "flash_attn_func", "nothing(b=1)", "flash_attn_func(zz=1)", "flash_attn_func(b=x)"]
)
def test_a_string_that_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match=r"parse|invalid"):
        parse(text)
