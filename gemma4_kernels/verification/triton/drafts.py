"""The end of verification by "rejection" and by "block": every row is finished, then one program a request decides and emits.

p is the target's distribution of a row after its filters, q the drafter's (or 1 for the draft itself). Both are made of
their rows each time that they are looked at, and never stored:

    p(token) = exp(score - largest) / total of the row's survivors, 0 for the others

    made    (B, ROWS + DRAFTER_ROWS, 5) int64: TOKEN, where the row has no draft, or else its distribution: the bits of the
            LARGEST_SCORE, FIRST and LAST place of the survivors, their TOTAL

Rejection goes on while u q(draft) < p(draft). Block verification looks at all rows that its joint probability reaches, and
keeps the longest block that is accepted. Either ends in one row that says the last token: a sample of p where
that row has no draft, else the largest (joint p - q) / E over the tokens, or the largest p / E if joint p is nowhere above q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.verification import noise
from gemma4_kernels.verification.triton.match import budget_of, drafts_of, is_end, store_counts
from gemma4_kernels.verification.triton.portable_math import exponential, uniform, words_of, words_of_blocks
from gemma4_kernels.verification.triton.rows import finish_row, is_usable
from gemma4_kernels.verification.triton.scores import (
    best_of,
    fixed,
    from_fixed,
    key_of,
    place_of,
    scores_at,
    token_of_prize,
    weight_of,
)
from gemma4_kernels.verification.triton.tiles import FACTS

_ACCEPTANCE = tl.constexpr(noise.ACCEPTANCE)
_RESIDUAL = tl.constexpr(noise.RESIDUAL)
TOKEN, LARGEST_SCORE, FIRST, LAST, TOTAL = (tl.constexpr(index) for index in range(5))
MADE = tl.constexpr(5)


@triton.jit
def _probability(row_ptr, token, V, softcap, divisor, min_p, largest, first, last, total):
    """fp32 of each token (int32): its share, with `total` as fp32."""
    score = scores_at(row_ptr, token, V, softcap, divisor)
    weight = weight_of(score, largest)
    place = place_of(key_of(score), token)
    alive = (place >= first) & (place < last) & (weight >= min_p) & (token < V)
    return tl.where(alive, tl.div_rn(weight, tl.zeros_like(weight) + total), 0.0)


@triton.jit
def _decision(seed, position):
    """fp32 [1], in (0, 1)."""
    return uniform(words_of(tl.zeros([1], tl.int32), seed, position, _ACCEPTANCE))


@triton.jit
def _residuals(
    p_row_ptr, q_row_ptr, draft, V, softcap, divisor, min_p, joint, p_largest, p_first, p_last, p_total,
    q_largest, q_first, q_last, q_total, seed, position, HAS_Q: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One read of p and q: the mass of max(joint p - q, 0), int64, and its sample, int32."""
    mass = tl.zeros([TOKENS // 4, 4], tl.int64)
    residual_prize = tl.full([], -1, tl.int64)
    target_prize = tl.full([], -1, tl.int64)
    for start in range(0, V, TOKENS):
        block = start // 4 + tl.arange(0, TOKENS // 4)  # [TOKENS / 4]
        token = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TOKENS / 4, 4]
        p = _probability(p_row_ptr, token, V, softcap, divisor, min_p, p_largest, p_first, p_last, p_total)
        if HAS_Q:
            q = _probability(q_row_ptr, token, V, softcap, divisor, min_p, q_largest, q_first, q_last, q_total)
        else:
            q = (token == draft).to(tl.float32)
        residual = tl.maximum(p * joint - q, 0.0)
        mass += fixed(residual)
        waits = exponential(words_of_blocks(block, seed, position, _RESIDUAL))
        residual_prize = tl.maximum(residual_prize, best_of(tl.div_rn(residual, waits), token, residual > 0))
        target_prize = tl.maximum(target_prize, best_of(tl.div_rn(p, waits), token, p > 0))
    token = token_of_prize(tl.where(residual_prize >= 0, residual_prize, target_prize))
    return tl.sum(tl.sum(mass, axis=1), axis=0), token


@triton.jit
def _draft_at(drafts_ptr, request, row, count, ROWS, V):
    """The draft of a row, int32, and 1 if the row has one that is a token (or 0 and 0)."""
    draft = tl.full([], 0, tl.int32)
    is_draft = tl.full([], 0, tl.int32)
    if row < count:
        given = tl.load(drafts_ptr + request * (ROWS - 1) + row).to(tl.int64)
        is_draft = ((given >= 0) & (given < V)).to(tl.int32)
        draft = tl.where(is_draft > 0, given, 0).to(tl.int32)
    return draft, is_draft


@triton.jit(do_not_specialize=["ROWS", "DRAFTER_ROWS", "TILES", "stream"])
def rows_kernel(
    logits_ptr, draft_logits_ptr, drafts_ptr, num_drafts_ptr, temperature_ptr, top_k_ptr, cut_ptr, min_p_ptr, softcap_ptr,
    seeds_ptr, positions_ptr, facts_ptr, lists_ptr, scratch_ptr, made_ptr, stride_batch, stride_row, draft_stride_batch,
    draft_stride_row, ROWS, DRAFTER_ROWS, V, TILES, stream,
    TOKENS: tl.constexpr, FACT_TILES: tl.constexpr, LIST: tl.constexpr, LONGEST_TOP_K: tl.constexpr,
    THRESHOLDS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Grid ((ROWS + DRAFTER_ROWS) * B,): one row, the target's first."""
    rows = ROWS + DRAFTER_ROWS
    row = tl.program_id(0) % rows
    request = (tl.program_id(0) // rows).to(tl.int64)
    count = drafts_of(num_drafts_ptr, request, ROWS)
    is_target = row < ROWS
    index = tl.where(is_target, row, row - ROWS)
    _, has_draft = _draft_at(drafts_ptr, request, index, count, ROWS, V)
    place = request * rows + row
    facts = facts_ptr + place * FACTS * TILES
    # Of the drafter, rows whose draft is a token.
    matters = (is_target & (index <= count)) | (has_draft > 0)
    if matters & is_usable(facts, TILES, FACT_TILES):
        row_ptr = logits_ptr + request * stride_batch + index.to(tl.int64) * stride_row
        if draft_logits_ptr is not None:
            drafter_ptr = draft_logits_ptr + request * draft_stride_batch + index.to(tl.int64) * draft_stride_row
            row_ptr = tl.where(is_target, row_ptr, drafter_ptr)
        token, largest, first, last, total = finish_row(
            row_ptr, facts, lists_ptr + place * TILES * LIST, scratch_ptr + place * SCRATCH, V, TILES,
            tl.load(temperature_ptr + request), tl.load(top_k_ptr + request), tl.load(cut_ptr + request),
            tl.load(min_p_ptr + request), tl.load(softcap_ptr + request), tl.load(seeds_ptr + request),
            tl.load(positions_ptr + request) + index, stream, 1 - has_draft,
            TOKENS, FACT_TILES, LIST, LONGEST_TOP_K, THRESHOLDS, SCRATCH,
        )  # fmt: skip
        made = made_ptr + place * MADE
        tl.store(made + TOKEN, token.to(tl.int64))
        tl.store(made + LARGEST_SCORE, largest.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(made + FIRST, first)
        tl.store(made + LAST, last)
        tl.store(made + TOTAL, total)


@triton.jit
def _distribution(made_ptr, place):
    """(largest score, first place, last place, total as fp32) of a row."""
    made = made_ptr + place * MADE
    largest = tl.load(made + LARGEST_SCORE).to(tl.int32).to(tl.float32, bitcast=True)
    return largest, tl.load(made + FIRST), tl.load(made + LAST), from_fixed(tl.load(made + TOTAL))


@triton.jit(do_not_specialize=["ROWS", "DRAFTER_ROWS", "TILES", "B"])
def drafts_kernel(
    logits_ptr, draft_logits_ptr, drafts_ptr, num_drafts_ptr, temperature_ptr, min_p_ptr, softcap_ptr, seeds_ptr,
    positions_ptr, max_new_tokens_ptr, facts_ptr, made_ptr, tokens_ptr, results_ptr, flags_ptr,
    stride_batch, stride_row, draft_stride_batch, draft_stride_row, ROWS, DRAFTER_ROWS, V, TILES, B,
    BLOCKS: tl.constexpr, TOKENS: tl.constexpr, FACT_TILES: tl.constexpr, EOS: tl.constexpr, EOS_COUNT: tl.constexpr,
):  # fmt: skip
    """Grid (B,). BLOCKS: by "block" instead of "rejection"."""
    HAS_Q: tl.constexpr = draft_logits_ptr is not None
    request = tl.program_id(0).to(tl.int64)
    count = drafts_of(num_drafts_ptr, request, ROWS)
    places = request * (ROWS + DRAFTER_ROWS)
    refused = tl.full([], 0, tl.int32)
    for row in range(count + 1):
        fine = is_usable(facts_ptr + (places + row) * FACTS * TILES, TILES, FACT_TILES)
        refused |= 1 - fine.to(tl.int32)
    if HAS_Q:
        for row in range(count):
            fine = is_usable(facts_ptr + (places + ROWS + row) * FACTS * TILES, TILES, FACT_TILES)
            refused |= 1 - fine.to(tl.int32)
    temperature, min_p = tl.load(temperature_ptr + request), tl.load(min_p_ptr + request)
    softcap, seed = tl.load(softcap_ptr + request), tl.load(seeds_ptr + request)
    divisor = tl.where(temperature > 0, temperature, 1.0)

    # Where the block ends, so far: after how many drafts, and in which token.
    accepted = tl.full([], 0, tl.int32)
    end_token = tl.full([], 0, tl.int32)
    joint = tl.full([1], 1.0, tl.float32)
    row = tl.full([], 0, tl.int32)
    running = 1 - refused
    while running > 0:
        position = tl.load(positions_ptr + request) + row
        draft, has_draft = _draft_at(drafts_ptr, request, row, count, ROWS, V)
        which = draft + tl.zeros([1], tl.int32)  # [1]
        own = tl.load(made_ptr + (places + row) * MADE + TOKEN).to(tl.int32)
        accepts = tl.full([], 0, tl.int32)
        ends = row == 0
        following = tl.full([1], 0.0, tl.float32)
        share = joint
        if has_draft > 0:
            p_row_ptr = logits_ptr + request * stride_batch + row.to(tl.int64) * stride_row
            q_row_ptr = p_row_ptr
            p_largest, p_first, p_last, p_total = _distribution(made_ptr, places + row)
            q_largest, q_first, q_last, q_total = p_largest, p_first, p_last, p_total
            p = _probability(p_row_ptr, which, V, softcap, divisor, min_p, p_largest, p_first, p_last, p_total)  # [1]
            q = tl.full([1], 1.0, tl.float32)
            if HAS_Q:
                q_row_ptr = draft_logits_ptr + request * draft_stride_batch + row.to(tl.int64) * draft_stride_row
                q_largest, q_first, q_last, q_total = _distribution(made_ptr, places + ROWS + row)
                q = _probability(q_row_ptr, which, V, softcap, divisor, min_p, q_largest, q_first, q_last, q_total)
            if not BLOCKS:
                accepts = tl.sum((_decision(seed, position) * q < p).to(tl.int32), axis=0)
            if accepts == 0:
                mass, own = _residuals(
                    p_row_ptr, q_row_ptr, draft, V, softcap, divisor, min_p, joint, p_largest, p_first, p_last, p_total,
                    q_largest, q_first, q_last, q_total, seed, position, HAS_Q, TOKENS,
                )  # fmt: skip
                if BLOCKS:
                    left = from_fixed(mass)
                    rest = left + (1.0 - joint)
                    share = tl.where(rest > 0, tl.div_rn(left + tl.zeros([1], tl.float32), rest), 1.0)
                    ratio = tl.where(q > 0, tl.div_rn(p, q), (p > 0).to(tl.float32))
                    following = tl.minimum(joint * ratio, 1.0)
        if BLOCKS:
            ends |= tl.sum((_decision(seed, position - 1) < share).to(tl.int32), axis=0) > 0
            joint = following
            running = tl.sum((following > 0).to(tl.int32), axis=0)
        else:
            ends = accepts == 0
            running = accepts
        if ends:
            accepted, end_token = row, own
        row += 1

    budget = budget_of(max_new_tokens_ptr, request, ROWS)
    emitted = tl.full([], 0, tl.int32)
    finished = tl.full([], 0, tl.int32)
    next_token = tl.full([], -1, tl.int64)
    for column in range(ROWS):
        emits = (refused == 0) & (column <= accepted) & (column < budget) & (finished == 0)
        if emits:
            next_token = end_token.to(tl.int64)
            if column < accepted:
                next_token = tl.load(drafts_ptr + request * (ROWS - 1) + column).to(tl.int64)
            emitted += 1
            finished = is_end(next_token, EOS, EOS_COUNT)
        tl.store(tokens_ptr + request * ROWS + column, tl.where(emits, next_token, -1))
    store_counts(results_ptr, B, request, accepted, next_token, emitted, finished, refused, flags_ptr)
