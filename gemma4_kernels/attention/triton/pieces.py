"""What the attention kernels have in common, as functions of a kernel.

Query heads that share a KV head and the rows of a request are packed into one axis: packed row m is row m // GROUP of
head m % GROUP. So a tile is full while decoding, and keys are read once for a whole group.

Positions are rows of the cache. Row i of a request is token `end - rows + i`; it sees key j if start <= j < end,
j >= token - left, and j <= token + right or both are in one image block. No limit is a distance of NO_LIMIT.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Farther than any two positions, and far enough from 2**31 that sums of positions and distances do not overflow.
NO_LIMIT = 1 << 29

# Numbers that change from call to call: no new binary for a new value.
UNSPECIALISED = (
    "num_rows", "num_slots", "capacity", "total_rows", "total_keys", "num_entries", "num_pages", "scale", "softcap",
    "left", "right",
)  # fmt: skip

FAR = tl.constexpr(1 << 30)  # larger than any chunk, its index, or a position
ABSENT = tl.constexpr(-2)  # the id of a key that nobody sees
NO_BLOCK = tl.constexpr(-1)


# Which rows and keys ------------------------------------------------------------------------------------------------


@triton.jit
def request_of(
    b, num_rows, capacity, total_rows, total_keys, num_entries,
    cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr, entry_ptr, PAGED: tl.constexpr,
):  # fmt: skip
    """(first query row, query rows, first key row, start, end, cache entry) of request b.

    Numbers on the device are nobody's to check before the launch; here each is held within what exists.
    """
    first_row = 0
    rows = num_rows
    first_key = 0
    end = capacity
    start = 0
    entry = b
    if cu_q_ptr is not None:
        first_row = tl.minimum(tl.maximum(tl.load(cu_q_ptr + b), 0), total_rows).to(tl.int32)
        stop = tl.minimum(tl.maximum(tl.load(cu_q_ptr + b + 1), 0), total_rows).to(tl.int32)
        rows = tl.minimum(tl.maximum(stop - first_row, 0), num_rows)
    if cu_k_ptr is not None:
        offset = tl.maximum(tl.load(cu_k_ptr + b), 0).to(tl.int64)
        length = tl.maximum(tl.load(cu_k_ptr + b + 1).to(tl.int64) - offset, 0)
        end = tl.minimum(length, capacity).to(tl.int32)
        if not PAGED:
            first_key = tl.minimum(offset, total_keys).to(tl.int32)
            end = tl.minimum(end, total_keys - first_key)
    if lengths_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity).to(tl.int32)
    if first_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(first_ptr + b), 0), end).to(tl.int32)
    if entry_ptr is not None:
        entry = tl.minimum(tl.maximum(tl.load(entry_ptr + b), 0), num_entries - 1).to(tl.int32)
    return first_row, rows, first_key, start, end, entry


@triton.jit
def page_and_row(keys, inside, table_ptr, num_pages, PAGE_SIZE: tl.constexpr):
    """Where the keys lie: (page, row in it) of each, (0, key) without pages. Entries of no key may hold anything."""
    if PAGE_SIZE == 0:
        page = tl.zeros_like(keys).to(tl.int64)
        row = keys
    else:
        page = tl.load(table_ptr + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        row = keys % PAGE_SIZE
    return page, row


# Masks --------------------------------------------------------------------------------------------------------------


@triton.jit
def crosses_edge(tile, BLOCK_N: tl.constexpr, first_token, last_token, end, left, right):
    """Whether some key of the tile is unseen by some row, blocks aside."""
    return (tile < last_token - left) | (tile + BLOCK_N - 1 > first_token + right) | (tile + BLOCK_N > end)


@triton.jit
def visible(token, own_id, keys, ids, end, left, right, BLOCKS: tl.constexpr, FREE: tl.constexpr):
    """(M, N): token, own_id (M,) against keys, ids (N,). FREE: a window does not limit blocks."""
    inside_left = keys[None, :] >= token[:, None] - left
    seen = keys[None, :] <= token[:, None] + right
    if BLOCKS:
        same = (ids[None, :] == own_id[:, None]) & (own_id >= 0)[:, None]
        if FREE:
            seen = (seen & inside_left) | same
        else:
            seen = (seen | same) & inside_left
    else:
        seen = seen & inside_left
    return seen & (keys < end)[None, :]


@triton.jit
def own_block(ids_ptr, token, is_row, capacity):
    """(M,) block ids of the rows' own tokens; with more rows than keys the first tokens lie before the keys."""
    return tl.load(ids_ptr + token, mask=is_row & (token >= 0) & (token < capacity), other=NO_BLOCK)


@triton.jit
def last_of_blocks(ids_ptr, own_id, after, end, SCAN: tl.constexpr):
    """The key behind the last one, from `after` on, that shares a block with some row; `after` if there is none.

    Ids between the smallest and the largest of the rows count as theirs: that costs tiles, never keys.
    """
    in_block = own_id >= 0
    stop = after
    if tl.max(in_block.to(tl.int32), 0) > 0:
        largest = tl.max(own_id, 0)
        smallest = tl.min(tl.where(in_block, own_id, largest), 0)
        for first in range(after, end, SCAN):
            key = first + tl.arange(0, SCAN)
            ids = tl.load(ids_ptr + key, mask=key < end, other=NO_BLOCK)
            stop = tl.maximum(stop, tl.max(tl.where((ids >= smallest) & (ids <= largest), key + 1, 0), 0))
    return stop


