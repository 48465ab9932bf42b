"""Rows of a quantised weight by token id: the embedding of a model whose head and embedding are one tensor.

    ids  (T,) int32 or int64
    out  (T, K), the bits of `weight.dequantize(dtype)[ids]`

One program makes a tile of words of a few rows. An id that is no row of the weight cannot be refused without waiting for
the device: nothing is read for it, and its row of the result is NaN.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.linear.triton import tables, values
from gemma4_kernels.linear.triton.linear import fusion
from gemma4_kernels.linear.triton.values import load_tile, weights_at
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.triton_common.rounding import round_to


@triton.jit(do_not_specialize=["T"])
def embedding_kernel(
    ids_ptr, out_ptr, columns_ptr, codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, table_ptr,
    scale_table_ptr, scale_scales_ptr, scale_offset_ptr, T, N,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T, tiles of words)."""
    PER_WORD: tl.constexpr = 4 if BITS == 8 else 8
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(ids_ptr + t, mask=t < T, other=-1).to(tl.int64)
    exists = (token >= 0) & (token < N)
    row = tl.where(exists, token, 0)
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    words, high, scale, shift = load_tile(
        codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr, scale_scales_ptr,
        scale_offset_ptr, row, exists, first, word, K, GROUP, BITS, VALUES, SCALES, ZERO,
    )  # fmt: skip
    for position in tl.static_range(PER_WORD):
        w = weights_at(words, high, scale, shift, word, position, table_ptr, BITS, VALUES)
        w = tl.where(exists[:, None], w, float("nan"))
        column = word * PER_WORD + position
        if columns_ptr is not None:
            column = tl.load(columns_ptr + column, mask=column < K, other=0)
        place = out_ptr + t.to(tl.int64)[:, None] * K + column[None, :]
        mask = (t < T)[:, None] & (word < K // PER_WORD)[None, :]
        tl.store(place, round_to(w, out_ptr.dtype.element_ty), mask=mask)


def plan(ids: Tensor, weight: QuantizedWeight, out: Tensor) -> Launch:
    """The launch that fills out (T, K), its columns in their own order, with the rows that ids (T,), dense, name."""
    (N, K), block = weight.shape, tables.EMBEDDING
    per_word = 4 if weight.layout.bits == 8 else 8
    grid = (triton.cdiv(ids.shape[0], block.rows), triton.cdiv(K // per_word, block.words))
    arguments: dict[str, Any] = {
        "ids_ptr": ids, "out_ptr": out, "columns_ptr": weight.columns, "T": ids.shape[0], "N": N,
        **values.arguments(weight),
    }  # fmt: skip
    constants = {**values.constants(weight), "BLOCK_T": block.rows, "WORDS": block.words}
    return Launch(embedding_kernel, grid, arguments, constants, block.warps, fusion(weight))
