"""The compiled norms between sublayers on the emulator: PyTorch's bits, any size, row bits, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import _emulate, needs_emulator  # noqa: F401
from norms_helpers import DTYPES, assert_bits, assert_nearly_all_bits, drawn, with_exact_sums

from gemma4_kernels import BackendError, explain, use_backend
from gemma4_kernels.backends import Call
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.bench.norm_cases import norm_cases
from gemma4_kernels.cuda_common import support
from gemma4_kernels.norms.ops import MOST_NUMBERS

pytestmark = needs_emulator
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def eager(call):
    with use_backend("eager"):
        return call.run()


# The numbers --------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("width", [1, 7, 8, 250, 256, 3840, 8192, 8200, MOST_NUMBERS])
def test_bits_of_pytorch_where_sums_are_exact(dtype, width):
    """The order of the sums of squares is all that may differ, and here it makes no difference."""
    call = with_exact_sums(dtype, 2, width)
    for changes in ({}, {"layer_scalar": None}, {"pre_weight": None}):
        some = replace(call, **changes)
        assert_bits(some.run(), eager(some))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_all_bits_where_sums_are_rounded(dtype):
    for seed in range(3):
        call = drawn(dtype, 5, 3840, seed=seed)
        assert_nearly_all_bits(call.run(), eager(call))


def test_fp32_holds_the_error_rule():
    call = drawn(torch.float32, 5, 3840)
    wide = {
        name: getattr(call, name).double() for name in ("x", "residual", "post_weight", "pre_weight", "layer_scalar")
    }
    for got, exact, plain in zip(call.run(), eager(replace(call, **wide)), eager(call), strict=True):
        assert (verdict := judge(got, exact, plain)).ok, str(verdict)


@dtypes
def test_weights_and_scalars_of_any_dtype(dtype):
    call = with_exact_sums(dtype, 2, 264)
    for of_weights in (torch.bfloat16, torch.float16, torch.float64):
        post, pre, scalar = (each.to(of_weights) for each in (call.post_weight, call.pre_weight, call.layer_scalar))
        cast = replace(call, post_weight=post, pre_weight=pre, layer_scalar=scalar)
        assert_bits(cast.run(), eager(cast))
    mixed = replace(call, pre_weight=call.pre_weight.bfloat16(), layer_scalar=torch.tensor(0.5))
    assert_bits(mixed.run(), eager(mixed))


# Rows and memory ----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("rows", range(1, 17))
def test_a_row_keeps_its_bits_among_others(dtype, rows):
    call = drawn(dtype, 16, 1000)
    together = call.run()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(rows))[:rows]
    part = replace(call, x=call.x[order], residual=call.residual[order])
    assert_bits(part.run(), tuple(whole[order] for whole in together))


@dtypes
def test_special_numbers_stay_in_their_row(dtype):
    call = drawn(dtype, 5, 264)
    expected = call.run()
    x, residual = call.x.clone(), call.residual.clone()
    x[1, 7], residual[3, 200] = float("nan"), float("inf")
    hidden, normed = replace(call, x=x, residual=residual).run()
    assert bool(hidden[1].isnan().all())
    assert bool(normed[1].isnan().all())
    assert bool(hidden[3, 200].isinf())
    for got, want in zip((hidden, normed), expected, strict=True):
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


@dtypes
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("width", [264, 250])
def test_rows_of_a_larger_tensor(dtype, offset, width):
    """With rows at multiples of 16 bytes and at others."""
    call = drawn(dtype, 4, 2, width)
    wide = call.x.new_full((4, 2, 280), float("nan"))
    places = [wide.clone()[..., offset : offset + width] for _ in range(2)]
    for place, tensor in zip(places, (call.x, call.residual), strict=True):
        place.copy_(tensor)
    moved = replace(call, x=places[0], residual=places[1])
    assert_bits(moved.run(), call.run())
    weights = [torch.cat((torch.zeros(offset), each))[offset:] for each in (call.post_weight, call.pre_weight)]
    assert_bits(replace(call, post_weight=weights[0], pre_weight=weights[1]).run(), call.run())
    assert_bits(replace(call, x=call.x[:1].expand(4, -1, -1)).run(), replace(call, x=call.x[:1].repeat(4, 1, 1)).run())


def test_no_rows():
    call = drawn(torch.bfloat16, 0, 40)
    assert [each.shape for each in call.run()] == [(0, 40), (0, 40)]


# The list of cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in norm_cases() if case.m <= 17], ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float64, 40, "takes bfloat16, float16, float32, not float64"),
        (torch.bfloat16, MOST_NUMBERS + 1, "does not support rows of more than 16384 numbers"),
    ],
)
def test_what_the_kernel_does_not_serve_has_a_reason(dtype, width, reason):
    with pytest.raises(BackendError, match=reason):
        drawn(dtype, 1, width).run()


def test_the_emulator_runs_only_where_it_is_asked_for():
    call = drawn(torch.bfloat16, 1, 40)
    with use_backend("auto"):
        assert explain("sandwich_norm", x=call.x, residual=call.residual, post_weight=call.post_weight).taken == "eager"
    assert support.refuses(Call("sandwich_norm")) is None
