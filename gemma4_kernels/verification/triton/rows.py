"""One row, finished: its sample, or its distribution after the filters; from what the tiles said, where that is enough.

A filter leaves the places from a boundary on: top-k the first place of the k-th largest score's key, top-p the lowest
place up to which more mass has summed up than is cut off. Min-p looks at each weight by itself. Both boundaries are the
same question, "the lowest place whose cumulative mass, ascending, exceeds a limit", with a mass of one per token for top-k,
and are searched for by `_read`: one read of the row sums the mass below THRESHOLDS places at once and copies what lies in
the interval that is left to a scratch list, which settles the rest as soon as it fits.

What saves a read:
* The lists of the tiles hold every token above their floors. If none of the floors lies above the k-th largest of
  the listed, the row is finished from the lists alone.
* The sample of the unfiltered row is known. If it survives the filters, it is the sample of what survives: the first
  threshold asks just that.
* If it does not, all survivors lie above it, for it lies below the boundary: the same read has listed them, up to SCRATCH.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.verification.triton.portable_math import gumbel, words_of, words_of_blocks
from gemma4_kernels.verification.triton.scores import (
    BEYOND,
    NEXT_KEY,
    TOKEN_BITS,
    best_of,
    fixed,
    key_in,
    key_of,
    limit_of,
    place_of,
    prize_of,
    score_of_key,
    scores_at,
    token_of_place,
    token_of_prize,
    weight_of,
)
from gemma4_kernels.verification.triton.tiles import FLOOR, LARGEST, SAMPLE, STATUS

_WHOLE = tl.constexpr(2**38)
_FARTHEST = tl.constexpr(27.0)
"""So far below the largest score a token has no mass: e**-27 < 2**-38."""
# Stages of a row that is read again.
_TOP_K, _TOP_P, _SEARCHED = (tl.constexpr(index) for index in range(3))


@triton.jit
def largest_fact(facts_ptr, FACT: tl.constexpr, TILES, FACT_TILES: tl.constexpr):
    """The largest of a row's int64 facts of one kind, over its tiles."""
    largest = tl.full([FACT_TILES], -BEYOND, tl.int64)
    for first in range(0, TILES, FACT_TILES):
        tile = first + tl.arange(0, FACT_TILES)
        fact = tl.load(facts_ptr + FACT * TILES + tile, mask=tile < TILES, other=-BEYOND)
        largest = tl.maximum(largest, fact)
    return tl.max(largest, axis=0)


@triton.jit
def is_usable(facts_ptr, TILES, FACT_TILES: tl.constexpr):
    """Whether a row has a distribution."""
    return largest_fact(facts_ptr, STATUS, TILES, FACT_TILES) == 1


@triton.jit
def _list_at(list_ptr, entries, largest, SCRATCH: tl.constexpr):
    """Places of a list, -1 where there is none, and their masses."""
    index = tl.arange(0, SCRATCH)
    place = tl.load(list_ptr + index, mask=index < entries, other=-1)
    weight = weight_of(score_of_key(key_in(place)), largest)
    return place, tl.where(place >= 0, fixed(weight), 0)


@triton.jit
def _search_list(place, mass, low, high, limit, before, BITS: tl.constexpr):
    """The lowest place with before + mass of the places up to it > limit; it lies in [low, high).

    BITS is TOKEN_BITS where all places of a key go together: then low and high are the first of a key, and so is the result.
    """
    while (high - low) >> BITS > 1:
        middle = low + ((high - low) >> (BITS + 1) << BITS)
        fits = before + tl.sum(tl.where(place < middle, mass, 0), axis=0) <= limit
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return low


