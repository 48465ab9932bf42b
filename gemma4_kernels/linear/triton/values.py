"""From codes to weights, in registers: what every kernel of this family reads a `QuantizedWeight` with.

A tile holds ROWS rows of the weight and as many 32-bit words of codes. A word holds PER_WORD neighbouring columns (8 codes of 4
bits, whatever their upper bits, or 4 codes of 8), and a kernel takes the words' columns one position at a time: position c
of all words of the tile are the columns PER_WORD * word + c. So nothing is ever reshuffled: a shift and a mask make a tile
of codes, and it has the shape and the place of the tile of words.

Scales and offsets are made once for a tile, in fp32, in the order that `QuantizedWeight` defines; they serve all positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from gemma4_kernels.linear.weight import TENSORS, QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

SUPER_BLOCK = tl.constexpr(256)  # columns of one outer scale; groups of one scale of nested scales


def arguments(weight: QuantizedWeight, prefix: str = "") -> dict[str, Any]:
    """The tensors of a weight, as parameters of a kernel; those that its layout does not have are None.

    The prefix tells two weights of one kernel apart: "gate_".
    """
    return {f"{prefix}{name}_ptr": getattr(weight, name) for name in TENSORS if name != "columns"}


def constants(weight: QuantizedWeight) -> dict[str, Any]:
    layout = weight.layout
    return {
        "K": weight.shape[1], "GROUP": weight.group_size, "BITS": layout.bits, "VALUES": layout.values,
        "SCALES": layout.scales, "ZERO": layout.zero,
    }  # fmt: skip


def taken_apart(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x (M, K) by column position: (PER_WORD, M, K / PER_WORD), dense."""
    per_word = 4 if weight.layout.bits == 8 else 8
    apart: Tensor = x.unflatten(1, (x.shape[1] // per_word, per_word))
    return apart.permute(2, 0, 1).contiguous()


@triton.jit
def load_tile(
    codes_ptr, high_ptr, scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr, scale_scales_ptr,
    scale_offset_ptr, row, is_row, first, word, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    VALUES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """(words, high, scale, shift), each (ROWS, WORDS): all that `weights_at` needs of the rows and words of a tile.

    Nothing is read of a row that is not `is_row`, nor of a word behind the end of a row. `first` is the tile's first word.
    """
    inside = is_row[:, None] & (word < K // (4 if BITS == 8 else 8))[None, :]
    words = load_words(codes_ptr, row, word, inside, K, BITS)
    high = load_high(high_ptr, row, word, inside, K, BITS)
    scale, shift = load_scales(
        scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr, scale_scales_ptr, scale_offset_ptr,
        row, is_row, first, word, inside, K, GROUP, BITS, VALUES, SCALES, ZERO,
    )  # fmt: skip
    return words, high, scale, shift


@triton.jit
def load_words(codes_ptr, row, word, inside, K: tl.constexpr, BITS: tl.constexpr):
    """(ROWS, WORDS) int32 of the rows (ROWS,) int64 and words (WORDS,); `inside` (ROWS, WORDS)."""
    if BITS == 8:
        words = codes_ptr.to(tl.pointer_type(tl.int32)) + row[:, None] * (K // 4) + word[None, :]
    else:
        words = codes_ptr + row[:, None] * (K // 8) + word[None, :]
    return tl.load(words, mask=inside, other=0)


@triton.jit
def load_high(high_ptr, row, word, inside, K: tl.constexpr, BITS: tl.constexpr):
    """(ROWS, WORDS) int32: the word of upper bits that belongs to each word of codes; zeros where there are none."""
    if BITS == 5:
        return tl.load(high_ptr + row[:, None] * (K // 32) + (word // 4)[None, :], mask=inside, other=0)
    elif BITS == 6:
        return tl.load(high_ptr + row[:, None] * (K // 16) + (word // 2)[None, :], mask=inside, other=0)
    else:
        return tl.zeros([row.shape[0], word.shape[0]], tl.int32)


@triton.jit
def codes_at(words, high, word, POSITION: tl.constexpr, BITS: tl.constexpr):
    """(ROWS, WORDS) int32: the codes of one column position of every word."""
    if BITS == 8:
        return (words << (24 - 8 * POSITION)) >> 24
    else:
        code = (words >> (16 * (POSITION % 2) + 4 * (POSITION // 2))) & 15
        if BITS == 5:
            bit = 16 * (POSITION % 2) + 4 * (word % 4) + POSITION // 2
            code = code | (((high >> bit[None, :]) & 1) << 4)
        if BITS == 6:
            bit = 16 * (POSITION % 2) + 8 * (word % 2) + 2 * (POSITION // 2)
            code = code | (((high >> bit[None, :]) & 3) << 4)
        return code


@triton.jit
def load_scales(
    scales_ptr, offsets_ptr, zeros_ptr, group_scales_ptr, scale_table_ptr, scale_scales_ptr, scale_offset_ptr,
    row, is_row, first, word, inside, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    SCALES: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """(scale, shift), both (ROWS, WORDS) fp32. The shift is the zero point of codes or the offset of values, as VALUES says.

    `first` is the tile's first word: its columns lie within one block of SUPER_BLOCK, so outer scales are one a row.
    """
    GROUPS: tl.constexpr = K // GROUP
    column = word * (4 if BITS == 8 else 8)
    group = row[:, None] * GROUPS + (column // GROUP)[None, :]
    outer = row * (K // SUPER_BLOCK) + first * (4 if BITS == 8 else 8) // SUPER_BLOCK  # (ROWS,)
    shift = tl.zeros([row.shape[0], word.shape[0]], tl.float32) + ZERO
    if SCALES == "plain":
        scale = tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
        if VALUES == "offsets":
            shift = tl.load(offsets_ptr + group, mask=inside, other=0.0).to(tl.float32)
    elif SCALES == "int8":
        scale = tl.load(scales_ptr + outer, mask=is_row, other=0.0).to(tl.float32)[:, None]
        scale = scale * tl.load(group_scales_ptr + group, mask=inside, other=0).to(tl.float32)
    elif SCALES == "six_bit":
        place = (column // GROUP) % 8
        low = tl.load(group_scales_ptr + outer * 3, mask=is_row, other=0)[:, None]
        middle = tl.load(group_scales_ptr + outer * 3 + 1, mask=is_row, other=0)[:, None]
        upper = tl.load(group_scales_ptr + outer * 3 + 2, mask=is_row, other=0)[:, None]
        code = ((low >> (4 * place)[None, :]) & 15) + 16 * ((upper >> (2 * place)[None, :]) & 3)
        scale = tl.load(scales_ptr + outer, mask=is_row, other=0.0).to(tl.float32)[:, None] * code.to(tl.float32)
        code = ((middle >> (4 * place)[None, :]) & 15) + 16 * ((upper >> (16 + 2 * place)[None, :]) & 3)
        # Times -1, because Triton's minus is 0 - x, which loses the sign of a zero.
        shift = (
            -1.0 * tl.load(offsets_ptr + outer, mask=is_row, other=0.0).to(tl.float32)[:, None] * code.to(tl.float32)
        )
    elif SCALES == "e8m0":
        scale = tl.exp2(tl.load(scales_ptr + group, mask=inside, other=0).to(tl.float32) - 128)
    else:  # nested
        index = tl.load(scales_ptr + group, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_table_ptr + index) * tl.load(
            scale_scales_ptr + group // SUPER_BLOCK, mask=inside, other=0.0
        )
        scale = scale + tl.load(scale_offset_ptr)
    if VALUES == "zeros":
        shift = tl.load(zeros_ptr + group, mask=inside, other=0).to(tl.float32)
    return scale, shift


@triton.jit
def weights_at(
    words, high, scale, shift, word, POSITION: tl.constexpr, table_ptr, BITS: tl.constexpr, VALUES: tl.constexpr
):
    """(ROWS, WORDS) fp32 weights of one column position of every word."""
    code = codes_at(words, high, word, POSITION, BITS)
    if VALUES == "table":
        return scale * tl.load(table_ptr + code)
    elif VALUES == "offsets":
        return scale * code.to(tl.float32) + shift
    else:
        return scale * (code.to(tl.float32) - shift)
