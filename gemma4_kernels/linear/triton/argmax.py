"""The largest logit of every row of x @ W.T, without the logits in memory: greedy decoding's last step.

    x        (M, K), taken apart by column position, as `linear` takes it
    W        N x K, a `QuantizedWeight`: the head
    largest  (TILES, M) fp32, the largest logit of each tile of BLOCK_N outputs; indices (TILES, M) int32, its lowest index
    out      (M,) int64

Logits are summed in fp32 in the order of `linear`, without pieces of K, and rounded to x's dtype before they are compared:
the answer is that of the product's argmax, ties to the lowest index. A row with a NaN among its logits gives -1, one of
nothing but -inf gives 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.linear.triton import tables, values
from gemma4_kernels.linear.triton.linear import fusion, product_of_tile, tile_constants
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.triton_common.rounding import operand

# Larger than any index, so that it never is the lowest.
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def largest_of_tile(value, index):
    """(largest value, its lowest index) along the first axis of value; (NaN, -1) where there is a NaN.

    `index` has the shape of value, or one that spreads to it.
    """
    has_nan = tl.max((value != value).to(tl.int32), axis=0) > 0
    largest = tl.max(tl.where(value != value, float("-inf"), value), axis=0)
    lowest = tl.min(tl.where(value == tl.expand_dims(largest, 0), index, NOWHERE), axis=0)
    return tl.where(has_nan, float("nan"), largest), tl.where(has_nan, -1, lowest)


@triton.jit(do_not_specialize=["M"])
def argmax_kernel(
    x_ptr, largest_ptr, indices_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
    scale_table_ptr, scale_scales_ptr, scale_offset_ptr, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of M)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    accumulated = product_of_tile(
        x_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
        scale_table_ptr, scale_scales_ptr, scale_offset_ptr, n, m, M, N, 0, K // (4 if BITS == 8 else 8),
        K, GROUP, BITS, VALUES, SCALES, ZERO, BLOCK_M, BLOCK_N, WORDS, STAGES, DTYPE, DOT_DTYPE,
    )  # fmt: skip
    logits = operand(accumulated, DTYPE, tl.float32)  # rounded, (BLOCK_N, BLOCK_M)
    # Outputs that do not exist lose, and ties too: they stand last in their tile.
    logits = tl.where((n < N)[:, None], logits, float("-inf"))
    largest, index = largest_of_tile(logits, n[:, None])
    place = tl.program_id(0).to(tl.int64) * M + m
    tl.store(largest_ptr + place, largest, mask=m < M)
    tl.store(indices_ptr + place, index, mask=m < M)


@triton.jit(do_not_specialize=["M", "TILES"])
def largest_of_tiles_kernel(largest_ptr, indices_ptr, out_ptr, M, TILES, BLOCK: tl.constexpr):
    """Grid (M,): the largest of a row's tiles, the first of equal ones. Lane i looks at tiles i, i + BLOCK and so on."""
    m = tl.program_id(0)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.full([BLOCK], NOWHERE, tl.int32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, TILES, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        place = tile.to(tl.int64) * M + m
        value = tl.load(largest_ptr + place, mask=tile < TILES, other=float("-inf"))
        found = tl.load(indices_ptr + place, mask=tile < TILES, other=NOWHERE)
        wins = (value > largest) | ((value == largest) & (found < index))
        largest, index = tl.where(wins, value, largest), tl.where(wins, found, index)
        has_nan |= (value != value).to(tl.int32)
    _, lowest = largest_of_tile(largest, index)
    tl.store(out_ptr + m, tl.where(tl.max(has_nan, axis=0) > 0, -1, lowest).to(tl.int64))


# Launcher -----------------------------------------------------------------------------------------------------------


def plan(x: Tensor, weight: QuantizedWeight, out: Tensor, multiprocessors: int) -> list[Launch] | None:
    """The launches that fill out (M,) from x (M, K), whose columns are in the order of the stored ones.

    None where `linear` would cut K into pieces: the weight has few outputs then, and their logits are small.
    """
    rows, (N, K) = x.shape[0], weight.shape
    config = tables.lookup(rows, N, x.dtype)
    if rows <= DECODE_ROWS and tables.splits(N, K, config, multiprocessors) > 1:
        return None
    tiles = triton.cdiv(N, config.outputs)
    largest, indices = x.new_empty((tiles, rows), dtype=torch.float32), x.new_empty((tiles, rows), dtype=torch.int32)
    arguments: dict[str, Any] = {
        "x_ptr": values.taken_apart(x, weight), "largest_ptr": largest, "indices_ptr": indices, "M": rows, "N": N,
        **values.arguments(weight),
    }  # fmt: skip
    grid = (tiles, triton.cdiv(rows, config.rows))
    constants = tile_constants(weight, config, x.dtype)
    over_tiles = {"largest_ptr": largest, "indices_ptr": indices, "out_ptr": out, "M": rows, "TILES": tiles}
    return [
        Launch(argmax_kernel, grid, arguments, constants, config.warps, fusion(weight)),
        Launch(largest_of_tiles_kernel, (rows,), over_tiles, {"BLOCK": tables.ARGMAX_TILES}, num_warps=4),
    ]
