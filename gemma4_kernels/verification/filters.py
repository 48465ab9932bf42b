"""What temperature, top-k, top-p and min-p leave of a row, for many rows at once, in sums that no order can change.

The order and the tie rules are those of transformers' warpers; where its sort leaves to chance which of equal tokens
top-p removes, the lowest ids go. Probabilities are summed as whole numbers, multiples of
2**-38 of the largest: such sums are exact, so the same tokens survive whatever the chunks, the candidates or the backend.

R rows, M of their tokens; `ids` says which tokens (all V of them, or the few that can survive).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.verification import portable_math

WEIGHT_BITS = 38
"""The largest token weighs 2**38: below 2**62 in sum for 2**24 tokens."""
_CUT_BITS = 31
_CUT_ROUNDING = 64
_LARGE_VOCABULARY = 2048
"""From here on a CPU gains by sorting candidates instead of the vocabulary."""
PIECE = 2**15 - 64
"""Tokens of a large vocabulary that are looked at together. What is made of them stays in a core's cache, the memory for it
is used again and again, where fresh pages would cost more than the sums, and PyTorch gives work of less than 2**15
elements to one thread: with a neighbour on the other core, to wait for a second one would cost more still."""
_BLOCK = 64  # tokens whose maximum stands for them in the search for candidates
_NO_TOKEN = 2**62


class Filters(NamedTuple):
    """One value a request, each (R,)."""

    temperature: Tensor
    """fp32; 0 (or what is no temperature) is greedy."""
    top_k: Tensor
    """int64; 0 for all."""
    cut: Tensor
    """fp32 1 - top_p: the mass that top-p removes; 0 for none."""
    min_p: Tensor
    """fp32"""
    softcap: Tensor
    """fp32; 0 for none."""

    @property
    def greedy(self) -> Tensor:
        return ~(self.temperature > 0)

    def remove_any(self) -> bool:
        """Whether a token of some request may be removed; for a CPU, elsewhere to look would be to wait."""
        filtered = (self.top_k > 0) | (self.cut > 0) | (self.min_p > 0) | self.greedy
        return bool(filtered.any())


class Survivors(NamedTuple):
    """The distribution of R rows: weights / sum(weights) over ids."""

    ids: Tensor
    """(R, M) int64"""
    scores: Tensor
    """(R, M) logits after softcap and temperature."""
    alive: Tensor
    """(R, M)"""
    weights: Tensor
    """(R, M) fp32 exp(score - largest score), 0 where not alive."""

    def probabilities(self, vocab_size: int) -> Tensor:
        """(R, V) fp32."""
        share = self.weights / fixed_sum(self.weights)
        return torch.zeros(share.shape[0], vocab_size, device=share.device).scatter(-1, self.ids, share)

    def choose(self, keys: Tensor) -> Tensor:
        """(R,) the token alive with the largest key, the lowest of those that tie."""
        keys = keys.masked_fill(~self.alive, -torch.inf)
        return first_largest(keys, self.ids)


def first_largest(keys: Tensor, ids: Tensor) -> Tensor:
    """(R,) the lowest of the ids whose key is the largest."""
    best = torch.where(keys == keys.amax(-1, keepdim=True), ids, _NO_TOKEN)
    return best.amin(-1)


def fixed(x: Tensor) -> Tensor:
    """fp32 in [0, 1] as a whole number of 2**-38, rounded down."""
    return (x * 2.0**WEIGHT_BITS).to(torch.int64)


def fixed_sum(x: Tensor) -> Tensor:
    """(R, 1) fp32: the sum of (R, M) numbers in [0, 1]; its bits do not depend on their order."""
    return fixed(x).sum(-1, keepdim=True).to(torch.float32) * 2.0**-WEIGHT_BITS


def usable(logits: Tensor) -> Tensor:
    """(...) bool for logits (..., V): rows without NaN and +inf, and with a token that is not -inf."""
    return logits.amax(-1).isfinite()


def survivors(logits: Tensor, filters: Filters, is_usable: Tensor) -> Survivors:
    """What the filters leave of logits (R, V). Rows that are not usable count as rows of zeros."""
    on_cpu = logits.device.type == "cpu"
    found = None
    if is_large_row(logits) and bool(is_usable):
        found = _candidates(logits, filters)
    if found is not None:
        ids, scores, dropped = found
    else:
        scores = _scores(logits, filters, is_usable)
        ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        dropped = torch.zeros(len(scores), 1, dtype=torch.int64, device=scores.device)
    alive, weights = torch.ones_like(scores, dtype=torch.bool), None
    # Elsewhere, to look would be to wait.
    if not on_cpu or bool((filters.top_k > 0).any()) or bool((filters.cut > 0).any()):
        scores, order = scores.sort(dim=-1, stable=True)  # ascending; of equals, the higher id comes later
        ids = ids.gather(-1, order)
        alive, weights = _top_k_top_p(scores, filters, dropped)
    if weights is None:
        weights = _weights(scores, alive)
    alive = alive & (scores > -torch.inf) & (weights >= filters.min_p[:, None])
    if not on_cpu or bool(filters.greedy.any()):
        first = ids == first_largest(scores, ids)[:, None]
        alive = torch.where(filters.greedy[:, None], first, alive)
    return Survivors(ids, scores, alive, weights.masked_fill(~alive, 0.0))


def is_large_row(logits: Tensor) -> bool:
    """One row of a large vocabulary on a CPU: it pays to look at few of its tokens, and at all of them in pieces."""
    return logits.device.type == "cpu" and len(logits) == 1 and logits.shape[1] >= _LARGE_VOCABULARY


def pieces(logits: Tensor, filters: Filters) -> Iterator[tuple[int, Tensor]]:
    """Scores (1, up to PIECE) of a row (1, V) that is usable, and the token that each piece starts with."""
    score = _score_function(filters, on_cpu=True)
    for start in range(0, logits.shape[1], PIECE):
        yield start, score(logits[:, start : start + PIECE])


def _scores(logits: Tensor, filters: Filters, is_usable: Tensor) -> Tensor:
    """(R, V) after softcap and temperature, fp32 or, of float64, float64."""
    on_cpu = logits.device.type == "cpu"
    if not on_cpu or not bool(is_usable.all()):
        logits = logits.masked_fill(~is_usable[:, None], 0.0)
    return _score_function(filters, on_cpu)(logits)


def _score_function(filters: Filters, on_cpu: bool) -> Callable[[Tensor], Tensor]:
    """Logits (R, any) to scores: softcap, then temperature, as far as there are any."""
    capped = not on_cpu or bool((filters.softcap > 0).any())
    divisor = torch.where(filters.greedy, 1.0, filters.temperature)[:, None]
    divided = not on_cpu or bool((divisor != 1).any())

    def score(logits: Tensor) -> Tensor:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if capped:
            cap = torch.where(filters.softcap > 0, filters.softcap, 1.0)[:, None].to(scores.dtype)
            tanh = torch.tanh if scores.dtype == torch.float64 else portable_math.tanh
            scores = torch.where((filters.softcap > 0)[:, None], cap * tanh(scores / cap), scores)
        if divided:
            # A small temperature may lead out of range, where a difference would be NaN.
            scores = (scores / divisor.to(scores.dtype)).clamp(max=portable_math.FP32_LARGEST)
        return scores

    return score


def _weights(scores: Tensor, alive: Tensor) -> Tensor:
    """fp32 exp(score - largest score), 0 where not alive."""
    return _weights_below(scores, scores.amax(-1, keepdim=True)).masked_fill(~alive, 0.0)


def _weights_below(scores: Tensor, largest: Tensor) -> Tensor:
    return portable_math.exp((scores - largest).to(torch.float32))


def _limit(cut: Tensor, total: Tensor) -> Tensor:
    """(R, 1) floor((cut + 2**-25) * total): what sums up to this, ascending, is removed. cut is taken at 31 bits.

    2**-25 is what the rounding to fp32 may have taken from cut: 7 of 10 equal tokens are 0.7, not more than float(0.7).
    """
    fraction = ((cut.clamp(0, 1) * 2.0**_CUT_BITS).to(torch.int64) + _CUT_ROUNDING).clamp(max=2**_CUT_BITS)[:, None]
    # The product has up to 93 bits.
    high, low = total >> 32, total & 0xFFFFFFFF
    return (high * fraction << (32 - _CUT_BITS)) + (low * fraction >> _CUT_BITS)


def _top_k_top_p(ascending: Tensor, filters: Filters, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Who stays of scores (R, M) in ascending order, and the weights after top-k. `dropped` weighs what came before."""
    size = ascending.shape[1]
    kept = torch.where(filters.top_k > 0, filters.top_k.clamp(max=size), size)
    kth_largest = ascending.gather(-1, (size - kept)[:, None])
    alive = ascending >= kth_largest
    weights = _weights(ascending, alive)
    whole = fixed(weights)
    limit = _limit(filters.cut, whole.sum(-1, keepdim=True) + dropped)
    stays = (whole.cumsum(-1) + dropped > limit) | ~(filters.cut > 0)[:, None]
    stays[:, -1] = True
    return alive & stays, weights


