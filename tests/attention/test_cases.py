"""Every case of the list, on every backend that can serve it here, against the reference and the error rule."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import explain, use_backend
from gemma4_kernels.backends import BACKENDS
from gemma4_kernels.bench.cases import attention_cases, parse
from gemma4_kernels.bench.errors import judge

CASES = attention_cases()


def serving(case):
    """The backends that can serve a case on the CPU; what one refuses is `validate`'s to list."""
    made = case.inputs()
    able = []
    for backend in BACKENDS:
        with use_backend(backend):
            if explain(case.op, **made).taken == backend:
                able.append(backend)
    return able


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_keeps_the_error_rule(case):
    backends = serving(case)
    assert "eager" in backends
    results = []
    for backend in backends:
        made = case.inputs()
        with use_backend(backend):
            results.append(case.run(made))  # every kernel before the reference, so that none can profit from it
        assert results[-1][0].dtype == made["q"].dtype
    fresh = case.inputs()  # a call that appends has changed its cache
    exact, plain = case.reference(fresh), case.plain(fresh)
    for backend, result in zip(backends, results, strict=True):
        for name, got, expected, ordinary in zip(case.outputs, result, exact, plain, strict=True):
            assert (verdict := judge(got, expected, ordinary)).ok, f"{name} of {case} on {backend}: {verdict}"


def test_a_case_is_its_string():
    for case in CASES:
        assert parse(str(case)) == case
    assert len({case.seed for case in CASES}) == len(CASES)


def test_inputs_of_a_case_are_the_same_every_time():
    case = CASES[0]
    first, second = case.inputs(), case.inputs()
    assert all(torch.equal(first[name], second[name]) for name in ("q", "k", "v"))


@pytest.mark.parametrize(
    "text",
    [
        "", "flash_attn_func", "nothing(b=1)", "flash_attn_func(zz=1)", "flash_attn_func(b=x)", "flash_attn_func(b=0)",
        "flash_attn_func(sq=-1)", "flash_attn_func(hkv=0)", "flash_attn_func(hq=3,hkv=2)", "flash_attn_func(left=-5)",
        "flash_attn_func(dtype=int8)", "flash_attn_func(blocks=xx)", "flash_attn_func(sk=4,page=16)",
        "flash_attn_func(new=2)", "flash_attn_func(free=2)", "flash_attn_varlen_func(left=3)",
        "flash_attn_varlen_func(lengths=3+4)", "flash_attn_with_kvcache(lengths=a+b)", "k_eq_v_attention(left=3)",
    ],
)  # fmt: skip
def test_a_string_that_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match=r"parse|invalid"):
        parse(text)
