"""The end of verification by "match", and of sampling: one program a request goes from row to row and emits.

Rows after the first that is not followed by its draft are not finished. What is emitted is that of `verification.outcome`:
cut at an end of text and at the budget; nothing where a row that matters has no distribution.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.verification.triton.rows import finish_row, is_usable
from gemma4_kernels.verification.triton.tiles import FACTS


@triton.jit
def is_end(token, EOS: tl.constexpr, EOS_COUNT: tl.constexpr):
    """int32: whether an int64 token ends the text."""
    found = (token != token).to(tl.int32)
    for index in tl.static_range(EOS_COUNT):
        found |= (token == EOS[index]).to(tl.int32)
    return found


@triton.jit
def drafts_of(num_drafts_ptr, request, ROWS):
    """int32, 0 to ROWS - 1."""
    count = tl.full([], 0, tl.int64) + ROWS - 1
    if num_drafts_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(num_drafts_ptr + request).to(tl.int64), 0), count)
    return count.to(tl.int32)


@triton.jit
def budget_of(max_new_tokens_ptr, request, ROWS):
    """int64, 0 to ROWS: how many tokens may be emitted."""
    budget = tl.full([], 0, tl.int64) + ROWS
    if max_new_tokens_ptr is not None:
        budget = tl.minimum(tl.maximum(tl.load(max_new_tokens_ptr + request).to(tl.int64), 0), budget)
    return budget


@triton.jit
def store_counts(results_ptr, B, request, accepted, next_token, emitted, finished, refused, flags_ptr):
    """Everything about a request but its tokens: results (4, B) int64, flags (2, B) uint8."""
    tl.store(results_ptr + request, tl.minimum(accepted, emitted).to(tl.int64))
    tl.store(results_ptr + B + request, tl.where(emitted > 0, next_token, -1).to(tl.int64))
    tl.store(results_ptr + 2 * B + request, emitted.to(tl.int64))
    tl.store(results_ptr + 3 * B + request, tl.maximum(emitted - 1, 0).to(tl.int64))
    tl.store(flags_ptr + request, finished.to(tl.uint8))
    tl.store(flags_ptr + B + request, refused.to(tl.uint8))


@triton.jit(do_not_specialize=["ROWS", "TILES", "B", "stream"])
def match_kernel(
    logits_ptr, drafts_ptr, num_drafts_ptr, temperature_ptr, top_k_ptr, cut_ptr, min_p_ptr, softcap_ptr, seeds_ptr,
    positions_ptr, max_new_tokens_ptr, facts_ptr, lists_ptr, scratch_ptr, tokens_ptr, results_ptr, flags_ptr,
    stride_batch, stride_row, ROWS, V, TILES, B, stream,
    TOKENS: tl.constexpr, FACT_TILES: tl.constexpr, LIST: tl.constexpr, LONGEST_TOP_K: tl.constexpr,
    THRESHOLDS: tl.constexpr, SCRATCH: tl.constexpr, EOS: tl.constexpr, EOS_COUNT: tl.constexpr,
):  # fmt: skip
    """Grid (B,)."""
    request = tl.program_id(0).to(tl.int64)
    count = drafts_of(num_drafts_ptr, request, ROWS)
    budget = budget_of(max_new_tokens_ptr, request, ROWS)
    refused = tl.full([], 0, tl.int32)
    for row in range(count + 1):
        fine = is_usable(facts_ptr + (request * ROWS + row) * FACTS * TILES, TILES, FACT_TILES)
        refused |= 1 - fine.to(tl.int32)

    emitted = tl.full([], 0, tl.int32)
    accepted = tl.full([], 0, tl.int32)
    finished = tl.full([], 0, tl.int32)
    next_token = tl.full([], -1, tl.int64)
    row = tl.full([], 0, tl.int32)
    running = 1 - refused
    while (running > 0) & (row < budget):
        token, _, _, _, _ = finish_row(
            logits_ptr + request * stride_batch + row.to(tl.int64) * stride_row,
            facts_ptr + (request * ROWS + row) * FACTS * TILES, lists_ptr + (request * ROWS + row) * TILES * LIST,
            scratch_ptr + request * SCRATCH, V, TILES, tl.load(temperature_ptr + request), tl.load(top_k_ptr + request),
            tl.load(cut_ptr + request), tl.load(min_p_ptr + request), tl.load(softcap_ptr + request),
            tl.load(seeds_ptr + request), tl.load(positions_ptr + request) + row, stream, 1,
            TOKENS, FACT_TILES, LIST, LONGEST_TOP_K, THRESHOLDS, SCRATCH,
        )  # fmt: skip
        next_token = token.to(tl.int64)
        tl.store(tokens_ptr + request * ROWS + row, next_token)
        emitted += 1
        finished = is_end(next_token, EOS, EOS_COUNT)
        agrees = tl.full([], 0, tl.int32)
        if row < count:
            draft = tl.load(drafts_ptr + request * (ROWS - 1) + row).to(tl.int64)
            agrees = (draft == next_token).to(tl.int32)
        accepted += agrees
        running = agrees * (1 - finished)
        row += 1
    for rest in range(emitted, ROWS):
        tl.store(tokens_ptr + request * ROWS + rest, tl.full([], -1, tl.int64))
    store_counts(results_ptr, B, request, accepted, next_token, emitted, finished, refused, flags_ptr)