def _candidates(logits: Tensor, filters: Filters) -> tuple[Tensor, Tensor, Tensor] | None:
    """ids and scores (1, M) of tokens of one usable row (1, V) on the CPU among which all survivors are, and the weight
    (1, 1) of the others after top-k; None where nothing removes tokens. Only saves time: with every token a candidate
    the result is the same."""
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    vocab_size, top_k, min_p = logits.shape[1], int(filters.top_k), float(filters.min_p)
    has_top_p = float(filters.cut) > 0
    if not bool(filters.greedy) and not 0 < top_k < vocab_size and not has_top_p and min_p == 0:
        return None
    row = _Row(logits, filters)
    if bool(filters.greedy):
        ids, scores = row.from_score(row.largest)
        return ids[:, :1], scores[:, :1], nothing  # the first one
    if 0 < top_k < vocab_size:
        return *row.from_score(row.threshold(top_k)), nothing
    if has_top_p:
        total = row.total_weight()
        limit = _limit(filters.cut, total)
        for distance in (4.0, 6.0, 8.0, 10.0, 13.0, 16.0, 20.0):
            # All that lies so far below the largest weighs too little to reach the limit: none of it stays.
            ids, scores = row.from_score(row.largest - distance)
            dropped = total - fixed(_weights_below(scores, row.largest)).sum(-1, keepdim=True)
            if bool(dropped <= limit):
                return ids, scores, dropped
        return None
    # What weighs min_p, and a little less, so that no rounding matters.
    return *row.from_score(row.largest + (math.log(min_p) - 0.01)), nothing


