"""Attention on plain PyTorch: CPU, MPS, any device, bounded memory.

    q (B, Sq, Hq, D)    k, v (B, Sk, Hkv, D), pages (P, PAGE, Hkv, D), or values alone where K is a function of V
    out (B, Sq, Hq, D)  lse (B, Hq, Sq) fp32, the natural log of the sum of exponentials

One request at a time, one tile of query rows at a time, tiles of keys in order with an online softmax (Milakov and
Gimelshein 2018). Memory beyond the output is one tile of scores, Hq x TILE_ROWS x CHUNK_KEYS, and one of keys and values
in fp32; tiles that the mask rules out are not computed. Products and sums are fp32 (fp64 for fp64 tensors), whatever the
inputs are.

Row invariance: up to DECODE_ROWS rows are taken one by one, each over its own keys, from its own first key on, in tiles
of a fixed size. Every matmul then has the same shape whatever else is in the call, so a row keeps its bits.

No value is read from a device: lengths are host numbers for CPU tensors, and masks over the whole capacity elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemma4_kernels.attention.ops import DECODE_ROWS

# Query rows of a prefill tile. A sliding layer computes up to this many keys too many per window: 128 of 1024 costs 12 %.
TILE_ROWS = 128
# Keys of a prefill tile, and of one chunk of a decode tile: a matmul of this size is one BLAS call's efficient inner loop.
CHUNK_KEYS = 512
# Numbers of keys of a decode tile, all heads together: 16 MiB in fp32. There a tile's matmuls are small, and what counts
# is how seldom the other operations are called.
DECODE_TILE_NUMBERS = 1 << 21

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> rows start..stop of one request's keys or values, (stop - start, Hkv, D) in their own dtype."""


# Where a request's rows lie -----------------------------------------------------------------------------------------


def _contiguous_rows(cache: Tensor) -> Rows:
    """cache (S, Hkv, D)"""
    return lambda start, stop: cache[start:stop]


