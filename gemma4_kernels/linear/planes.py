"""Codes as planes of bits in 32-bit words, and back: the order in which a tensor-core kernel reads them.

A plane of b bits (1, 2 or 4) puts n = 32 / b neighbours of a row into one word. Of these, element k stands at bit

    16 * (k % 2) + b * (k // 2)

so the even elements fill the low half of the word and the odd elements the high half. One shift and one mask,
(word >> b * i) & 0x000F000F for b = 4, then give elements 2i and 2i + 1 in the two halves of a register, which is how
a matrix instruction wants a pair of 16-bit values. Rows of K % 32 == 0 codes are whole words, and 16-byte aligned for b = 4.

5-bit codes are a plane of their low 4 bits and one of their fifth bit; 6-bit codes likewise with 2 bits.

The words are assembled from bytes, which assumes a little-endian host, like every format that is read here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS_BYTES = 1 << 21
"""Conversions go over this many bytes of rows at a time: their temporaries stay in the cache, and small beside a weight."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (N, K) uint8, each below 2**bits, as int32 (N, K * bits / 32); bits is 1, 2 or 4."""
    N = codes.shape[0]
    eight = dense(codes).view(torch.int64)  # (N, K/8), a code to a byte
    even, odd = _close_up(eight, bits), _close_up(eight >> 8, bits)
    fours = even | (odd << 16)  # each half holds four codes, in its lowest bits
    parts = fours.view(N, -1, 4 // bits)  # (N, words, eights of a word)
    words = parts[:, :, 0].clone()
    for i in range(1, 4 // bits):
        words |= parts[:, :, i] << (4 * bits * i)
    return words.to(torch.int32)  # wraps: the upper half may set the sign


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: words int32 (N, W) as codes uint8 (N, W * 32 / bits)."""
    wide = words.to(torch.int64)
    four_codes = (1 << 4 * bits) - 1
    eights = []
    for i in range(4 // bits):
        even = (wide >> (4 * bits * i)) & four_codes
        odd = (wide >> (4 * bits * i + 16)) & four_codes
        eights.append(_spread(even, bits) | (_spread(odd, bits) << 8))
    return torch.stack(eights, dim=2).flatten(1).view(torch.uint8)


def _close_up(eight: Tensor, bits: int) -> Tensor:
    """int64: the codes in bytes 0, 2, 4 and 6, moved together into the lowest bits. Other bytes are ignored."""
    field = (1 << bits) - 1
    fours = eight & (field * 0x0001_0001_0001_0001)
    fours |= fours >> (16 - bits)
    fours &= ((1 << 2 * bits) - 1) * 0x0000_0001_0000_0001
    fours |= fours >> (32 - 2 * bits)
    return fours.bitwise_and_((1 << 4 * bits) - 1)


def _spread(fours: Tensor, bits: int) -> Tensor:
    """The inverse of `_close_up`, with zeros in the other bytes."""
    apart = fours | (fours << (32 - 2 * bits))
    apart &= ((1 << 2 * bits) - 1) * 0x0000_0001_0000_0001
    apart |= apart << (16 - bits)
    return apart.bitwise_and_(((1 << bits) - 1) * 0x0001_0001_0001_0001)


def split(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """codes (N, K) uint8 of 4, 5 or 6 bits as the fields `codes` and, above 4 bits, `high` of a QuantizedWeight."""
    if bits == 4:
        return {"codes": pack(codes, 4)}
    return {"codes": pack(codes & 15, 4), "high": pack(codes >> 4, bits - 4)}


def join(codes: Tensor, high: Tensor | None, bits: int) -> Tensor:
    """The inverse of `split`: (N, K) uint8."""
    low = unpack(codes, 4)
    return low if high is None else low | (unpack(high, bits - 4) << 4)


def by_rows(num_rows: int, row_bytes: int, convert: Callable[[int, int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of `num_rows` rows, made a few rows at a time: `convert(first, last)` makes those rows of each."""
    step = max(1, ROWS_BYTES // max(row_bytes, 1))
    part = convert(0, min(step, num_rows))
    if step >= num_rows:
        return part
    whole = {name: tensor.new_empty(num_rows, *tensor.shape[1:]) for name, tensor in part.items()}
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        if first:
            part = convert(first, last)
        for name, tensor in part.items():
            whole[name][first:last] = tensor
    return whole


def is_dense(tensor: Tensor) -> bool:
    """Contiguous, with stride 1 in the last dim even where that has a single element, of which torch asks no stride."""
    return tensor.is_contiguous() and (tensor.dim() == 0 or tensor.stride(-1) == 1)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense, else a copy that is."""
    return tensor if is_dense(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high four bits of uint8 bytes."""
    return packed & 15, packed >> 4
