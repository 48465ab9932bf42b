"""The schemes of `QuantizedWeight` as data: how many bits a code has, and how scale, code and offset make a value.

A source format maps onto one of few layouts. A layout is a choice of three things:

    bits     4, 5, 6 or 8 bits a code
    values   what the scale is multiplied with
               "centred"  q - zero, with one zero for the whole weight (a number of the layout)
               "zeros"    q - zeros[n, j], with a zero point for each group
               "offsets"  q, and an offset of the group is added afterwards
               "table"    table[q], with 16 entries
    scales   how the scale of a group is stored
               "plain"    one float for each group
               "int8"     a float for 256 values times an int8 for each group
               "six_bit"  a float for 256 values times a 6-bit code for each group; the offsets likewise
               "e8m0"     a power of two as one byte for each group
               "nested"   a byte for each group, looked up in a table of 256, times a float for 256 groups, plus a constant

`QuantizedWeight` says which tensors hold these and how their bits lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.checks import ShapeError

SUPER_BLOCK = 256
"""Values that share the outer scale of "int8" and "six_bit", and groups that share one of "nested"."""

HALF = (torch.float16,)
SINGLE = (torch.float32,)
ANY = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Layout:
    """How the values of one scheme are made. See the docstring of the module."""

    bits: int
    values: str
    scales: str = "plain"
    zero: int = 0
    group_sizes: tuple[int, ...] = (32,)
    """Empty: any size that divides K."""
    scale_dtypes: tuple[torch.dtype, ...] = HALF


SCHEMES: dict[str, Layout] = {
    # GGUF, by the names of ggml's types.
    "Q4_0": Layout(4, "centred", zero=8),
    "Q4_1": Layout(4, "offsets"),
    "Q5_0": Layout(5, "centred", zero=16),
    "Q5_1": Layout(5, "offsets"),
    "Q8_0": Layout(8, "centred"),
    "Q4_K": Layout(4, "offsets", "six_bit"),
    "Q5_K": Layout(5, "offsets", "six_bit"),
    "Q6_K": Layout(6, "centred", "int8", zero=32, group_sizes=(16,)),
    "IQ4_NL": Layout(4, "table"),
    "IQ4_XS": Layout(4, "table", "int8"),
    "MXFP4": Layout(4, "table", "e8m0", scale_dtypes=(torch.uint8,)),
    # compressed-tensors pack-quantized, AutoGPTQ and GPTQModel, AutoAWQ.
    "W4A16": Layout(4, "centred", zero=8, group_sizes=(), scale_dtypes=ANY),
    "W4A16_ASYM": Layout(4, "zeros", group_sizes=(), scale_dtypes=ANY),
    "GPTQ": Layout(4, "zeros", group_sizes=(), scale_dtypes=ANY),
    "AWQ": Layout(4, "zeros", group_sizes=(), scale_dtypes=ANY),
    # bitsandbytes; nested is what its configuration calls double quantisation.
    "NF4": Layout(4, "table", group_sizes=(), scale_dtypes=SINGLE),
    "FP4": Layout(4, "table", group_sizes=(), scale_dtypes=SINGLE),
    "NF4_NESTED": Layout(4, "table", "nested", group_sizes=(), scale_dtypes=(torch.uint8,)),
    "FP4_NESTED": Layout(4, "table", "nested", group_sizes=(), scale_dtypes=(torch.uint8,)),
    "MLX": Layout(4, "offsets", group_sizes=(32, 64, 128), scale_dtypes=ANY),
}


class Parts(NamedTuple):
    """What a format reader hands to `QuantizedWeight`: its fields of the same names."""

    scheme: str
    shape: tuple[int, int]
    group_size: int
    tensors: dict[str, Tensor]


def expected_tensors(
    layout: Layout, shape: tuple[int, int], group_size: int
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """The tensors that a weight of this layout must have: shape and allowed dtypes, by the name of the field."""
    N, K = shape
    groups = K // group_size
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    if layout.bits == 8:
        expected["codes"] = ((N, K), (torch.int8,))
    else:
        expected["codes"] = ((N, K // 8), (torch.int32,))
        if layout.bits > 4:
            expected["high"] = ((N, K * (layout.bits - 4) // 32), (torch.int32,))
    outer = K // SUPER_BLOCK if layout.scales in ("int8", "six_bit") else groups
    expected["scales"] = ((N, outer), layout.scale_dtypes)
    if layout.values == "offsets":
        expected["offsets"] = ((N, outer), layout.scale_dtypes)
    if layout.values == "zeros":
        expected["zeros"] = ((N, groups), (torch.uint8,))
    if layout.values == "table":
        expected["table"] = ((16,), SINGLE)
    if layout.scales == "int8":
        expected["group_scales"] = ((N, groups), (torch.int8,))
    if layout.scales == "six_bit":
        expected["group_scales"] = ((N, outer, 3), (torch.int32,))
    if layout.scales == "nested":
        expected["scale_table"] = ((SUPER_BLOCK,), SINGLE)
        expected["scale_scales"] = ((-(-N * groups // SUPER_BLOCK),), SINGLE)
        expected["scale_offset"] = ((1,), SINGLE)
    return expected


def check_sizes(function: str, scheme: str, shape: tuple[int, int], group_size: int) -> None:
    """N >= 1, K a multiple of 32 and of the group, and a group size that the scheme has."""
    if len(shape) != 2 or any(type(size) is not int for size in shape):
        raise ShapeError(f"{function}: shape must be two integers (N, K), got {shape}")
    N, K = shape
    if N < 1 or K < 32 or K % 32:
        raise ShapeError(f"{function}: shape must have N >= 1 and K a positive multiple of 32, got ({N}, {K})")
    layout = SCHEMES[scheme]
    if layout.group_sizes and group_size not in layout.group_sizes:
        sizes = " or ".join(map(str, layout.group_sizes))
        raise ShapeError(f"{function}: groups of {scheme} have {sizes} columns, got {group_size}")
    if type(group_size) is not int or group_size < 1 or K % group_size:
        raise ShapeError(f"{function}: group_size must divide K = {K}, got {group_size}")
    if layout.scales in ("int8", "six_bit") and K % SUPER_BLOCK:
        raise ShapeError(f"{function}: {scheme} needs K to be a multiple of {SUPER_BLOCK}, got {K}")
