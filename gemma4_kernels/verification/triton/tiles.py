"""The pass over the logits: what a tile of the vocabulary has to say of its row, from one read.

    logits  (B, ROWS, V), dense in the last dim; draft_logits (B, ROWS - 1, V) or None
    facts   (B, ROWS + DRAFTER_ROWS, 4, TILES) int64: STATUS, LARGEST, SAMPLE and FLOOR below
    lists   (B, ROWS + DRAFTER_ROWS, TILES, LIST) int64: places of the tile's largest scores, -1 behind them

One program owns one tile of one row. A tile is not one stretch of the vocabulary but every TILES-th chunk of CHUNK tokens:
vocabularies are sorted by how common a token is, so the largest logits of a row stand close together, and would crowd the
lists of a few tiles. STATUS says whether the row can have a distribution: 2 for NaN or +inf, 1 for a
finite logit, 0 for nothing but -inf. LARGEST is the prize of the largest score. SAMPLE is the prize of the largest score +
Gumbel noise, made where the request samples and is not a case for lists: then the list holds every token of the tile
whose key is at least FLOOR, and FLOOR is as low as LIST entries allow, or nearly. Ties longer than a list stay out of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.triton_common.rounding import to_fp32
from gemma4_kernels.verification.triton.portable_math import gumbel, words_of_blocks
from gemma4_kernels.verification.triton.scores import best_of, key_of, place_of, score_of

STATUS, LARGEST, SAMPLE, FLOOR = (tl.constexpr(index) for index in range(4))
FACTS = tl.constexpr(4)
_NO_KEY = tl.constexpr(-(2**31))
"""Below the key of -inf."""


@triton.jit
def _list_largest(key, token, list_ptr, LIST: tl.constexpr, TOKENS: tl.constexpr):
    """Write the list of a tile, keys and tokens (TOKENS / 4, 4). Returns its FLOOR, an int64."""
    # The maxima of 2 LIST groups: so many tokens reach the least of them, which is where the search begins.
    groups = tl.max(tl.reshape(key, [2 * LIST, TOKENS // (2 * LIST)]), axis=1)  # [2 LIST]
    low = tl.min(groups, axis=0).to(tl.int64)  # more than LIST tokens reach low, unless the tile has fewer
    high = tl.max(groups, axis=0).to(tl.int64) + 1  # none reach high
    reached = 0
    if low == _NO_KEY:
        existing = tl.sum(tl.sum((key != _NO_KEY).to(tl.int32), axis=1), axis=0)
        if existing <= LIST:
            high = low + 1
            reached = existing
    while (high - low > 1) & (reached < LIST // 2):
        middle = (low + high) >> 1
        count = tl.sum(tl.sum((key >= middle.to(tl.int32)).to(tl.int32), axis=1), axis=0)
        fits = count <= LIST
        low = tl.where(fits, low, middle)
        high = tl.where(fits, middle, high)
        reached = tl.where(fits, count, reached)
    # A comparison of 64 bits: high may lie one above all keys of 32.
    is_listed = tl.reshape(key, [TOKENS]).to(tl.int64) >= high  # [TOKENS]
    slot = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
    tl.store(list_ptr + slot, tl.reshape(place_of(key, token), [TOKENS]), mask=is_listed)
    index = tl.arange(0, LIST)
    tl.store(list_ptr + index, tl.full([LIST], -1, tl.int64), mask=index >= reached)
    return high


@triton.jit(do_not_specialize=["ROWS", "DRAFTER_ROWS", "TILES", "stream"])
def tiles_kernel(
    logits_ptr, draft_logits_ptr, drafts_ptr, num_drafts_ptr, temperature_ptr, top_k_ptr, softcap_ptr, seeds_ptr,
    positions_ptr, facts_ptr, lists_ptr, stride_batch, stride_row, draft_stride_batch, draft_stride_row,
    ROWS, DRAFTER_ROWS, V, TILES, stream,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr, LONGEST_TOP_K: tl.constexpr, EVERY_ROW: tl.constexpr,
):  # fmt: skip
    """Grid (TILES * (ROWS + DRAFTER_ROWS) * B,)."""
    program = tl.program_id(0)
    tile = program % TILES
    row = program // TILES % (ROWS + DRAFTER_ROWS)
    request = (program // TILES // (ROWS + DRAFTER_ROWS)).to(tl.int64)
    count = ROWS - 1
    if num_drafts_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(num_drafts_ptr + request).to(tl.int64), 0), ROWS - 1).to(tl.int32)
    is_target = row < ROWS
    index = tl.where(is_target, row, row - ROWS)
    if (is_target & (index <= count)) | ((row >= ROWS) & (index < count)):
        row_ptr = logits_ptr + request * stride_batch + index.to(tl.int64) * stride_row
        if draft_logits_ptr is not None:
            drafter_ptr = draft_logits_ptr + request * draft_stride_batch + index.to(tl.int64) * draft_stride_row
            row_ptr = tl.where(is_target, row_ptr, drafter_ptr)
        # Chunks of a tile stand TILES chunks apart.
        index_of_block = tl.arange(0, TOKENS // 4)
        chunk = index_of_block // (CHUNK // 4) * TILES + tile
        block = chunk * (CHUNK // 4) + index_of_block % (CHUNK // 4)  # [TOKENS / 4]
        token = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TOKENS / 4, 4]
        is_token = token < V
        logit = to_fp32(tl.load(row_ptr + token, mask=is_token, other=float("-inf")))
        temperature = tl.load(temperature_ptr + request)
        samples = temperature > 0
        score = score_of(logit, tl.load(softcap_ptr + request), tl.where(samples, temperature, 1.0))
        score = tl.where(is_token & (score == score), score, float("-inf"))

        facts = facts_ptr + (request * (ROWS + DRAFTER_ROWS) + row) * FACTS * TILES + tile
        status = tl.where((logit != logit) | (logit == float("inf")), 2, tl.where(logit > float("-inf"), 1, 0))
        tl.store(facts + STATUS * TILES, tl.max(tl.max(status, axis=1), axis=0).to(tl.int64))
        tl.store(facts + LARGEST * TILES, best_of(score, token, is_token))
        if samples:
            top_k = tl.load(top_k_ptr + request)
            if (top_k > 0) & (top_k <= LONGEST_TOP_K):
                place = (request * (ROWS + DRAFTER_ROWS) + row) * TILES + tile
                key = tl.where(is_token, key_of(score), _NO_KEY)
                floor = _list_largest(key, token, lists_ptr + place * LIST, LIST, TOKENS)
                tl.store(facts + FLOOR * TILES, floor)
            else:
                # By rejection and block, only the row behind the drafts is sampled, and what a draft out of range ends.
                wanted = EVERY_ROW | (index == count)
                if not EVERY_ROW:
                    if is_target & (index < count):
                        draft = tl.load(drafts_ptr + request * (ROWS - 1) + index).to(tl.int64)
                        wanted |= (draft < 0) | (draft >= V)
                    wanted &= is_target
                if wanted:
                    position = tl.load(positions_ptr + request) + index
                    word = words_of_blocks(block, tl.load(seeds_ptr + request), position, stream)
                    tl.store(facts + SAMPLE * TILES, best_of(score + gumbel(word), token, is_token))
