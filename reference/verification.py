"""Filtering, sampling, and the verification of drafts.

The target model has run on the bonus token and K drafts, so row i of its logits (K + 1, V) predicts what draft i should
have been. Verification samples the target's own token at every row (its argmax at temperature 0), keeps the drafts as
long as they equal the samples, and emits the first sample that differs, or the sample of the last row if none does.
Every emitted token is a sample of the target, so the text has the target's distribution; and with noise that is keyed
by position, it is the very text that plain decoding gives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_kernels.reference.layers import compute_dtype


@dataclass(frozen=True)
class SamplingFilters:
    """What shapes the distribution that is sampled from. The default is the plain softmax.

    Raises: ValueError naming the field.
    """

    temperature: float = 1.0
    """0 is greedy: the first maximum, and the filters do not matter."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or a number of tokens"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {value}")


GREEDY = SamplingFilters(temperature=0.0)
RECOMMENDED = SamplingFilters(temperature=1.0, top_k=64, top_p=0.95)
"""What Gemma 4's generation configuration asks for."""


def filter_logits(logits: Tensor, filters: SamplingFilters, stable: bool = False) -> Tensor:
    """Logits divided by the temperature, with -inf for every token that a filter removes.

    The order and the treatment of ties are those of transformers' warpers, each acting on what the ones before it left:

    * temperature divides;
    * top_k removes what is below the k-th largest: tokens that tie with it all stay;
    * top_p sorts ascending and removes the tokens whose cumulative probability is at most 1 - top_p, so that a tie at
      the threshold is decided by the order of the sort; the largest always stays;
    * min_p removes what is less probable than min_p times the most probable token.

    Args:
        logits: (..., V), any floating dtype.
        filters: temperature must not be 0.
        stable: of tokens that tie at top_p's threshold the lowest ids go; otherwise the sort's order is chance.
    Returns: (..., V) float32, or float64 for float64.
    """
    if filters.temperature == 0:
        raise ValueError("temperature: expected a positive number, greedy decoding has no distribution to filter")
    scores = logits.to(compute_dtype(logits.dtype)) / filters.temperature
    vocab_size = scores.shape[-1]
    if filters.top_k:
        kth_largest = scores.topk(min(filters.top_k, vocab_size), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth_largest, -math.inf)
    if filters.top_p < 1:
        ascending, order = scores.sort(dim=-1, stable=stable)
        remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - filters.top_p
        remove[..., -1] = False
        scores = scores.masked_fill(torch.zeros_like(remove).scatter(-1, order, remove), -math.inf)
    if filters.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        largest = probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < filters.min_p * largest, -math.inf)
    return scores


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Tensor:
    """Gumbel noise of one sampling decision, a function of nothing but (seed, position, token): (V,) float64.

    `position` is the index in the sequence of the token that is sampled.
    """
    # torch's generator gives related streams for neighbouring seeds no guarantee; a hash does.
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    uniform = torch.rand(vocab_size, generator=generator, dtype=torch.float64)
    # rand may return 0, whose logarithm is not a number to compare.
    return -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))


def sample_tokens(logits: Tensor, filters: SamplingFilters, noise: Tensor | None = None) -> Tensor:
    """One token for each row: the argmax, or a sample by the Gumbel trick, argmax(filtered logits + noise).

    Args:
        logits: (..., V).
        noise: (..., V) independent Gumbel noise; None only at temperature 0.
    Returns: (...) int64.
    Raises: ValueError naming the argument.
    """
    if filters.temperature == 0:
        return logits.argmax(dim=-1)
    if noise is None or noise.shape != logits.shape:
        got = None if noise is None else tuple(noise.shape)
        raise ValueError(f"noise: expected the logits' shape {tuple(logits.shape)}, got {got}")
    # Added in the noise's own precision, so that float64 noise breaks ties that float32 would keep.
    return (filter_logits(logits, filters) + noise.to(logits.device)).argmax(dim=-1)


@dataclass(frozen=True)
class Verification:
    """What a verification emits."""

    tokens: Tensor
    """(B, K + 1) int64, padded with -1: the accepted drafts, then one token of the target's own."""
    num_accepted: Tensor
    """(B,) int64, drafts among them."""


def verify_drafts(
    logits: Tensor,
    draft_tokens: Tensor,
    num_drafts: Tensor | None = None,
    *,
    filters: SamplingFilters = GREEDY,
    noise: Tensor | None = None,
    eos_token_ids: Collection[int] = (),
) -> Verification:
    """Sample the target at every row and keep the drafts that match.

    Args:
        logits: (B, K + 1, V); row i follows the bonus token and i drafts.
        draft_tokens: (B, K) integers.
        num_drafts: (B,) how many of a request's K drafts are real; None: all. Rows after them are not looked at.
        filters: temperature 0 accepts a draft if it is the argmax.
        noise: (B, K + 1, V) Gumbel noise for the samples, `gumbel_noise` of the position of each; not used when greedy.
        eos_token_ids: an emitted token among them is the last one that is emitted.
    Raises: ValueError, TypeError naming the argument.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits: expected (batch, drafts + 1, vocabulary), got shape {tuple(logits.shape)}")
    batch, num_rows, _ = logits.shape
    if draft_tokens.shape != (batch, num_rows - 1):
        raise ValueError(f"draft_tokens: expected {(batch, num_rows - 1)}, got {tuple(draft_tokens.shape)}")
    if draft_tokens.is_floating_point():
        raise TypeError(f"draft_tokens: expected integers, got {draft_tokens.dtype}")
    lengths = [num_rows - 1] * batch if num_drafts is None else num_drafts.tolist()
    if len(lengths) != batch or not all(0 <= length < num_rows for length in lengths):
        raise ValueError(f"num_drafts: expected {batch} numbers from 0 to {num_rows - 1}, got {lengths}")

    samples = sample_tokens(logits, filters, noise)  # (B, K + 1)
    tokens = torch.full_like(samples, -1)
    num_accepted = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    for request, length in enumerate(lengths):
        for row in range(length + 1):
            sample = int(samples[request, row])
            tokens[request, row] = sample
            accepted = row < length and sample == int(draft_tokens[request, row])
            num_accepted[request] += accepted
            if not accepted or sample in eos_token_ids:
                break
    return Verification(tokens, num_accepted)
