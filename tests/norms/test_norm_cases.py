"""Every case of the norms between sublayers, on the eager backend, against the reference and the error rule."""

from __future__ import annotations

import pytest
import torch
from case_lists import assert_cases_are_their_strings

from gemma4_kernels import backends
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import parse
from gemma4_kernels.bench.norm_cases import NormCase, norm_bench_cases, norm_cases
from gemma4_kernels.norms import eager

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", norm_cases(), ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["eager"], CPU)
    assert check.status == "held", check.reasons


def test_a_case_is_its_string():
    assert_cases_are_their_strings((*norm_cases(), *norm_bench_cases()))


@pytest.mark.parametrize("text", ["m=-1", "n=0", "pre=2", "scalar=-1", "dtype=fp64", "k=3", "n=x"])
def test_a_string_that_makes_no_case(text):
    with pytest.raises(ValueError, match=r"parse|invalid literal"):
        parse(f"sandwich_norm({text})")


def test_bytes_and_operations_of_a_decode_step():
    case = NormCase("sandwich_norm", m=5, n=64)
    assert case.input_bytes() == (2 * 5 + 2) * 64 * 2
    assert case.bytes_moved() == case.input_bytes() + 2 * 5 * 64 * 2
    assert case.operations() == 9 * 5 * 64
    assert NormCase("sandwich_norm", m=5, n=64, pre=0).bytes_moved() == (2 * 5 + 1 + 5) * 64 * 2


def test_the_baseline_computes_the_same():
    case = NormCase("sandwich_norm", m=3, n=64, scalar=1)
    made = case.inputs()
    assert torch.equal(case.baselines(made)["pytorch"](), case.run(made)[0])


def hidden_off(result):
    result[0][..., -1] += 0.5
    return result


@pytest.mark.parametrize(
    ("change", "where"), [(hidden_off, "hidden"), (lambda result: (result[0], -result[1]), "normed")]
)
def test_a_wrong_result_does_not_hold(change, where, monkeypatch):
    case = NormCase("sandwich_norm", m=3, n=64)
    right = eager.sandwich_norm
    implementation = backends._implementations["sandwich_norm", "eager"]
    monkeypatch.setitem(implementation.__dict__, "function", lambda *arguments: change(right(*arguments)))
    (check,) = validation.check_case(case, ["eager"], CPU)
    assert check.status == "failed"
    assert where in " ".join(check.reasons)
