"""gelu(x @ gate.T) * (x @ up.T) in one pass: the first half of Gemma's MLP, without the two products in memory.

    x         (M, K), taken apart by column position, as `linear` takes it
    gate, up  N x K, two weights of one layout
    out       (M, N)

One program owns the same BLOCK_N rows of both weights, reads each of their codes once, and loads x once for both. Both sums,
GeLU and the product are fp32; the result is rounded once. The sums are made in the order of `linear`, without pieces of K.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.linear.triton import tables, values
from gemma4_kernels.linear.triton.linear import fusion, load_x, tile_constants
from gemma4_kernels.linear.triton.values import load_tile, weights_at
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.triton_common.rounding import operand, round_to, to_fp32


@triton.jit
def gelu_tanh(x):
    """GeLU by its tanh approximation, x / 2 * (1 + tanh(u)), of fp32 x.

    (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)): so written nothing cancels where u is negative, and the exponential, of a number
    that is never positive, cannot overflow.
    """
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    shrunk = tl.exp(-2 * tl.abs(u))
    return x * (tl.where(u < 0, shrunk, 1.0) / (1 + shrunk))


@triton.jit(do_not_specialize=["M"])
def geglu_kernel(
    x_ptr, out_ptr,
    gate_codes_ptr, gate_high_ptr, gate_scales_ptr, gate_offsets_ptr, gate_zeros_ptr, gate_group_scales_ptr, gate_table_ptr,
    gate_scale_table_ptr, gate_scale_scales_ptr, gate_scale_offset_ptr,
    up_codes_ptr, up_high_ptr, up_scales_ptr, up_offsets_ptr, up_zeros_ptr, up_group_scales_ptr, up_table_ptr,
    up_scale_table_ptr, up_scale_scales_ptr, up_scale_offset_ptr, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of M)."""
    IN_ROW: tl.constexpr = K // (4 if BITS == 8 else 8)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1).to(tl.int64)  # beyond the weight its last row is read again, and not stored
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(0, IN_ROW, WORDS, num_stages=STAGES):
        word = first + tl.arange(0, WORDS)
        gate_words, gate_high, gate_scale, gate_shift = load_tile(
            gate_codes_ptr, gate_high_ptr, gate_scales_ptr, gate_offsets_ptr, gate_zeros_ptr, gate_group_scales_ptr,
            gate_scale_table_ptr, gate_scale_scales_ptr, gate_scale_offset_ptr, row, n < N, first, word,
            K, GROUP, BITS, VALUES, SCALES, ZERO,
        )  # fmt: skip
        up_words, up_high, up_scale, up_shift = load_tile(
            up_codes_ptr, up_high_ptr, up_scales_ptr, up_offsets_ptr, up_zeros_ptr, up_group_scales_ptr,
            up_scale_table_ptr, up_scale_scales_ptr, up_scale_offset_ptr, row, n < N, first, word,
            K, GROUP, BITS, VALUES, SCALES, ZERO,
        )  # fmt: skip
        for position in tl.static_range(4 if BITS == 8 else 8):
            x = load_x(x_ptr, position, m, M, word, IN_ROW).to(DOT_DTYPE)  # (WORDS, BLOCK_M)
            w = weights_at(gate_words, gate_high, gate_scale, gate_shift, word, position, gate_table_ptr, BITS, VALUES)
            gate = tl.dot(operand(w, DTYPE, DOT_DTYPE), x, gate, input_precision="ieee")
            w = weights_at(up_words, up_high, up_scale, up_shift, word, position, up_table_ptr, BITS, VALUES)
            up = tl.dot(operand(w, DTYPE, DOT_DTYPE), x, up, input_precision="ieee")
    out = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out, round_to(gelu_tanh(gate) * up, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["COUNT"])
def combine_kernel(gate_ptr, up_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    """Grid (blocks of elements): out = gelu(gate) * up in fp32, rounded once. out may be gate or up."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < COUNT
    gate = to_fp32(tl.load(gate_ptr + element, mask=inside, other=0.0))
    up = to_fp32(tl.load(up_ptr + element, mask=inside, other=0.0))
    tl.store(out_ptr + element, round_to(gelu_tanh(gate) * up, out_ptr.dtype.element_ty), mask=inside)


# Launchers ----------------------------------------------------------------------------------------------------------


def plan(
    x: Tensor, gate: QuantizedWeight, up: QuantizedWeight, out: Tensor, multiprocessors: int
) -> list[Launch] | None:
    """The launch that fills out (M, N) from x (M, K), whose columns are in the order of the stored ones.

    None where two products serve better or must: where `linear` would cut K into pieces, or the weights differ in how they
    are stored.
    """
    rows, (N, K) = x.shape[0], gate.shape
    config = tables.lookup_geglu(rows, N, x.dtype, gate.layout)
    if not gate.is_stored_like(up) or (rows <= DECODE_ROWS and tables.splits(N, K, config, multiprocessors) > 1):
        return None
    arguments: dict[str, Any] = {
        "x_ptr": values.taken_apart(x, gate), "out_ptr": out, "M": rows, "N": N,
        **values.arguments(gate, "gate_"), **values.arguments(up, "up_"),
    }  # fmt: skip
    grid = (triton.cdiv(N, config.outputs), triton.cdiv(rows, config.rows))
    constants = tile_constants(gate, config, x.dtype)
    return [Launch(geglu_kernel, grid, arguments, constants, config.warps, fusion(gate))]


def plan_combine(gate: Tensor, up: Tensor, out: Tensor) -> Launch:
    """The launch that combines two finished products, all dense (M, N)."""
    grid = (triton.cdiv(out.numel(), tables.COMBINE_ELEMENTS),)
    arguments = {"gate_ptr": gate, "up_ptr": up, "out_ptr": out, "COUNT": out.numel()}
    return Launch(combine_kernel, grid, arguments, {"BLOCK": tables.COMBINE_ELEMENTS}, num_warps=4)
