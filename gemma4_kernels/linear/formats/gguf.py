"""GGUF tensors: rows of blocks, each with its scales in front of or behind its codes.

The blocks are those of ggml (ggml-common.h and ggml-quants.c), named as there. A reader gets blocks (rows, blocks of a row,
bytes of a block) and gives the codes in the order of the columns, and the other fields as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import FormatError, ShapeError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.schemes import SCHEMES, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_gguf"

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 of the OCP Microscaling specification, doubled, beside half the scale, as in ggml: small integers. -0 is stored as 0.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
TABLES = {"IQ4_NL": IQ4_VALUES, "IQ4_XS": IQ4_VALUES, "MXFP4": MXFP4_VALUES}


class Block(NamedTuple):
    """One type of ggml."""

    values: int
    bytes: int
    read: Callable[[Tensor], dict[str, Tensor]]
    """blocks uint8 (rows, B, bytes) -> codes uint8 (rows, B, values), and fields (rows, B * anything)."""


def read(data: Tensor, type_name: str, shape: tuple[int, int]) -> Parts:
    """See `QuantizedWeight.from_gguf`."""
    if type_name not in BLOCKS:
        raise FormatError(f"{FUNCTION}: {refusal(type_name)}")
    block = BLOCKS[type_name]
    shape = (int(shape[0]), int(shape[1])) if len(shape) == 2 else shape
    group_size = SCHEMES[type_name].group_sizes[0]
    check_sizes(FUNCTION, type_name, shape, group_size)
    N, K = shape
    checks.has_shape(FUNCTION, "data", data, (N, "bytes of a row"))
    checks.has_dtype(FUNCTION, "data", data, (torch.uint8,))
    row_bytes = K // block.values * block.bytes
    if data.shape[1] != row_bytes:
        raise ShapeError(f"{FUNCTION}: data has {data.shape[1]} bytes a row, {type_name} of K = {K} needs {row_bytes}")

    def convert(first: int, last: int) -> dict[str, Tensor]:
        fields = block.read(data[first:last].reshape(last - first, -1, block.bytes))
        codes = fields.pop("codes").reshape(last - first, K)
        bits = SCHEMES[type_name].bits
        packed = {"codes": codes.view(torch.int8)} if bits == 8 else planes.split(codes, bits)
        return packed | fields

    tensors = planes.by_rows(N, row_bytes, convert)
    if type_name in TABLES:
        tensors["table"] = torch.tensor(TABLES[type_name], dtype=torch.float32, device=data.device)
    return Parts(type_name, shape, group_size, tensors)


def refusal(type_name: str) -> str:
    """Why a type is not read, and what to use instead."""
    if not isinstance(type_name, str):
        return f"type_name must be a string such as 'Q4_K', got {type_name!r}"
    if type_name in ("F32", "F16", "BF16"):
        return f"{type_name} is not quantised; make a tensor of it, or quantise it with QuantizedWeight.quantize"
    if type_name.startswith(("EXL", "exl")):
        return f"{type_name} is not a type of GGUF and is not read; use a Q4_0 or Q4_K_M file of the same model"
    return (
        f"type {type_name} is not read; use a Q4_0, Q4_K_M or Q8_0 file of the same model "
        f"(read are {', '.join(BLOCKS)})"
    )


# Pieces of blocks ----------------------------------------------------------------------------------------------------


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 at byte `start` of each block: (rows, B)."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16)[:, :, 0]


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Runs of `run` bytes: the low nibbles of a run, then its high nibbles. (rows, B, bytes) -> (rows, B, 2 * bytes)."""
    runs = packed.unflatten(2, (-1, 1, run))
    return torch.cat(planes.nibbles(runs), dim=3).flatten(2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """32 bits, from the lowest: (rows, B, 4) -> (rows, B, 32), moved to bit 4."""
    step = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, :, :, None] >> step) & 1) << 4).flatten(2)


# Types with 32 values a block ---------------------------------------------------------------------------------------


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[:, :, 2:], 16), "scales": _halves(blocks, 0)}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[:, :, 4:], 16), "scales": _halves(blocks, 0), "offsets": _halves(blocks, 2)}


