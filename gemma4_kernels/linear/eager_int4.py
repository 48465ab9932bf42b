"""PyTorch's own 4-bit product for CPUs, where it can hold a weight exactly.

`aten::_weight_int4pack_mm_for_cpu` takes x in bf16, codes repacked, and per group a scale s and a zero z in bf16. It computes,
in fp32 with one rounding, (q - 8) * s + z, and adds the products with x up in fp32. (PyTorch has vector code for bf16 only.)
A weight is held where these numbers are the weight's own:

    centred, zero 8   z = 0
    zeros             z = (8 - zero) * scale
    offsets           z = offset + 8 * scale

and where s and z have the 8 bits of a bf16. Numbers of 16 bits, such as the fp16 scales of Q4_0, are the sum of two bf16, and
the product is the sum of two products over the same codes, each rounded to bf16 before they are added.

The repacked codes are a copy, kept as long as the weight's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gemma4_kernels import environment
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.weight import QuantizedWeight

GROUPS = (32, 64, 128, 256)  # the group sizes that the op takes
OUTPUTS = 16  # N must be a multiple of it

# Most rows of x for which it is faster than making the weights once for all of them, with one product and with two.
MOST_ROWS = {1: 128, 2: 32}


class Packed(NamedTuple):
    """A weight as the op takes it."""

    codes: Tensor  # (N, K/2) uint8, in an order of the op's own
    scales_and_zeros: tuple[Tensor, ...]  # one or two of (G, N, 2) bf16, to be added up


class _Entry(NamedTuple):
    """What was packed, from what. Tensors that were replaced or changed in place are packed again."""

    packed: Packed | None
    beside: list[Tensor]
    """The tensors beside the codes. (The codes are the key: a reference to them here would keep the entry forever.)"""
    versions: list[int]
    """Of all tensors, the codes first."""


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor of codes


def refusal(x: Tensor, weight: QuantizedWeight, has_addend: bool = False) -> str | None:
    """Why the op cannot serve a product, or None. Packs the weight if it has not been yet.

    An addend is a bias or a residual.
    """
    if x.device.type != "cpu":
        return "is for CPUs"
    if not environment.packed_copies():
        return "GEMMA4_PACKED_COPIES=0 forbids the copy that it needs"
    if x.dtype != torch.bfloat16:
        return f"is fast for bfloat16 only, not for {str(x.dtype).removeprefix('torch.')}"
    if has_addend:
        return "would round before a bias or residual is added"
    if reason := _shape_refusal(weight):
        return reason
    packed = find(weight)
    if packed is None:
        return f"cannot hold these {weight.scheme} scales exactly"
    if x.shape[0] > (most := MOST_ROWS[len(packed.scales_and_zeros)]):
        return f"is slower beyond {most} rows"
    return None


def _shape_refusal(weight: QuantizedWeight) -> str | None:
    layout, (N, _) = weight.layout, weight.shape
    if layout.bits != 4 or layout.values == "table" or (layout.values == "centred" and layout.zero != 8):
        return f"has no values like those of {weight.scheme}"
    if weight.group_size not in GROUPS:
        return f"takes groups of {', '.join(map(str, GROUPS))}, not of {weight.group_size}"
    if N % OUTPUTS:
        return f"needs a multiple of {OUTPUTS} outputs, not {N}"
    return None


def find(weight: QuantizedWeight) -> Packed | None:
    """The packed form, made at the first call; None where the op cannot hold the weight."""
    codes, *beside = weight.tensors().values()
    versions = [0 if tensor.is_inference() else tensor._version for tensor in (codes, *beside)]
    entry: _Entry | None = _packed.get(codes)
    if (
        entry is None
        or entry.versions != versions
        or any(a is not b for a, b in zip(entry.beside, beside, strict=False))
    ):
        entry = _Entry(_pack(weight), beside, versions)
        _packed[codes] = entry
    return entry.packed


def forget(codes: Tensor) -> None:
    """Drop the packed form of a weight with these codes. Changes in place of inference tensors leave no other trace."""
    _packed.pop(codes, None)


def product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x (M, K) bf16, columns in the order of the stored ones -> (M, N) bf16, where `refusal` gives no reason."""
    packed = find(weight)
    assert packed is not None
    x = x.contiguous()
    out: Tensor | None = None
    for scales_and_zeros in packed.scales_and_zeros:
        part = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed.codes, weight.group_size, scales_and_zeros)
        out = part if out is None else out + part
    assert out is not None
    return out


def _pack(weight: QuantizedWeight) -> Packed | None:
    parts = _scales_and_zeros(weight)
    if parts is None:
        return None
    codes = planes.unpack(weight.codes, 4).int()  # (N, K)
    return Packed(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), parts)


def _scales_and_zeros(weight: QuantizedWeight) -> tuple[Tensor, ...] | None:
    scale = weight.group_scale().double()  # (N, G)
    if weight.layout.values == "offsets":
        zero = weight.group_offset().double() + 8 * scale
    elif weight.zeros is not None:
        zero = (8 - weight.zeros.double()) * scale
    else:
        zero = torch.zeros_like(scale)
    exact = torch.stack((scale, zero), dim=2)  # (N, G, 2) fp64
    upper = exact.bfloat16()
    rest = exact - upper.double()
    lower = rest.bfloat16()
    if not torch.equal(lower.double(), rest):
        return None
    ordered = tuple(part.transpose(0, 1).contiguous() for part in (upper, lower))  # (G, N, 2)
    if not rest.any():
        return ordered[:1]
    # Each of the two products makes fp32 weights of its own; those, and their sum, must need no rounding.
    for code in range(-8, 8):
        for scales_and_zeros in (exact, lower.double()):
            value = code * scales_and_zeros[:, :, 0] + scales_and_zeros[:, :, 1]
            if not torch.equal(value.float().double(), value):
                return None
    return ordered