@triton.jit
def _read(
    row_ptr, V, softcap, divisor, largest, counts, floor, thresholds, base, high, scratch_ptr,
    TOKENS: tl.constexpr, THRESHOLDS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """One read of a row. Mass (or, if `counts`, number) of the places from floor on: below each of the thresholds, and in
    all. The number of places in [base, high), and their list at scratch_ptr, complete if it is no longer than SCRATCH."""
    below = tl.zeros([THRESHOLDS, TOKENS], tl.int64)
    whole = tl.zeros([TOKENS], tl.int64)
    listed = 0
    for first in range(0, V, TOKENS):
        token = first + tl.arange(0, TOKENS)
        score = scores_at(row_ptr, token, V, softcap, divisor)
        place = place_of(key_of(score), token)
        mass = tl.where(counts > 0, 1, fixed(weight_of(score, largest)))
        mass = tl.where((token < V) & (place >= floor), mass, 0)
        whole += mass
        below += tl.where(place[None, :] < thresholds[:, None], mass[None, :], 0)
        inside = (token < V) & (place >= base) & (place < high)
        number = tl.sum(inside.to(tl.int32), axis=0)
        if number > 0:
            slot = listed + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            tl.store(scratch_ptr + slot, place, mask=inside & (slot < SCRATCH))
        listed += number
    tl.debug_barrier()  # other threads load what these have stored
    return tl.sum(below, axis=1), tl.sum(whole, axis=0), listed


@triton.jit
def _last_read(
    row_ptr, V, softcap, divisor, largest, boundary, min_p, seed, position, stream, wants_token, TOKENS: tl.constexpr
):
    """One read of a row whose boundary is known: the sample of what survives, or its mass."""
    prize = tl.full([], -1, tl.int64)
    mass = tl.zeros([TOKENS // 4, 4], tl.int64)
    for first in range(0, V, TOKENS):
        block = first // 4 + tl.arange(0, TOKENS // 4)  # [TOKENS / 4]
        token = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TOKENS / 4, 4]
        score = scores_at(row_ptr, token, V, softcap, divisor)
        weight = weight_of(score, largest)
        alive = (place_of(key_of(score), token) >= boundary) & (weight >= min_p) & (score > float("-inf"))
        if wants_token > 0:
            noisy = score + gumbel(words_of_blocks(block, seed, position, stream))
            prize = tl.maximum(prize, best_of(noisy, token, alive))
        else:
            mass += tl.where(alive, fixed(weight), 0)
    return prize, tl.sum(tl.sum(mass, axis=1), axis=0)


@triton.jit
def finish_row(
    row_ptr, facts_ptr, lists_ptr, scratch_ptr, V, TILES, temperature, top_k, cut, min_p, softcap, seed, position, stream,
    wants_token,
    TOKENS: tl.constexpr, FACT_TILES: tl.constexpr, LIST: tl.constexpr, LONGEST_TOP_K: tl.constexpr,
    THRESHOLDS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Finish one row that `is_usable`.

    Args:
        row_ptr, facts_ptr, lists_ptr: the row's logits, and what its tiles left.
        scratch_ptr: SCRATCH int64 of the request.
        wants_token: 1 for the row's sample, 0 for its distribution, int32.
    Returns: token (int32, if wanted), largest score, and the distribution (if wanted): exp(score - largest) / total * 2**38
        of the tokens with first place <= place < last place and a weight of at least min_p.
    """
    samples = temperature > 0
    divisor = tl.where(samples, temperature, 1.0)
    prize = largest_fact(facts_ptr, LARGEST, TILES, FACT_TILES)
    token, largest_key = token_of_prize(prize), key_in(prize)
    largest = score_of_key(largest_key)
    top = place_of(largest_key, token) - token.to(tl.int64) + NEXT_KEY  # above all places of the row
    boundary = place_of(largest_key, token)
    last = boundary + 1
    total = tl.full([], _WHOLE, tl.int64)
    if samples & (largest > float("-inf")):
        last = tl.full([], BEYOND, tl.int64)
        has_listed = (top_k > 0) & (top_k <= LONGEST_TOP_K)
        has_top_k = has_listed | ((top_k > 0) & (top_k < V))
        has_top_p = cut > 0
        kept = tl.minimum(top_k, tl.zeros([], tl.int64) + V)  # a V of 1 is a constexpr
        # The sample of the unfiltered row, if it has been made.
        knows = (wants_token > 0) & (has_listed == 0)
        sample = tl.where(knows, token_of_prize(largest_fact(facts_ptr, SAMPLE, TILES, FACT_TILES)), token)
        sample_score = scores_at(row_ptr, sample + tl.zeros([1], tl.int32), V, softcap, divisor)  # [1]
        sample_lives = tl.sum((weight_of(sample_score, largest) >= min_p).to(tl.int32), axis=0) > 0
        sample_place = tl.sum(place_of(key_of(sample_score), sample), axis=0)

        boundary = tl.zeros([], tl.int64)
        low = boundary
        from_tiles = has_listed.to(tl.int32)
        has_list = from_tiles
        stage = tl.where(has_top_k, _TOP_K, tl.where(has_top_p, _TOP_P, _SEARCHED))
        entries = tl.zeros([], tl.int32) + TILES * LIST
        before = tl.zeros([], tl.int64)  # mass below the list
        is_open = 1
        while is_open > 0:
            # Read until a list or the boundary is there.
            floor, high = boundary, top
            heaviest = tl.zeros([1], tl.float32) + largest - _FARTHEST  # [1]
            massless = tl.sum(place_of(key_of(heaviest), tl.zeros([1], tl.int32)), axis=0)
            first_read = 1
            while (has_list == 0) & (stage < _SEARCHED):
                if first_read > 0:
                    high = top
                    low = tl.where(stage == _TOP_K, low, tl.maximum(floor, massless))
                    before = tl.zeros([], tl.int64)
                base = low
                if (first_read > 0) & knows:
                    # top-k keeps all that tie with the sample, top-p drops up to the sample
                    above_sample = ((sample_place >> TOKEN_BITS) << TOKEN_BITS) + NEXT_KEY
                    base = tl.maximum(low, tl.where(stage == _TOP_K, above_sample, sample_place + 1))
                # An interval shrinks until it holds one place, or for top-k one key.
                bits = tl.where(stage == _TOP_K, TOKEN_BITS, 0)
                step = (((high - base - 1) >> bits) // THRESHOLDS + 1) << bits
                index = tl.arange(0, THRESHOLDS)
                thresholds = base + index * step  # [THRESHOLDS]
                if (first_read > 0) & (stage == _TOP_K) & (low == 0) & (has_top_p | (knows == 0)):
                    # The k-th largest may lie below the sample, and nothing says how far: all of fp32 is too wide.
                    gaps = (2 << index).to(tl.float32)  # 2, 4, 8 ..: the first is not used
                    spread = place_of(key_of(largest - gaps), tl.zeros([THRESHOLDS], tl.int32))
                    thresholds = tl.where(index > 0, spread, base)
                counts = (stage == _TOP_K).to(tl.int32)
                below, whole, listed = _read(
                    row_ptr, V, softcap, divisor, largest, counts, floor, thresholds, base, high, scratch_ptr,
                    TOKENS, THRESHOLDS, SCRATCH,
                )  # fmt: skip
                limit = tl.where(counts > 0, V - kept, limit_of(cut, whole))
                below_base = tl.sum(tl.where(index == 0, below, 0), axis=0)
                survives = below_base > limit  # the sample does, this filter
                fits = (listed <= SCRATCH) & (survives == 0)
                if survives & ((counts == 0) | (has_top_p == 0)):
                    # Min-p may still want a larger score than the sample's, and nothing smaller.
                    boundary = tl.where(counts > 0, (sample_place >> TOKEN_BITS) << TOKEN_BITS, sample_place)
                    stage = _SEARCHED + 0 * stage
                else:
                    old_high = high
                    low = tl.max(tl.where(below <= limit, thresholds, low), axis=0)
                    high = tl.min(tl.where(below > limit, thresholds, high), axis=0)
                    if fits & (old_high == top):
                        has_list = 1 + 0 * has_list
                        entries = listed
                        before = below_base
                    else:
                        if fits:
                            place, mass = _list_at(scratch_ptr, listed, largest, SCRATCH)
                            mass = tl.where(counts > 0, (place >= 0).to(tl.int64), mass)
                            if counts > 0:
                                low = _search_list(place, mass, low, high, limit, below_base, TOKEN_BITS)
                            else:
                                low = _search_list(place, mass, low, high, limit, below_base, 0)
                            high = low + 1
                        first_read = first_read * 0
                        if (high - low) >> bits <= 1:
                            first_read = first_read + 1
                            if stage == _TOP_K:
                                floor = low
                                stage = tl.where(has_top_p, _TOP_P, _SEARCHED)
                            else:
                                stage = _SEARCHED + 0 * stage
                            boundary = low

            if has_list > 0:
                list_ptr = scratch_ptr
                if from_tiles > 0:
                    list_ptr = lists_ptr
                place, mass = _list_at(list_ptr, entries, largest, SCRATCH)
                exists = place >= 0
                lowest = tl.min(tl.where(exists, place, top - 1), axis=0)
                decided = 1
                if stage == _TOP_K:
                    ones = exists.to(tl.int64)
                    number = tl.sum(ones, axis=0)
                    lowest_key = (lowest >> TOKEN_BITS) << TOKEN_BITS
                    most = tl.maximum(number - kept, 0)
                    kth = _search_list(place, ones, lowest_key, top, most, number * 0, TOKEN_BITS)
                    boundary = tl.where(number >= kept, kth, 0)
                    before = before * 0
                    if from_tiles > 0:
                        highest_floor = largest_fact(facts_ptr, FLOOR, TILES, FACT_TILES)
                        unlisted = (highest_floor.to(tl.int64) + (1 << 31)) << TOKEN_BITS
                        decided = ((number >= kept) & (unlisted <= boundary)).to(tl.int32)
                if decided > 0:
                    mass = tl.where(place >= boundary, mass, 0)
                    if has_top_p:
                        limit = limit_of(cut, tl.sum(mass, axis=0) + before)
                        boundary = _search_list(place, mass, lowest, top, limit, before, 0)
                    score = score_of_key(key_in(place))
                    alive = (
                        (place >= boundary) & (weight_of(score, largest) >= min_p) & (score > float("-inf")) & exists
                    )
                    total = tl.sum(tl.where(alive, mass, 0), axis=0)
                    if wants_token > 0:
                        listed_token = token_of_place(place)
                        noisy = score + gumbel(words_of(listed_token, seed, position, stream))
                        prize = tl.max(tl.where(alive, prize_of(key_of(noisy), listed_token), -1), axis=0)
                        token = token_of_prize(prize)
                    is_open = 0
                else:
                    # The k-th largest of the listed is not above the k-th largest of all.
                    has_list, from_tiles = has_list * 0, from_tiles * 0
                    low, boundary = boundary, boundary * 0
            else:
                if knows & sample_lives & (sample_place >= boundary):
                    token = sample
                else:
                    prize, total = _last_read(
                        row_ptr,
                        V,
                        softcap,
                        divisor,
                        largest,
                        boundary,
                        min_p,
                        seed,
                        position,
                        stream,
                        wants_token,
                        TOKENS,
                    )
                    if wants_token > 0:
                        token = token_of_prize(prize)
                is_open = 0
    return token, largest, boundary, last, total