class _Row:
    """Scores of one usable row (1, V) on the CPU, looked at in pieces, and the maxima of blocks of its tokens."""

    def __init__(self, logits: Tensor, filters: Filters) -> None:
        self.logits, self.filters = logits, filters
        self.score = _score_function(filters, on_cpu=True)
        maxima = [_maxima_of_blocks(scores[0]) for _, scores in pieces(logits, filters)]
        self.maxima = torch.cat(maxima)  # (blocks,)
        self.largest = self.maxima.amax()

    def from_score(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """ids and scores (1, M) of the tokens that are not below a threshold, in order."""
        blocks = (self.maxima >= threshold).nonzero()  # (blocks, 1)
        ids = (blocks * _BLOCK + torch.arange(_BLOCK)).flatten()
        ids = ids[: len(ids) - int((ids[-_BLOCK:] >= self.logits.shape[1]).sum())]  # the last block may be a short one
        scores = self.score(self.logits[:, ids])
        kept = (scores[0] >= threshold).nonzero().flatten()
        return ids[None, kept], scores[:, kept]

    def threshold(self, top_k: int) -> Tensor:
        """A number that the top_k-th largest score is not below, and not many others are above."""
        if len(self.maxima) >= top_k:
            # top_k blocks have a maximum of at least this, so as many tokens do.
            return self.maxima.topk(top_k).values[-1]
        return self.score(self.logits)[0].topk(top_k).values[-1]

    def total_weight(self) -> Tensor:
        """(1, 1) int64, what all tokens weigh."""
        sums = [fixed(_weights_below(scores, self.largest)).sum(-1) for _, scores in pieces(self.logits, self.filters)]
        return torch.stack(sums).sum(0)[:, None]


def _maxima_of_blocks(scores: Tensor) -> Tensor:
    """(M,) to (blocks of _BLOCK, the last perhaps a short one,)."""
    whole = len(scores) // _BLOCK * _BLOCK
    maxima = scores[:whole].view(-1, _BLOCK).amax(-1)
    return maxima if whole == len(scores) else torch.cat((maxima, scores[whole:].amax()[None]))
