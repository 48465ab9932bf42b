"""x @ W.T from the codes of W: decode and verification in one launch or two, larger batches in tiles.

    x        (M, K), taken apart by column position: (PER_WORD, M, K / PER_WORD), see `values.py`
    W        N x K, a `QuantizedWeight`
    partial  (SPLITS, M, N) fp32, where K is split
    out      (M, N)

One program owns BLOCK_N rows of W and one piece of K, and reads each of its codes once for BLOCK_M rows of x. Weights are
made in registers, rounded to x's dtype (they are then the values of `weight.dequantize(x.dtype)`), and multiplied on
tensor cores with fp32 sums; they are the operand with the many rows, x the one with the few.

Up to DECODE_ROWS rows the configuration depends on N, K and the device only: pieces of K are fixed, and added in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.linear.triton import tables, values
from gemma4_kernels.linear.triton.values import load_tile, weights_at
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.triton_common.launch import Launch, dot_dtype
from gemma4_kernels.triton_common.rounding import operand, round_to, to_fp32


@triton.jit
def product_of_tile(
    x_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
    scale_table_ptr, scale_scales_ptr, scale_offset_ptr, n, m, M, N, begin, end,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M) fp32: outputs n of rows m, from the words begin up to end of every row of the weight."""
    IN_ROW: tl.constexpr = K // (4 if BITS == 8 else 8)
    row = tl.minimum(n, N - 1).to(tl.int64)  # beyond the weight its last row is read again, and not stored
    accumulated = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(begin, end, WORDS, num_stages=STAGES):
        word = first + tl.arange(0, WORDS)
        words, high, scale, shift = load_tile(
            codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr,
            scale_scales_ptr, scale_offset_ptr, row, n < N, first, word, K, GROUP, BITS, VALUES, SCALES, ZERO,
        )  # fmt: skip
        for position in tl.static_range(4 if BITS == 8 else 8):
            w = weights_at(words, high, scale, shift, word, position, table_ptr, BITS, VALUES)
            x = load_x(x_ptr, position, m, M, word, IN_ROW).to(DOT_DTYPE)  # (WORDS, BLOCK_M)
            accumulated = tl.dot(operand(w, DTYPE, DOT_DTYPE), x, accumulated, input_precision="ieee")
    return accumulated


