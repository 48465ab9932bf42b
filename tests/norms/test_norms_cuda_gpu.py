"""The compiled norms between sublayers on the GPU that is there: the eager backend's bits, row bits; streams and graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from norms_helpers import DTYPES, Sandwich, assert_bits, assert_nearly_all_bits, drawn, with_exact_sums
from on_gpu import _cuda_backend, captured, needs_gpu, on_another_stream  # noqa: F401

from gemma4_kernels import use_backend
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.norms.ops import MOST_NUMBERS

pytestmark = needs_gpu

DEVICE = "cuda"
HIDDEN = GEMMA4_12B.hidden_size
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def moved(call: Sandwich, device: str = DEVICE) -> Sandwich:
    tensors = {name: value.to(device) for name, value in vars(call).items() if isinstance(value, torch.Tensor)}
    return replace(call, **tensors)


def eager_on_the_cpu(call: Sandwich) -> tuple[torch.Tensor, torch.Tensor | None]:
    with use_backend("eager"):
        hidden, normed = moved(call, "cpu").run()
    return hidden.to(DEVICE), None if normed is None else normed.to(DEVICE)


@dtypes
@pytest.mark.parametrize(
    ("rows", "width"), [(1, HIDDEN), (5, HIDDEN), (300, HIDDEN), (2, 7), (2, 8200), (2, MOST_NUMBERS)]
)
def test_bits_where_sums_are_exact(rows, width, dtype):
    """The order of the sums of squares is all that may differ from the eager backend, and here it makes no difference."""
    call = moved(with_exact_sums(dtype, rows, width))
    for changes in ({}, {"layer_scalar": None}, {"pre_weight": None}):
        some = replace(call, **changes)
        assert_bits(some.run(), eager_on_the_cpu(some))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_all_bits_where_sums_are_rounded(dtype):
    call = moved(drawn(dtype, 16, HIDDEN))
    assert_nearly_all_bits(call.run(), eager_on_the_cpu(call))


@dtypes
def test_a_row_keeps_its_bits_among_others(dtype):
    call = moved(drawn(dtype, 16, HIDDEN))
    together = call.run()
    for rows in (slice(0, 1), slice(9, 10), slice(3, 8)):
        part = replace(call, x=call.x[rows], residual=call.residual[rows])
        assert_bits(part.run(), tuple(whole[rows] for whole in together))


def test_another_stream():
    call = moved(drawn(torch.bfloat16, 5, HIDDEN))
    expected = call.run()
    assert_bits(on_another_stream(call.run), expected)


def test_a_captured_graph_reads_what_is_there_at_its_replay():
    call = moved(drawn(torch.bfloat16, 5, HIDDEN))
    results, graph = captured(call.run)
    call.x.mul_(0.5)
    graph.replay()
    assert_bits(results, call.run())