def _paged_rows(pages: Tensor, table: Tensor) -> Rows:
    """pages (P, PAGE, Hkv, D); table (pages of the request,) page numbers, arbitrary where no length reaches."""
    page_size = pages.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        first = start // page_size
        used = table[first : -(-stop // page_size)]
        if used.device.type != "cpu":
            used = used.clamp(0, pages.shape[0] - 1)  # on the CPU, used entries have been checked and no other is read
        gathered = pages[used.long()].flatten(0, 1)  # (pages * PAGE, Hkv, D)
        return gathered[start - first * page_size : stop - first * page_size]

    return rows


def _packed_rows(packed: Tensor, offset: Tensor) -> Rows:
    """packed (total, Hkv, D) of many requests; offset () on the device: where this one starts."""

    def rows(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=packed.device) + offset
        return packed[index.clamp(max=packed.shape[0] - 1)]

    return rows


def _chosen_rows(cache: Tensor, entry: Tensor) -> Rows:
    """cache (B, S, Hkv, D); entry (1,) on the device: which of the B."""
    return lambda start, stop: cache[:, start:stop].index_select(0, entry)[0]


# Products with one tile ---------------------------------------------------------------------------------------------


class Keys(Protocol):
    """Keys and values of one request, as the attention loop uses them."""

    num_heads: int

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        """q (Hkv, M, D), scaled -> what `scores` wants of it."""

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        """(Hkv, M, T): the queries times keys start..stop."""

    def weighted_values(self, weights: Tensor, start: int, stop: int, present: Tensor | None) -> Tensor:
        """(Hkv, M, D): weights (Hkv, M, T) times values start..stop, of which those not `present` (T,) are taken as 0."""


class SeparateKeys:
    """Keys and values stored side by side."""

    def __init__(self, keys: Rows, values: Rows, num_heads: int, dtype: torch.dtype) -> None:
        self.keys, self.values, self.num_heads, self.dtype = keys, values, num_heads, dtype

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        return (q,)

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        return _scores(prepared[0], self.keys(start, stop).to(self.dtype))

    def weighted_values(self, weights: Tensor, start: int, stop: int, present: Tensor | None) -> Tensor:
        return _weighted(weights, self.values(start, stop).to(self.dtype), present)


class KeysFromValues:
    """Full layers of Gemma 4: k = rope(v * w, position), so the values are the cache.

    Unrotated dims: the weight moves to the query. Rotated pairs (d, d + D/2): the rotation by a position is one by the
    first position of its chunk and one by the offset within the chunk, R(p) = R(base) R(delta). The query takes the
    first, backwards, once per chunk; the values take the second from a table that all chunks share.
    """

    def __init__(
        self, values: Rows, num_heads: int, k_norm_weight: Tensor, inv_freq: Tensor, dtype: torch.dtype
    ) -> None:
        self.values, self.num_heads, self.dtype = values, num_heads, dtype
        self.weight = k_norm_weight.to(dtype)  # (D,)
        self.low, self.high, self.unrotated = _columns(inv_freq)
        self.frequency = inv_freq.to(dtype)[self.low]  # (P,)
        # The weight of a pair is applied before the rotation, so it goes into the table.
        angle = torch.arange(CHUNK_KEYS, device=inv_freq.device, dtype=dtype)[:, None] * self.frequency  # (CHUNK, P)
        self.cos_low, self.sin_low = angle.cos() * self.weight[self.low], angle.sin() * self.weight[self.low]
        self.cos_high, self.sin_high = angle.cos() * self.weight[self.high], angle.sin() * self.weight[self.high]
        self.tile: tuple[int, int, Tensor] | None = None
        self.buffer: Tensor | None = None

    def prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        return q[..., self.low], q[..., self.high], *(q[..., part] * self.weight[part] for part in self.unrotated)

    def scores(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        low, high, *unrotated = prepared  # (Hkv, M, P), (Hkv, M, P), (Hkv, M, columns of a part) ...
        size = min(CHUNK_KEYS, stop - start)
        chunks = (stop - start) // size
        cos, sin = self._turn(start, chunks)  # (C, 1, P)
        values = self._tile(start, stop).unflatten(0, (chunks, size))  # (C, CHUNK, Hkv, D)
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
        return _weighted(weights, self._tile(start, stop), present)

    def _tile(self, start: int, stop: int) -> Tensor:
        """Rows start..stop in the dtype of the sums: converted once for both products."""
        if self.tile is None or self.tile[:2] != (start, stop):
            self.tile = (start, stop, self.values(start, stop).to(self.dtype))
        return self.tile[2]

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
    """q (Hkv, M, D), keys (T, Hkv, D) -> (Hkv, M, T)."""
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
    """weights (Hkv, M, T), values (T, Hkv, D) -> (Hkv, M, D)."""
    if present is not None:  # a row beyond the length may hold NaN, which a weight of zero does not remove
        values = values.masked_fill(~present[:, None, None], 0.0)
    if values.shape[1] == 1 and values.shape[0] > CHUNK_KEYS:
        chunks = values.squeeze(1).unflatten(0, (-1, CHUNK_KEYS))  # (C, CHUNK, D)
        by_chunk = weights[0].unflatten(1, (-1, CHUNK_KEYS)).transpose(0, 1)  # (C, M, CHUNK)
        return torch.bmm(by_chunk, chunks).sum(dim=0, keepdim=True)
    return torch.bmm(weights, values.transpose(0, 1))


def _row_max(scores: Tensor) -> Tensor:
    """(Hkv, M, T) -> (Hkv, M, 1)."""
    if scores.stride(-1) != 1 and scores.shape[-1] % CHUNK_KEYS == 0:
        # Keys lie slowest in memory. PyTorch's amax is not vectorised there; over a wide inner dim it is (13x here).
        heads, rows, size = scores.shape
        by_key = scores.transpose(1, 2).reshape(heads, 16, -1)  # (Hkv, 16, T/16 * M)
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


# One request --------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """Which keys each query row of one request may see.

    Row i is token `query_start + i`. It sees key j if key_start <= j < key_end, j >= token - left (left >= 0), and
    j <= token + right (right >= 0) or both lie in the same block. Without `window_limits_blocks` tokens of a block see
    each other at any distance.
    """

    query_start: int | Tensor
    key_start: int | Tensor
    key_end: int | Tensor
    capacity: int
    """Rows that exist in memory: what bounds the loop where `key_end` is a number on the device."""
    left: int
    right: int
    block_ids: Tensor | None = None  # (capacity,) -1: no block, -2: a key that nobody sees
    window_limits_blocks: bool = True

    def __post_init__(self) -> None:
        self.on_host = all(isinstance(bound, int) for bound in (self.query_start, self.key_start, self.key_end))
        self.block_reach: tuple[Tensor, Tensor] | None = None
        ids = self.block_ids
        if ids is None or not self.on_host or ids.device.type != "cpu":
            return
        # Keys that nobody sees, at both ends, need no tiles: a padded request then has the tiles of an unpadded one.
        present = (ids[: self.key_end] != -2).nonzero()
        self.key_start = max(int(self.key_start), int(present[0])) if len(present) else int(self.key_end)
        self.key_end = int(present[-1]) + 1 if len(present) else int(self.key_end)
        unique, inverse = torch.unique(ids, return_inverse=True)
        index = torch.arange(len(ids))
        first = torch.full((len(unique),), len(ids)).scatter_reduce(0, inverse, index, "amin")
        last = torch.zeros(len(unique), dtype=torch.int64).scatter_reduce(0, inverse, index, "amax")
        in_block = ids >= 0
        self.block_reach = (
            torch.where(in_block, first[inverse], index),  # (capacity,) first key of the token's block
            torch.where(in_block, last[inverse], index),  # (capacity,) last key of it
        )

    def key_range(self, first_row: int, last_row: int) -> tuple[int, int]:
        """The keys that rows first_row..last_row may see, as far as the host knows."""
        if not self.on_host:
            return 0, self.capacity
        start, stop = int(self.key_start), int(self.key_end)
        first, last = int(self.query_start) + first_row, int(self.query_start) + last_row
        lowest = first - self.left if self.left >= 0 else start
        highest = last + self.right if self.right >= 0 else stop
        if self.block_ids is not None:
            if self.block_reach is None:
                return start, stop
            rows = slice(max(first, 0), max(last + 1, 0))
            if (reach := self.block_reach[1][rows]).numel():
                highest = max(highest, int(reach.max()))
                if not self.window_limits_blocks:
                    lowest = min(lowest, int(self.block_reach[0][rows].min()))
        return max(start, lowest), min(stop, highest + 1)

    def visible(self, first_row: int, num_rows: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """(num_rows, stop - start) bool; None where every row sees every key."""
        tokens = self.query_start + first_row  # int or ()
        edge_right = edge_left = True
        if isinstance(tokens, int):
            edge_right = self.right >= 0 and tokens + self.right < stop - 1
            edge_left = self.left >= 0 and start < tokens + num_rows - 1 - self.left
        if self.on_host and self.block_ids is None and not (edge_right or edge_left):
            return None
        token = (torch.arange(num_rows, device=device) + tokens)[:, None]  # (num_rows, 1)
        key = torch.arange(start, stop, device=device)  # (T,)
        seen = torch.ones((num_rows, stop - start), dtype=torch.bool, device=device)
        if self.right >= 0 and edge_right:
            seen &= key <= token + self.right
        same_block = None
        if self.block_ids is not None:
            own = self.block_ids[token.clamp(0, self.capacity - 1)]  # (num_rows, 1)
            same_block = (self.block_ids[start:stop] == own) & (own >= 0)  # (num_rows, T)
            if self.window_limits_blocks:
                seen |= same_block
        if self.left >= 0 and edge_left:
            seen &= key >= token - self.left
        if same_block is not None and not self.window_limits_blocks:
            seen |= same_block
        present = self.present(start, stop, device)
        return seen if present is None else seen & present

    def present(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """(stop - start,) bool: the keys that exist; None if all do."""
        found = None
        if self.block_ids is not None:
            found = self.block_ids[start:stop] != -2
        if not self.on_host:
            key = torch.arange(start, stop, device=device)
            inside = (key >= self.key_start) & (key < self.key_end)
            found = inside if found is None else found & inside
        return found


def _attend(q: Tensor, keys: Keys, request: Request, scale: float, softcap: float, out: Tensor, lse: Tensor) -> None:
    """One request: q and out (Sq, Hq, D), lse (Hq, Sq)."""
    num_rows, num_heads, head_dim = q.shape
    tile_rows, tile_keys = TILE_ROWS, CHUNK_KEYS
    if num_rows <= DECODE_ROWS:
        chunks = DECODE_TILE_NUMBERS // (CHUNK_KEYS * keys.num_heads * head_dim)
        tile_rows, tile_keys = 1, CHUNK_KEYS * max(1, chunks)
    group = num_heads // keys.num_heads
    for first in range(0, num_rows, tile_rows):
        rows = q[first : first + tile_rows]  # (R, Hq, D)
        grouped = rows.unflatten(1, (keys.num_heads, group)).transpose(0, 1)  # (Hkv, R, G, D)
        scaled = (grouped.to(lse.dtype) * scale).flatten(1, 2)  # (Hkv, R*G, D)
        tile_out, tile_lse = _attend_tile(scaled, keys, request, softcap, first, rows.shape[0], tile_keys)
        tile_out = tile_out.unflatten(1, (rows.shape[0], group)).transpose(0, 1)  # (R, Hkv, G, D)
        out[first : first + tile_rows] = tile_out.flatten(1, 2)
        lse[:, first : first + tile_rows] = tile_lse.unflatten(1, (rows.shape[0], group)).transpose(1, 2).flatten(0, 1)


def _attend_tile(
    q: Tensor, keys: Keys, request: Request, softcap: float, first_row: int, num_rows: int, tile_keys: int
) -> tuple[Tensor, Tensor]:
    """q (Hkv, M, D) of rows first_row.., M = num_rows * G -> out (Hkv, M, D), lse (Hkv, M), all in q's dtype."""
    running_max = q.new_full((*q.shape[:2], 1), float("-inf"))  # (Hkv, M, 1)
    running_sum = torch.zeros_like(running_max)
    accumulated = torch.zeros_like(q)
    prepared = keys.prepare(q)
    start, stop = request.key_range(first_row, first_row + num_rows - 1)
    while start < stop:
        # Whole chunks, or what is left of the last one.
        left = stop - start
        size = min(tile_keys, left - left % CHUNK_KEYS) if left >= CHUNK_KEYS else left
        scores = keys.scores(prepared, start, start + size)  # (Hkv, M, T)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        seen = request.visible(first_row, num_rows, start, start + size, q.device)
        if seen is not None:
            scores.unflatten(1, (num_rows, -1)).masked_fill_(~seen[:, None], float("-inf"))
        new_max = torch.maximum(running_max, _row_max(scores))
        # A row that has seen no key yet keeps -inf; subtracting it from itself would be NaN.
        safe_max = new_max.masked_fill(new_max == float("-inf"), 0.0)
        weights = scores.sub_(safe_max).exp_()
        rescale = (running_max - safe_max).exp_()
        running_sum = running_sum * rescale + weights.sum(dim=-1, keepdim=True)
        present = request.present(start, start + size, q.device)
        accumulated = accumulated * rescale + keys.weighted_values(weights, start, start + size, present)
        running_max = new_max
        start += size
    lse = running_max + running_sum.log()
    return accumulated / running_sum.masked_fill(running_sum == 0, 1.0), lse.squeeze(-1)


# The ops ------------------------------------------------------------------------------------------------------------


def _results(q: Tensor, spare_rows: int = 0) -> tuple[Tensor, Tensor]:
    """out like q, and lse (..., Hq, Sq) in the dtype of the sums; both with spare rows at the end."""
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    *batch, rows, heads, dim = q.shape
    rows += spare_rows
    return q.new_empty((*batch, rows, heads, dim)), q.new_empty((*batch, heads, rows), dtype=sums)


def _host(numbers: Tensor) -> list[int] | Tensor:
    """The numbers themselves where reading them costs nothing, else the tensor, to be used in masks."""
    return numbers.tolist() if numbers.device.type == "cpu" else numbers.long()


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int, window_limits_blocks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _results(q)
    num_keys, num_heads = k.shape[1:3]
    for b in range(q.shape[0]):
        keys = SeparateKeys(_contiguous_rows(k[b]), _contiguous_rows(v[b]), num_heads, lse.dtype)
        request = Request(
            query_start=num_keys - q.shape[1], key_start=0, key_end=num_keys, capacity=num_keys, left=window_left,
            right=window_right, block_ids=None if block_ids is None else block_ids[b],
            window_limits_blocks=window_limits_blocks,
        )  # fmt: skip
        _attend(q[b], keys, request, softmax_scale, softcap, out[b], lse[b])
    return out, lse


def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, softcap: float, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_heads, total = k.shape[-2], q.shape[0]
    cu_q, cu_k = _host(cu_seqlens_q), _host(cu_seqlens_k)
    out, lse = _results(q, spare_rows=0 if isinstance(cu_q, list) else 1)
    for b in range(len(cu_seqlens_q) - 1):
        length = cu_k[b + 1] - cu_k[b]
        if block_table is not None:
            k_rows, v_rows = _paged_rows(k, block_table[b]), _paged_rows(v, block_table[b])
        elif isinstance(cu_k, list):
            span = slice(cu_k[b], cu_k[b + 1])
            k_rows, v_rows = _contiguous_rows(k[span]), _contiguous_rows(v[span])
        else:
            k_rows, v_rows = _packed_rows(k, cu_k[b]), _packed_rows(v, cu_k[b])
        keys = SeparateKeys(k_rows, v_rows, num_heads, lse.dtype)
        rows = cu_q[b + 1] - cu_q[b]
        request = Request(
            query_start=length - rows, key_start=0, key_end=length, capacity=max_seqlen_k, left=window_left,
            right=window_right,
        )  # fmt: skip
        if isinstance(cu_q, list):
            span = slice(cu_q[b], cu_q[b + 1])
            _attend(q[span], keys, request, softmax_scale, softcap, out[span], lse[:, span])
        else:
            # Rows beyond this request's own belong to its neighbours; their results go to the spare row.
            offset = torch.arange(max_seqlen_q, device=q.device)
            padded = q[(offset + cu_q[b]).clamp(max=total - 1)]  # (max_seqlen_q, Hq, D)
            padded_out, padded_lse = _results(padded)
            _attend(padded, keys, request, softmax_scale, softcap, padded_out, padded_lse)
            target = torch.where(offset < rows, offset + cu_q[b], total)
            out.index_copy_(0, target, padded_out)
            lse.index_copy_(1, target, padded_lse)
    return out[:total], lse[:, :total].contiguous()


def flash_attn_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None, block_table: Tensor | None, block_ids: Tensor | None, softmax_scale: float,
    softcap: float, window_left: int, window_right: int, window_limits_blocks: bool, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _results(q)
    capacity, num_heads = k_cache.shape[1:3]
    lengths = _host(cache_seqlens)
    starts = [0] * q.shape[0] if cache_leftpad is None else _host(cache_leftpad)
    entries = list(range(q.shape[0])) if cache_batch_idx is None else _host(cache_batch_idx)
    for b in range(q.shape[0]):
        if block_table is not None:
            capacity = k_cache.shape[1] * block_table.shape[1]
            k_rows, v_rows = _paged_rows(k_cache, block_table[b]), _paged_rows(v_cache, block_table[b])
        elif isinstance(entries, list):
            k_rows, v_rows = _contiguous_rows(k_cache[entries[b]]), _contiguous_rows(v_cache[entries[b]])
        else:
            k_rows, v_rows = _chosen_rows(k_cache, entries[b : b + 1]), _chosen_rows(v_cache, entries[b : b + 1])
        keys = SeparateKeys(k_rows, v_rows, num_heads, lse.dtype)
        request = Request(
            query_start=lengths[b] - q.shape[1], key_start=starts[b], key_end=lengths[b], capacity=capacity,
            left=window_left, right=window_right, block_ids=None if block_ids is None else block_ids[b],
            window_limits_blocks=window_limits_blocks,
        )  # fmt: skip
        _attend(q[b], keys, request, softmax_scale, softcap, out[b], lse[b])
    return out, lse


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    batch, rows = k.shape[:2]
    position = cache_seqlens.long()[:, None] + torch.arange(rows, device=k.device)  # (B, rows)
    if block_table is None:
        entry = torch.arange(batch, device=k.device) if cache_batch_idx is None else cache_batch_idx.long()
        index = (entry[:, None], position)
    else:
        page_size = k_cache.shape[1]
        index = (block_table.long().gather(1, position // page_size), position % page_size)
    k_cache[index] = k
    v_cache[index] = v


def k_eq_v_attention(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _results(q)
    capacity, num_heads = values.shape[1:3]
    lengths = _host(cache_seqlens)
    for b in range(q.shape[0]):
        if block_table is None:
            rows = _contiguous_rows(values[b])
        else:
            capacity = values.shape[1] * block_table.shape[1]
            rows = _paged_rows(values, block_table[b])
        keys = KeysFromValues(rows, num_heads, k_norm_weight, inv_freq, lse.dtype)
        request = Request(
            query_start=lengths[b] - q.shape[1], key_start=0, key_end=lengths[b], capacity=capacity, left=-1, right=0
        )
        _attend(q[b], keys, request, softmax_scale, 0.0, out[b], lse[b])
    return out, lse
