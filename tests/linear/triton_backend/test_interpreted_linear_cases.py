"""Cases of the list through the public functions, in Triton's interpreter: against the rule, between guards, twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemma4_kernels import environment
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.linear_cases import LinearCase, linear_cases

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)


def narrowed(case: LinearCase) -> LinearCase:
    """As many tiles as it takes to have a first, a middle and a last one: the interpreter takes a second for a dozen."""
    return replace(case, m=min(case.m, 40), n=min(case.n, 150))


# The sweeps over all schemes are in the two files beside this one, kernel by kernel.
_SWEPT = (416, 768)
CASES = [case for case in linear_cases() if case.k not in _SWEPT or case.shuffled or "quick" in case.tags]


@pytest.mark.parametrize("case", list(dict.fromkeys(map(narrowed, CASES))), ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["triton"], torch.device("cpu"))
    assert check.status == "held", check.reasons