def _q5_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[:, :, 6:], 16) | _fifth_bits(blocks[:, :, 2:6]), "scales": _halves(blocks, 0)}


def _q5_1(blocks: Tensor) -> dict[str, Tensor]:
    codes = _nibbles(blocks[:, :, 8:], 16) | _fifth_bits(blocks[:, :, 4:8])
    return {"codes": codes, "scales": _halves(blocks, 0), "offsets": _halves(blocks, 2)}


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": blocks[:, :, 2:], "scales": _halves(blocks, 0)}


def _mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[:, :, 1:], 16), "scales": blocks[:, :, 0]}


# Types with 256 values a block --------------------------------------------------------------------------------------


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[:, :, 16:], 32), **_k_scales(blocks)}


def _q5_k(blocks: Tensor) -> dict[str, Tensor]:
    # Bit j of byte l is the fifth bit of column 32 * j + l.
    step = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (((blocks[:, :, None, 16:48] >> step) & 1) << 4).flatten(2)
    return {"codes": _nibbles(blocks[:, :, 48:], 32) | fifth, **_k_scales(blocks)}


def _k_scales(blocks: Tensor) -> dict[str, Tensor]:
    """d and dmin, and the 96 bits of the eight 6-bit scales and minima in the order of `QuantizedWeight`."""
    first, second, third = blocks[:, :, 4:16].unflatten(2, (3, 4)).unbind(2)  # (rows, B, 4) each
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=2)  # (rows, B, 8)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=2)
    low = torch.stack((scale, minimum), dim=2) & 15  # (rows, B, 2, 8)
    upper = torch.cat((scale, minimum), dim=2) >> 4  # (rows, B, 16)
    words = torch.cat((_in_order(low, 4), _in_order(upper[:, :, None], 2)), dim=2)[..., 0]  # (rows, B, 3)
    return {"scales": _halves(blocks, 0), "offsets": _halves(blocks, 2), "group_scales": words}


def _in_order(values: Tensor, bits: int) -> Tensor:
    """Values of a few bits, from the lowest bit of each int32 word: (..., 32 / bits) uint8 -> (..., 1) int32."""
    fields = values.unflatten(-1, (4, 8 // bits))
    packed: Tensor = fields[..., 0].clone()
    for t in range(1, 8 // bits):
        packed |= fields[..., t] << (bits * t)
    return packed.contiguous().view(torch.int32)


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    # Both halves of 128 columns: four runs of 32, whose upper two bits lie in the same 32 bytes.
    low = _nibbles(blocks[:, :, :128], 64)
    step = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    upper = (blocks[:, :, 128:192].unflatten(2, (2, 1, 32)) >> step) & 3  # (rows, B, 2, 4, 32)
    inner = blocks[:, :, 192:208].contiguous().view(torch.int8).flatten(1)
    return {"codes": low | (upper << 4).flatten(2), "scales": _halves(blocks, 208), "group_scales": inner}


def _iq4_xs(blocks: Tensor) -> dict[str, Tensor]:
    step = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    upper = ((blocks[:, :, 2:4, None] >> step) & 3).flatten(2)  # (rows, B, 8)
    low = torch.stack(planes.nibbles(blocks[:, :, 4:8]), dim=3).flatten(2)  # (rows, B, 8)
    inner = (low | (upper << 4)).view(torch.int8) - 32
    return {"codes": _nibbles(blocks[:, :, 8:], 16), "scales": _halves(blocks, 0), "group_scales": inner.flatten(1)}


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1),
    "Q8_0": Block(32, 34, _q8_0),
    "Q4_K": Block(256, 144, _q4_k),
    "Q5_K": Block(256, 176, _q5_k),
    "Q6_K": Block(256, 210, _q6_k),
    "IQ4_NL": Block(32, 18, _q4_0),
    "IQ4_XS": Block(256, 136, _iq4_xs),
    "MXFP4": Block(32, 17, _mxfp4),
}