@triton.jit
def first_of_blocks(ids_ptr, own_id, start, before, SCAN: tl.constexpr):
    """The first key below `before` that shares a block with some row; `before` if there is none."""
    in_block = own_id >= 0
    found = before
    if tl.max(in_block.to(tl.int32), 0) > 0:
        largest = tl.max(own_id, 0)
        smallest = tl.min(tl.where(in_block, own_id, largest), 0)
        for first in range(start, before, SCAN):
            key = first + tl.arange(0, SCAN)
            ids = tl.load(ids_ptr + key, mask=key < before, other=NO_BLOCK)
            found = tl.minimum(found, tl.min(tl.where((ids >= smallest) & (ids <= largest), key, before), 0))
    return found


# Numbers ------------------------------------------------------------------------------------------------------------


@triton.jit
def plus_product(scores, a, b, scale, DOT_DTYPE: tl.constexpr):
    """scores (M, N) plus a (M, C) times b (C, N); `scaled` brings in the scale.

    fp32 is multiplied on ordinary cores, where a sum is rounded once a column. Chunks of columns are summed by themselves,
    which keeps the chains short; the scale stands between, or the compiler would join them again.
    """
    if DOT_DTYPE == tl.float32:
        return scores + tl.dot(a, b, input_precision="ieee") * scale
    else:
        return tl.dot(a, b, scores)


@triton.jit
def scaled(scores, scale, DOT_DTYPE: tl.constexpr):
    if DOT_DTYPE == tl.float32:
        return scores
    else:
        return scores * scale


# Softmax ------------------------------------------------------------------------------------------------------------


@triton.jit
def capped(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    x = scores / softcap
    # Near zero the closed form would lose the digits that it subtracts: there, five terms of the series.
    x2 = x * x
    near = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    shrunk = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1 - shrunk) / (1 + shrunk)
    return tl.where(tl.abs(x) < 0.3, near, far) * softcap


@triton.jit
def online_softmax_step(scores, running_max, running_sum):
    """Fold one tile of scores into the running maximum and sum; also the factor that rescales the accumulator.

    The maximum is subtracted before the exponential's log2(e) comes in: scores near it keep all of their digits.
    """
    tile_max = tl.maximum(running_max, tl.max(scores, axis=1))  # (M,)
    # A row that has seen no key yet keeps -inf; subtracting it from itself would be NaN.
    safe_max = tl.where(tile_max == float("-inf"), 0.0, tile_max)
    weights = tl.exp(scores - safe_max[:, None])  # (M, N)
    rescale = tl.exp(running_max - safe_max)  # (M,)
    return weights, tile_max, running_sum * rescale + tl.sum(weights, axis=1), rescale


@triton.jit
def log_sum(running_max, running_sum):
    """max + log(sum) (M,); -inf for a row that saw nothing."""
    return tl.where(running_sum == 0, float("-inf"), running_max + tl.log(tl.where(running_sum == 0, 1.0, running_sum)))


# Splits -------------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_size(seen, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """Keys of a chunk for a row that sees `seen` keys: so many that SPLITS chunks hold them, in whole tiles.

    It depends on nothing but the row's own number of keys, so the row's sums are grouped the same way in any company.
    """
    per_split = (seen + SPLITS - 1) // SPLITS
    return tl.maximum((per_split + BLOCK_N - 1) // BLOCK_N * BLOCK_N, MIN_CHUNK)


@triton.jit
def chunks_of(
    token, start, end, left, right, BLOCKS: tl.constexpr, FREE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """(keys of a chunk, first chunk, chunks) of each row; chunks are counted from `start`. A row may see none.

    Up to 16 rows stand at the end of the cache, so a block shows a row at most 15 keys more on the right: they change
    the number of its chunks, never their size. On the left, blocks that are free of the window may reach to the start.
    """
    if FREE:
        low = token * 0 + start
    else:
        low = tl.maximum(token - left, start)
    high = tl.minimum(token + right + 1, end)
    chunk = chunk_size(tl.maximum(high - low, 0), SPLITS, BLOCK_N, MIN_CHUNK)
    if BLOCKS:
        high = token * 0 + end
    first = (low - start) // chunk
    count = tl.where(high > low, (high - 1 - start) // chunk - first + 1, 0)
    return chunk, first, count


@triton.jit
def choose_chunk(
    split, second_size, first_token, last_token, start, end, left, right, BLOCKS: tl.constexpr, FREE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """(keys of a chunk, its index, whether there is one) for a program that serves first_token..last_token, at most 16.

    Their numbers of keys differ by 15 at most, so two sizes of chunks may meet among them, never three: half of the
    programs serve the smaller size, the other half, which seldom have anything to do, the larger.
    """
    token = first_token + tl.arange(0, 16)
    chunk, first, count = chunks_of(token, start, end, left, right, BLOCKS, FREE, SPLITS, BLOCK_N, MIN_CHUNK)
    has_keys = (token <= last_token) & (count > 0)
    smallest = tl.min(tl.where(has_keys, chunk, FAR), 0)
    largest = tl.max(tl.where(has_keys, chunk, 0), 0)
    size = tl.where(second_size == 1, largest, smallest)
    mine = has_keys & (chunk == size)
    index = tl.min(tl.where(mine, first, FAR), 0) + split
    last = tl.max(tl.where(mine, first + count - 1, -1), 0)
    return size, index, (index <= last) & ((second_size == 0) | (smallest < largest))
