"""The Triton kernel between sublayers, interpreted on the CPU: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from norms_helpers import DTYPES, assert_bits, assert_nearly_all_bits, drawn, with_exact_sums

from gemma4_kernels import BackendError, environment, use_backend
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.norm_cases import norm_cases
from gemma4_kernels.norms.ops import MOST_NUMBERS

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def on_triton():
    with use_backend("triton"):
        yield


def eager(call):
    with use_backend("eager"):
        return call.run()


@dtypes
@pytest.mark.parametrize("width", [1, 7, 256, 3840, MOST_NUMBERS])
def test_bits_of_pytorch_where_sums_are_exact(dtype, width):
    """The order of the sums of squares is all that may differ, and here it makes no difference."""
    call = with_exact_sums(dtype, 2, width)
    for changes in ({}, {"layer_scalar": None}, {"pre_weight": None}):
        some = replace(call, **changes)
        assert_bits(some.run(), eager(some))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_all_bits_where_sums_are_rounded(dtype):
    call = drawn(dtype, 5, 3840)
    assert_nearly_all_bits(call.run(), eager(call))


@dtypes
def test_weights_and_scalars_of_any_dtype(dtype):
    call = with_exact_sums(dtype, 2, 264)
    for of_weights in (torch.bfloat16, torch.float16, torch.float64):
        post, pre, scalar = (each.to(of_weights) for each in (call.post_weight, call.pre_weight, call.layer_scalar))
        cast = replace(call, post_weight=post, pre_weight=pre, layer_scalar=scalar)
        assert_bits(cast.run(), eager(cast))


def test_a_row_keeps_its_bits_among_others():
    call = drawn(torch.bfloat16, 16, 1000)
    together = call.run()
    for first, last in ((0, 1), (9, 10), (3, 8), (5, 16)):
        part = replace(call, x=call.x[first:last], residual=call.residual[first:last])
        assert_bits(part.run(), tuple(whole[first:last] for whole in together))


def test_rows_of_a_larger_tensor_and_nan_in_one():
    call = drawn(torch.bfloat16, 4, 250)
    expected = call.run()
    wide = [torch.cat((each, torch.full_like(each, float("nan"))), dim=1) for each in (call.x, call.residual)]
    assert_bits(replace(call, x=wide[0][:, :250], residual=wide[1][:, :250]).run(), expected)
    x = call.x.clone()
    x[1, 7] = float("nan")
    for got, want in zip(replace(call, x=x).run(), expected, strict=True):
        assert bool(got[1].isnan().all())
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.parametrize("case", [case for case in norm_cases() if case.m <= 5], ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["triton"], torch.device("cpu"))
    assert check.status == "held", check.reasons


def test_longer_rows_are_refused():
    with pytest.raises(BackendError, match="does not support rows of more than 16384 numbers"):
        drawn(torch.bfloat16, 1, MOST_NUMBERS + 1).run()