@triton.jit
def load_x(x_ptr, position, m, M, word, IN_ROW: tl.constexpr):
    """(WORDS, BLOCK_M): x, taken apart, at one column position of every word."""
    x_row = x_ptr + (position * M + m).to(tl.int64) * IN_ROW  # (BLOCK_M,)
    return tl.load(x_row[None, :] + word[:, None], mask=(m < M)[None, :] & (word < IN_ROW)[:, None], other=0.0)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr, out_ptr, bias_ptr, residual_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr,
    table_ptr, scale_table_ptr, scale_scales_ptr, scale_offset_ptr, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of M, SPLITS). With SPLITS > 1, out is the partial sums; bias and residual come later."""
    IN_ROW: tl.constexpr = K // (4 if BITS == 8 else 8)
    # A piece is whole tiles of words; the last may be shorter.
    PIECE: tl.constexpr = ((IN_ROW + WORDS - 1) // WORDS + SPLITS - 1) // SPLITS * WORDS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(2) * PIECE
    accumulated = product_of_tile(
        x_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
        scale_table_ptr, scale_scales_ptr, scale_offset_ptr, n, m, M, N, begin, tl.minimum(begin + PIECE, IN_ROW),
        K, GROUP, BITS, VALUES, SCALES, ZERO, BLOCK_M, BLOCK_N, WORDS, STAGES, DTYPE, DOT_DTYPE,
    )  # fmt: skip
    out = out_ptr + (tl.program_id(2) * M + m).to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    if bias_ptr is not None:
        accumulated += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        accumulated += to_fp32(tl.load(residual_ptr + m.to(tl.int64)[None, :] * N + n[:, None], mask=mask, other=0.0))
    tl.store(out, round_to(accumulated, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def add_pieces_kernel(
    partial_ptr, out_ptr, bias_ptr, residual_ptr, M, N, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Grid (tiles of N, M): out = the pieces in their order, plus bias and residual, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1)
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += to_fp32(tl.load(residual_ptr + m.to(tl.int64) * N + n, mask=n < N, other=0.0))
    tl.store(out_ptr + m.to(tl.int64) * N + n, round_to(total, out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def dequantize_kernel(
    out_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
    scale_table_ptr, scale_scales_ptr, scale_offset_ptr, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of words): out (N, K), the stored columns in their order."""
    PER_WORD: tl.constexpr = 4 if BITS == 8 else 8
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (n < N)[:, None] & (word < K // PER_WORD)[None, :]
    words, high, scale, shift = load_tile(
        codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr, scale_scales_ptr,
        scale_offset_ptr, row, n < N, tl.program_id(1) * WORDS, word, K, GROUP, BITS, VALUES, SCALES, ZERO,
    )  # fmt: skip
    for position in tl.static_range(PER_WORD):
        w = weights_at(words, high, scale, shift, word, position, table_ptr, BITS, VALUES)
        place = out_ptr + row[:, None] * K + (word * PER_WORD + position)[None, :]
        tl.store(place, round_to(w, out_ptr.dtype.element_ty), mask=inside)


# Launchers ----------------------------------------------------------------------------------------------------------


def plan(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor, multiprocessors: int, residual: Tensor | None = None
) -> list[Launch]:  # fmt: skip
    """The launches that fill out (M, N) from x (M, K), whose columns are in the order of the stored ones.

    The bias and the residual (M, N) are contiguous.
    """
    rows, (N, K) = x.shape[0], weight.shape
    config = tables.lookup(rows, N, x.dtype)
    splits = tables.splits(N, K, config, multiprocessors) if rows <= DECODE_ROWS else 1
    target = out if splits == 1 else out.new_empty((splits, rows, N), dtype=torch.float32)
    arguments: dict[str, Any] = {
        "x_ptr": values.taken_apart(x, weight), "out_ptr": target, "bias_ptr": bias if splits == 1 else None,
        "residual_ptr": residual if splits == 1 else None, "M": rows, "N": N, **values.arguments(weight),
    }  # fmt: skip
    constants = {**tile_constants(weight, config, x.dtype), "SPLITS": splits}
    grid = (triton.cdiv(N, config.outputs), triton.cdiv(rows, config.rows), splits)
    launches = [Launch(linear_kernel, grid, arguments, constants, config.warps, fusion(weight))]
    if splits > 1:
        launches.append(
            Launch(
                add_pieces_kernel,
                (triton.cdiv(N, tables.ADD_OUTPUTS), rows),
                {"partial_ptr": target, "out_ptr": out, "bias_ptr": bias, "residual_ptr": residual, "M": rows, "N": N},
                {"SPLITS": splits, "BLOCK_N": tables.ADD_OUTPUTS},
                num_warps=4,
            )
        )
    return launches


def plan_dequantize(weight: QuantizedWeight, out: Tensor) -> Launch:
    """The launch that fills out (N, K) with the weight's values; stored columns, in their order."""
    (N, K), block = weight.shape, tables.DEQUANTIZE
    per_word = 4 if weight.layout.bits == 8 else 8
    grid = (triton.cdiv(N, block.outputs), triton.cdiv(K // per_word, block.words))
    constants = {**values.constants(weight), "BLOCK_N": block.outputs, "WORDS": block.words}
    arguments = {"out_ptr": out, "N": N, **values.arguments(weight)}
    return Launch(dequantize_kernel, grid, arguments, constants, block.warps, fusion(weight))


def tile_constants(weight: QuantizedWeight, config: tables.Config, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel that multiplies is compiled for: the weight's layout, a tile's sizes, x's dtype."""
    return {
        **values.constants(weight), "BLOCK_M": config.rows, "BLOCK_N": config.outputs, "WORDS": config.words,
        "STAGES": config.stages, "DTYPE": _element(dtype), "DOT_DTYPE": dot_dtype(dtype),
    }  # fmt: skip


def fusion(weight: QuantizedWeight) -> bool:
    """Whether multiply-adds may be fused: where a product is exact in fp32, or there is no sum behind it."""
    wide = weight.layout.values == "offsets" and weight.scales.dtype == torch.float32
    return not (wide or weight.layout.scales == "nested")


def _element(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
