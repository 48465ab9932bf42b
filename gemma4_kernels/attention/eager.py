"""Attention on plain PyTorch: CPU, MPS, any device, bounded memory.

    q (B, Sq, Hq, D)    k, v (B, Sk, Hkv, D), pages (P, PAGE, Hkv, D), or values alone where K is a function of V
    out (B, Sq, Hq, D)  lse (B, Hq, Sq) fp32, the natural log of the sum of exponentials

One request at a time, one tile of query rows at a time, tiles of keys in order with an online softmax (Milakov and
Gimelshein 2018). Memory beyond the output is one tile of scores, Hq x TILE_ROWS x CHUNK_KEYS, one of keys and values in
fp32, and a few numbers a key where there are blocks; tiles that the mask rules out are not computed. Products and sums
are fp32 (fp64 for fp64 tensors), whatever the inputs are.

Row invariance: up to DECODE_ROWS rows are taken one by one, each over its own keys, from its own first key on, in tiles
of a fixed size. Every matmul then has the same shape whatever else is in the call, so on a CPU a row keeps its bits.

No value is read from a device: lengths are host numbers for CPU tensors; elsewhere tiles cover the whole capacity, masks do
the rest, and a row's bits may depend on the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_kernels.attention.eager_tiles import (
    CHUNK_KEYS,
    Keys,
    KeysFromValues,
    Rows,
    SeparateKeys,
    chosen_rows,
    contiguous_rows,
    decoded_rows,
    packed_rows,
    paged_rows,
    row_max,
)
from gemma4_kernels.op_support import DECODE_ROWS

# Query rows of a prefill tile. A sliding layer computes up to this many keys too many per window: 128 of 1024 costs 12 %.
TILE_ROWS = 128
# Numbers of keys of a decode tile, all heads together: 8 MiB in fp32. There a tile's matmuls are small, and what counts
# is how seldom the other operations are called.
DECODE_TILE_NUMBERS = 1 << 21

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
        if self.block_ids is not None and self.on_host and self.block_ids.device.type == "cpu":
            # Keys that nobody sees, at both ends, need no tiles: a padded request then has the tiles of an unpadded one.
            present = (self.block_ids[: self.key_end] != -2).nonzero()
            self.key_start = max(int(self.key_start), int(present[0])) if len(present) else int(self.key_end)
            self.key_end = int(present[-1]) + 1 if len(present) else int(self.key_end)

    def key_range(self, first_row: int, last_row: int) -> tuple[int, int]:
        """The keys that rows first_row..last_row may see, as far as the host knows."""
        if not self.on_host:
            return 0, self.capacity
        start, stop = int(self.key_start), int(self.key_end)
        first, last = int(self.query_start) + first_row, int(self.query_start) + last_row
        lowest = first - self.left if self.left >= 0 else start
        highest = last + self.right if self.right >= 0 else stop
        if self.block_ids is not None:
            lowest_of_block, highest_of_block = self._reach(max(first, 0), max(last + 1, 0))
            highest = max(highest, highest_of_block)
            if not self.window_limits_blocks:
                lowest = min(lowest, lowest_of_block)
        return max(start, lowest), min(stop, highest + 1)

    def _reach(self, first: int, stop: int) -> tuple[int, int]:
        """First and last key of the blocks of tokens first..stop; all keys where a device keeps the ids to itself."""
        assert self.block_ids is not None
        ids = self.block_ids
        if ids.device.type != "cpu":
            return 0, self.capacity
        if not bool((ids[first:stop] >= 0).any()):
            return self.capacity, -1
        if self.block_reach is None:
            unique, inverse = torch.unique(ids, return_inverse=True)
            index = torch.arange(len(ids))
            first_of = torch.full((len(unique),), len(ids)).scatter_reduce(0, inverse, index, "amin")
            last_of = torch.zeros(len(unique), dtype=torch.int64).scatter_reduce(0, inverse, index, "amax")
            in_block = ids >= 0
            self.block_reach = (
                torch.where(in_block, first_of[inverse], index),  # (capacity,) first key of the token's block
                torch.where(in_block, last_of[inverse], index),  # (capacity,) last key of it
            )
        return int(self.block_reach[0][first:stop].min()), int(self.block_reach[1][first:stop].max())

    def visible(
        self, first_row: int, num_rows: int, start: int, stop: int, present: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """(num_rows, stop - start) bool, of the keys that are `present`; None where every row sees every key."""
        tokens = self.query_start + first_row  # int or ()
        edge_right = edge_left = True
        if isinstance(tokens, int):
            edge_right = self.right >= 0 and tokens + self.right < stop - 1
            edge_left = self.left >= 0 and start < tokens + num_rows - 1 - self.left
        if present is None and not (edge_right or edge_left):
            return None
        token = (torch.arange(num_rows, device=device) + tokens)[:, None]  # (num_rows, 1)
        key = torch.arange(start, stop, device=device)  # (T,)
        seen = torch.ones((num_rows, stop - start), dtype=torch.bool, device=device)
        if self.right >= 0 and edge_right:
            seen &= key <= token + self.right
        same_block = None
        if self.block_ids is not None:
            own = self.block_ids[token.clamp(0, self.capacity - 1)]  # (num_rows, 1)
            in_block = (own >= 0) & (token >= 0)  # with more rows than keys, the first tokens lie before the keys
            same_block = (self.block_ids[start:stop] == own) & in_block  # (num_rows, T)
            if self.window_limits_blocks:
                seen |= same_block
        if self.left >= 0 and edge_left:
            seen &= key >= token - self.left
        if same_block is not None and not self.window_limits_blocks:
            seen |= same_block
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
        start, stop = request.key_range(0, num_rows - 1)
        if stop - start <= tile_keys + DECODE_ROWS:  # a window, wherever each of the rows has it
            keys.hold(start, stop)
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
        present = request.present(start, start + size, q.device)
        seen = request.visible(first_row, num_rows, start, start + size, present, q.device)
        if seen is not None:
            scores.unflatten(1, (num_rows, -1)).masked_fill_(~seen[:, None], float("-inf"))
        new_max = torch.maximum(running_max, row_max(scores))
        # A row that has seen no key yet keeps -inf; subtracting it from itself would be NaN.
        safe_max = new_max.masked_fill(new_max == float("-inf"), 0.0)
        weights = scores.sub_(safe_max).exp_()
        rescale = (running_max - safe_max).exp_()
        running_sum = running_sum * rescale + weights.sum(dim=-1, keepdim=True)
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
        keys = SeparateKeys(contiguous_rows(k[b]), contiguous_rows(v[b]), num_heads, lse.dtype)
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
            k_rows, v_rows = paged_rows(k, block_table[b]), paged_rows(v, block_table[b])
        elif isinstance(cu_k, list):
            span = slice(cu_k[b], cu_k[b + 1])
            k_rows, v_rows = contiguous_rows(k[span]), contiguous_rows(v[span])
        else:
            k_rows, v_rows = packed_rows(k, cu_k[b]), packed_rows(v, cu_k[b])
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
            k_rows, v_rows = paged_rows(k_cache, block_table[b]), paged_rows(v_cache, block_table[b])
        elif isinstance(entries, list):
            k_rows, v_rows = contiguous_rows(k_cache[entries[b]]), contiguous_rows(v_cache[entries[b]])
        else:
            k_rows, v_rows = chosen_rows(k_cache, entries[b : b + 1]), chosen_rows(v_cache, entries[b : b + 1])
        keys = SeparateKeys(k_rows, v_rows, num_heads, lse.dtype)
        request = Request(
            query_start=lengths[b] - q.shape[1], key_start=starts[b], key_end=lengths[b], capacity=capacity,
            left=window_left, right=window_right, block_ids=None if block_ids is None else block_ids[b],
            window_limits_blocks=window_limits_blocks,
        )  # fmt: skip
        _attend(q[b], keys, request, softmax_scale, softcap, out[b], lse[b])
    return out, lse


def appended_rows(
    cache: Tensor, new: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(entry, row) in the cache of each row of `new` (B, rows, H, D), written from cache_seqlens on."""
    batch, rows = new.shape[:2]
    position = cache_seqlens.long()[:, None] + torch.arange(rows, device=new.device)  # (B, rows)
    if block_table is None:
        entry = torch.arange(batch, device=new.device) if cache_batch_idx is None else cache_batch_idx.long()
        return entry[:, None], position
    page_size = cache.shape[1]
    return block_table.long().gather(1, position // page_size), position % page_size


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    index = appended_rows(k_cache, k, cache_seqlens, cache_batch_idx, block_table)
    k_cache[index] = k
    v_cache[index] = v


def k_eq_v_attention(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, softmax_scale: float, values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _results(q)
    num_heads = values.shape[2]
    capacity = values.shape[1] if block_table is None else values.shape[1] * block_table.shape[1]
    lengths = _host(cache_seqlens)

    def rows_of(cache: Tensor, b: int) -> Rows:
        return contiguous_rows(cache[b]) if block_table is None else paged_rows(cache, block_table[b])

    for b in range(q.shape[0]):
        rows = rows_of(values, b)
        if values_scale is not None:
            own = values_scale.dim() == 3  # a scale for each row
            rows = decoded_rows(rows, rows_of(values_scale.unsqueeze(-1), b) if own else None, values_scale)
        keys = KeysFromValues(rows, num_heads, k_norm_weight, inv_freq, lse.dtype)
        request = Request(
            query_start=lengths[b] - q.shape[1], key_start=0, key_end=lengths[b], capacity=capacity, left=-1, right=0
        )
        _attend(q[b], keys, request, softmax_scale, 0.0, out[b], lse[b])
    return out, lse
