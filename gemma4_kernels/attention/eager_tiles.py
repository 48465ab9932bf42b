"""What one tile of keys and values costs: where its rows lie, and its products with queries and weights.

    SeparateKeys     keys and values side by side
    KeysFromValues   values alone; k[j] = rope(v[j] * weight, j)

H is the number of KV heads, M the query rows of a KV head (rows times group), T the keys of a tile. Decode tiles are several
chunks of CHUNK_KEYS keys, or one partial chunk. Everything is computed in `dtype`, the dtype of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gemma4_kernels.attention.value_codes import decode
from gemma4_kernels.op_support import DECODE_ROWS

# Keys of a prefill tile, and of one chunk of a decode tile: a matmul of this size is one BLAS call's efficient inner loop.
CHUNK_KEYS = 512

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> rows start..stop of one request's keys or values, (stop - start, H, D) in their own dtype."""


# Where a request's rows lie -----------------------------------------------------------------------------------------


def contiguous_rows(cache: Tensor) -> Rows:
    """cache (S, H, D)"""
    return lambda start, stop: cache[start:stop]


def paged_rows(pages: Tensor, table: Tensor) -> Rows:
    """pages (P, PAGE, H, D); table (pages of the request,) page numbers, arbitrary where no length reaches."""
    page_size = pages.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        first = start // page_size
        used = table[first : -(-stop // page_size)]
        if used.device.type != "cpu":
            used = used.clamp(0, pages.shape[0] - 1)  # on the CPU, used entries have been checked and no other is read
        gathered = pages[used.long()].flatten(0, 1)  # (pages * PAGE, H, D)
        return gathered[start - first * page_size : stop - first * page_size]

    return rows


def packed_rows(packed: Tensor, offset: Tensor) -> Rows:
    """packed (total, H, D) of many requests; offset () on the device: where this one starts."""

    def rows(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=packed.device) + offset
        return packed[index.clamp(max=packed.shape[0] - 1)]

    return rows


def chosen_rows(cache: Tensor, entry: Tensor) -> Rows:
    """cache (B, S, H, D); entry (1,) on the device: which of the B."""
    return lambda start, stop: cache[:, start:stop].index_select(0, entry)[0]


def decoded_rows(codes: Rows, scales: Rows | None, values_scale: Tensor) -> Rows:
    """Rows of 8-bit codes as rows of values, fp32; `scales` gives (stop - start, H, 1) where each row has its own."""
    if scales is None:
        return lambda start, stop: decode(codes(start, stop), values_scale)
    return lambda start, stop: decode(codes(start, stop), scales(start, stop).squeeze(-1))


# Products with one tile ---------------------------------------------------------------------------------------------


class Keys(Protocol):
    """Keys and values of one request, as the attention loop uses them."""

    num_heads: int

    def hold(self, start: int, stop: int) -> None:
        """Fetch and convert keys start..stop once, for several rows that read nearly the same ones."""

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        """q (H, M, D), scaled -> what `scores` wants of it."""

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        """(H, M, T): the queries times keys start..stop."""

    def weighted_values(self, weights: Tensor, start: int, stop: int, present: Tensor | None) -> Tensor:
        """(H, M, D): weights (H, M, T) times values start..stop, of which those not `present` (T,) are taken as 0."""


class Source:
    """Rows of one request in the dtype of the sums; the last ones fetched are kept, for whoever asks for a part of them."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.kept: tuple[int, int, Tensor] | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        """(stop - start, H, D)"""
        if self.kept is None or start < self.kept[0] or stop > self.kept[1]:
            self.kept = (start, stop, self.rows(start, stop).to(self.dtype))
        part = self.kept[2][start - self.kept[0] : stop - self.kept[0]]
        if any(stride * part.element_size() % 64 for stride in part.stride()[:2]):
            # BLAS treats the odd ends of an unaligned row by themselves: its sums would depend on where the rows lie.
            return part.clone(memory_format=torch.contiguous_format)
        return part


class SeparateKeys:
    """Keys and values stored side by side."""

    def __init__(self, keys: Rows, values: Rows, num_heads: int, dtype: torch.dtype) -> None:
        self.keys, self.values, self.num_heads = Source(keys, dtype), Source(values, dtype), num_heads

    def hold(self, start: int, stop: int) -> None:
        self.keys(start, stop), self.values(start, stop)

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        return (q,)

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        return _scores(prepared[0], self.keys(start, stop))

    def weighted_values(self, weights: Tensor, start: int, stop: int, present: Tensor | None) -> Tensor:
        return _weighted(weights, self.values(start, stop), present)


class KeysFromValues:
    """Full layers of Gemma 4: k = rope(v * w, position), so the values are the cache.

    Unrotated dims: the weight moves to the query. Rotated pairs (d, d + D/2): the rotation by a position is one by the
    first position of its chunk and one by the offset within the chunk, R(p) = R(base) R(delta). The query takes the
    first, backwards, once per chunk; the values take the second from a table that all chunks share.
    """

    def __init__(
        self, values: Rows, num_heads: int, k_norm_weight: Tensor, inv_freq: Tensor, dtype: torch.dtype
    ) -> None:
        self.values, self.num_heads, self.dtype = Source(values, dtype), num_heads, dtype
        self.weight = k_norm_weight.to(dtype)  # (D,)
        self.low, self.high, self.unrotated = _columns(inv_freq)
        self.frequency = inv_freq.to(dtype)[self.low]  # (P,)
        # The weight of a pair is applied before the rotation, so it goes into the table.
        angle = torch.arange(CHUNK_KEYS, device=inv_freq.device, dtype=dtype)[:, None] * self.frequency  # (CHUNK, P)
        self.cos_low, self.sin_low = angle.cos() * self.weight[self.low], angle.sin() * self.weight[self.low]
        self.cos_high, self.sin_high = angle.cos() * self.weight[self.high], angle.sin() * self.weight[self.high]
        self.buffer: Tensor | None = None

    def hold(self, start: int, stop: int) -> None:
        self.values(start, stop)

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        return q[..., self.low], q[..., self.high], *(q[..., part] * self.weight[part] for part in self.unrotated)

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        low, high, *unrotated = prepared  # (H, M, P), (H, M, P), (H, M, columns of a part) ...
        size = min(CHUNK_KEYS, stop - start)
        chunks = (stop - start) // size
        cos, sin = self._turn(start, chunks)  # (C, 1, P)
        values = self.values(start, stop).unflatten(0, (chunks, size))  # (C, CHUNK, H, D)
        heads = []
        for head in range(self.num_heads):
            v = values[:, :, head]  # (C, CHUNK, D)
            # The unrotated part comes first: it streams the tile from memory, and the rest finds it in a cache.
            products = [
                (part[head].expand(chunks, -1, -1), v[..., columns])
                for part, columns in zip(unrotated, self.unrotated, strict=True)
            ]
            # The queries, turned back by the first position of each chunk: (C, M, 2P).
            q_low, q_high = low[head], high[head]  # (M, P)
            q_rotated = torch.cat((q_low * cos + q_high * sin, q_high * cos - q_low * sin), dim=-1)
            heads.append(_sum_of_products([*products, (q_rotated, self._turned(v))]).flatten(1))  # (M, T)
        return torch.stack(heads) if self.num_heads > 1 else heads[0].unsqueeze(0)

    def weighted_values(self, weights: Tensor, start: int, stop: int, present: Tensor | None) -> Tensor:
        return _weighted(weights, self.values(start, stop), present)

    def _turned(self, values: Tensor) -> Tensor:
        """values (C, CHUNK, D) -> their rotated columns, turned forward by the offset in the chunk: (C, CHUNK, 2P)."""
        chunks, size, _ = values.shape
        shape = (chunks, size, 2 * self.frequency.shape[0])
        if self.buffer is None or self.buffer.shape != shape:  # fresh memory for each tile costs more than filling it
            self.buffer = self.frequency.new_empty(shape)
        v_low, v_high = values[..., self.low], values[..., self.high]  # (C, CHUNK, P)
        k_low, k_high = self.buffer.chunk(2, dim=-1)
        torch.mul(v_low, self.cos_low[:size], out=k_low).addcmul_(v_high, self.sin_high[:size], value=-1)
        torch.mul(v_high, self.cos_high[:size], out=k_high).addcmul_(v_low, self.sin_low[:size])
        return self.buffer

    def _turn(self, start: int, chunks: int) -> tuple[Tensor, Tensor]:
        """cos and sin of base * frequency for each chunk, to the last bits even where the angle is 262144 radians.

        A product in fp32 would be off by 2^-25 of the angle. Twelve leading bits of the frequency times a base that is a
        multiple of the chunk are exact in fp32, and what is left of the frequency gives a small angle.
        """
        base = torch.arange(chunks, device=self.frequency.device, dtype=self.dtype) * CHUNK_KEYS + start
        base = base[:, None, None]  # (C, 1, 1)
        shifted = self.frequency * 4097.0  # Veltkamp's split at 12 bits
        leading = shifted - (shifted - self.frequency)  # (P,)
        coarse, fine = base * leading, base * (self.frequency - leading)
        cos_coarse, sin_coarse, cos_fine, sin_fine = coarse.cos(), coarse.sin(), fine.cos(), fine.sin()
        return cos_coarse * cos_fine - sin_coarse * sin_fine, sin_coarse * cos_fine + cos_coarse * sin_fine


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """q (H, M, D), keys (T, H, D) -> (H, M, T)."""
    if keys.shape[1] == 1 and keys.shape[0] > CHUNK_KEYS:
        # One head alone: the chunks become the batch of the product, or BLAS would keep a core idle.
        chunks = keys.squeeze(1).unflatten(0, (-1, CHUNK_KEYS))  # (C, CHUNK, D)
        return _sum_of_products([(q.expand(chunks.shape[0], -1, -1), chunks)]).flatten(1).unsqueeze(0)
    return _sum_of_products([(q, keys.transpose(0, 1))]).transpose(0, 1)


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over pairs of q (N, M, K) @ keys (N, T, K).T -> (M, N, T)."""
    # A few query rows go second: BLAS libraries are faster at a tall result than at a flat one.
    tall = pairs[0][0].shape[1] <= 2 * DECODE_ROWS
    total: Tensor | None = None
    for q, keys in pairs:
        a, b = (keys, q.transpose(1, 2)) if tall else (q, keys.transpose(1, 2))
        total = torch.bmm(a, b) if total is None else total.baddbmm_(a, b)
    assert total is not None
    return total.permute(2, 0, 1) if tall else total.transpose(0, 1)


def _weighted(weights: Tensor, values: Tensor, present: Tensor | None) -> Tensor:
    """weights (H, M, T), values (T, H, D) -> (H, M, D)."""
    if present is not None:  # a row beyond the length may hold NaN, which a weight of zero does not remove
        values = values.masked_fill(~present[:, None, None], 0.0)
    if values.shape[1] == 1 and values.shape[0] > CHUNK_KEYS:
        chunks = values.squeeze(1).unflatten(0, (-1, CHUNK_KEYS))  # (C, CHUNK, D)
        by_chunk = weights[0].unflatten(1, (-1, CHUNK_KEYS)).transpose(0, 1)  # (C, M, CHUNK)
        return torch.bmm(by_chunk, chunks).sum(dim=0, keepdim=True)
    return torch.bmm(weights, values.transpose(0, 1))


def row_max(scores: Tensor) -> Tensor:
    """(H, M, T) -> (H, M, 1)."""
    if scores.stride(-1) != 1 and scores.shape[-1] % CHUNK_KEYS == 0:
        # Keys lie slowest in memory. PyTorch's amax is not vectorised there; over a wide inner dim it is (13x here).
        heads, rows, size = scores.shape
        by_key = scores.transpose(1, 2).reshape(heads, 16, -1)  # (H, 16, T/16 * M)
        return by_key.amax(dim=1).view(heads, size // 16, rows).amax(dim=1).unsqueeze(-1)
    return scores.amax(dim=-1, keepdim=True)


def _columns(inv_freq: Tensor) -> tuple[slice | Tensor, slice | Tensor, list[slice | Tensor]]:
    """Dims d, and d + D/2, of the pairs that rotate, and the other dims in parts: slices (views) where they are neighbours.

    Off the CPU all pairs count as rotated: which frequencies are zero cannot be asked without a sync.
    """
    half = inv_freq.shape[0]
    if inv_freq.device.type != "cpu":
        return slice(0, half), slice(half, 2 * half), []
    rotates = inv_freq != 0
    pairs = rotates.nonzero().squeeze(1)  # (P,)
    first, stop = (int(pairs[0]), int(pairs[-1]) + 1) if len(pairs) else (0, 0)
    if stop - first != len(pairs):
        others = torch.cat((~rotates, ~rotates)).nonzero().squeeze(1)  # (D - 2P,)
        return pairs, pairs + half, [others]
    parts = (slice(0, first), slice(stop, first + half), slice(stop + half, 2 * half))
    return slice(first, stop), slice(first + half, stop + half), [part for part in parts if part.start < part.stop]
