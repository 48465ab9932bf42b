"""The case list through the kernels, in Triton's interpreter: between guards, twice, against the error rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemma4_kernels import environment
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import AttentionCase, attention_cases

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

CPU = torch.device("cpu")


def narrowed(case: AttentionCase) -> AttentionCase:
    """At most two KV heads with at most four query heads each, and half or a quarter of the widest heads. What is left out are
    programs that differ by an offset, and chunks of columns; the cases tagged "quick" keep their groups and head dims."""
    heads, group, dim = min(case.hkv, 2), case.hq // case.hkv, case.d
    if "quick" not in case.tags:
        group = min(group, 4)
        if dim in (256, 512):
            dim = 256 if case.op == "k_eq_v_attention" else 64
    return replace(case, hkv=heads, hq=group * heads, d=dim)


def cases() -> list[AttentionCase]:
    """Every case that Triton serves, which values of 8 bits are not, at its own dtype, and at one of the other two in turn."""
    found = []
    served = [narrowed(case) for case in attention_cases() if not case.cache]
    for number, case in enumerate(dict.fromkeys(served)):
        others = [dtype for dtype in ("fp16", "fp32", "bf16") if dtype != case.dtype]
        found += [case, replace(case, dtype=others[number % 2])]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_case_is_held(case):
    (check,) = validation.check_case(case, ["triton"], CPU)
    assert check.status == "held", f"{check.reasons}; {check.replay}"
