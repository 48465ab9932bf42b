"""Verification of one request's drafts with keyed noise, by each of the three methods, in float64.

* "match" samples the target at each row and keeps the drafts that equal the samples;
* "rejection" (Leviathan et al. 2023) keeps a draft with probability min(1, p / q) and samples what follows the first that
  it does not keep from max(p - q, 0);
* "block" (Sun et al. 2024, algorithm 2) decides over blocks of drafts as wholes.

p is what the filters leave of the target's row, q what they leave of the drafter's row.

Every decision is an argmax or a comparison. Where the margins are no smaller than the roundings of fp32, an implementation
in fp32 that follows the rules decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma4_kernels.reference.layers import softcap
from gemma4_kernels.reference.noise import DRAFT, RESIDUAL, TARGET, KeyedNoise
from gemma4_kernels.reference.verification import SamplingFilters, filter_logits

METHODS = ("match", "rejection", "block")


@dataclass
class Sampler:
    """Distributions and decisions of one request.

    Raises: ValueError if cap is negative.
    """

    filters: SamplingFilters
    noise: KeyedNoise
    cap: float = 0.0
    margins: list[float] = field(default_factory=list)
    """How far each decision was from going another way: a difference of log-probabilities, or of probabilities."""

    def __post_init__(self) -> None:
        if self.cap < 0:
            raise ValueError(f"cap: expected 0 (none) or a positive number, got {self.cap}")

    def scores(self, logits: Tensor) -> Tensor:
        """(V,) float64, -inf where a filter removes the token; greedy: 0 for the first maximum."""
        capped = softcap(logits.double(), self.cap)
        if self.filters.temperature == 0:
            scores = torch.full_like(capped, -math.inf)
            scores[capped.argmax()] = 0.0
            return scores
        return filter_logits(capped, self.filters, stable=True)

    def sample(self, logits: Tensor, row: int, stream: int = TARGET) -> int:
        """The target's (or the drafter's own) sample."""
        return self._argmax(self.scores(logits) + self.noise.gumbel(row, stream))

    def sample_residual(self, residual: Tensor, p: Tensor, row: int) -> int:
        """A sample of residual (V,), which is not normalised; of p if it is 0 everywhere."""
        mass = residual if bool((residual > 0).any()) else p
        return self._argmax(mass.log() - self.noise.exponential(row, RESIDUAL).log())

    def decides(self, row: int, threshold: float, factor: float = 1.0) -> bool:
        """Whether the uniform number of a row, times a factor, lies below a threshold."""
        u = self.noise.uniform(row) * factor
        self.margins.append(abs(u - threshold) / max(factor, 1e-30))
        return u < threshold

    def _argmax(self, keys: Tensor) -> int:
        best = keys.topk(min(2, len(keys)))
        if len(keys) > 1:
            # A large score has large roundings.
            size = max(1.0, float(best.values[0].abs()) / 16)
            self.margins.append(float(best.values[0] - best.values[1]) / size)
        return int(best.indices[0])


def draft_by_sampling(draft_logits: Tensor, sampler: Sampler) -> list[int]:
    """One token for each row of draft_logits (K, V), with the drafter's own noise."""
    return [sampler.sample(logits, row, DRAFT) for row, logits in enumerate(draft_logits)]


def verify_request(
    logits: Tensor, drafts: list[int], sampler: Sampler, *, method: str = "match", draft_logits: Tensor | None = None,
    eos_token_ids: Collection[int] = (),
) -> tuple[list[int], int]:  # fmt: skip
    """The tokens that a request emits, and how many of them are drafts.

    Args:
        logits: (rows, V), at least one more than drafts; row i follows the bonus token and i drafts.
        drafts: of this request, without padding.
        sampler: filters and noise; collects the margins.
        method: one of METHODS.
        draft_logits: (len(drafts), V) that the drafts were sampled from, by "rejection" and "block"; None: they are sure.
        eos_token_ids: an emitted token among them is the last one.
    Raises: ValueError naming the argument.
    """
    if len(logits) <= len(drafts):
        raise ValueError(f"logits: expected more than {len(drafts)} rows for as many drafts, got {len(logits)}")
    if method == "match":
        tokens, accepted = _match(logits, drafts, sampler)
    elif method in METHODS:
        p = [sampler.scores(row).softmax(-1) for row in logits[: len(drafts)]]  # K of (V,)
        if draft_logits is None:
            q = [torch.nn.functional.one_hot(torch.tensor(token), logits.shape[1]).double() for token in drafts]
        else:
            q = [sampler.scores(row).softmax(-1) for row in draft_logits[: len(drafts)]]
        choose = _rejection if method == "rejection" else _block
        tokens, accepted = choose(p, q, logits[len(drafts)], drafts, sampler)
    else:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for place, token in enumerate(tokens):
        if token in eos_token_ids:
            tokens = tokens[: place + 1]
    return tokens, min(accepted, len(tokens))


def _match(logits: Tensor, drafts: list[int], sampler: Sampler) -> tuple[list[int], int]:
    tokens: list[int] = []
    for row in range(len(drafts) + 1):
        tokens.append(sampler.sample(logits[row], row))
        if row == len(drafts) or tokens[row] != drafts[row]:
            break
    return tokens, len(tokens) - 1


def _rejection(
    p: list[Tensor], q: list[Tensor], behind: Tensor, drafts: list[int], sampler: Sampler
) -> tuple[list[int], int]:
    for row, token in enumerate(drafts):
        if not sampler.decides(row, float(p[row][token]), float(q[row][token])):
            return [*drafts[:row], sampler.sample_residual((p[row] - q[row]).clamp(min=0), p[row], row)], row
    return [*drafts, sampler.sample(behind, len(drafts))], len(drafts)


def _block(
    p: list[Tensor], q: list[Tensor], behind: Tensor, drafts: list[int], sampler: Sampler
) -> tuple[list[int], int]:
    count = len(drafts)
    joint = [1.0]  # p_0 = 1, p_i = min(p_(i-1) * p(draft) / q(draft), 1)
    for row, token in enumerate(drafts):
        p_draft, q_draft = float(p[row][token]), float(q[row][token])
        # A draft that the drafter cannot have drawn is taken as one that it hardly ever draws.
        ratio = p_draft / q_draft if q_draft > 0 else math.inf if p_draft > 0 else 0.0
        joint.append(min(joint[-1] * ratio, 1.0) if joint[-1] > 0 else 0.0)

    def residual(length: int) -> Tensor:
        return (joint[length] * p[length] - q[length]).clamp(min=0)

    accepted = 0
    for length in range(1, count + 1):
        share = joint[count]
        if length < count:
            mass = float(residual(length).sum())
            share = mass / (mass + 1 - joint[length]) if mass + 1 - joint[length] > 0 else 1.0
        if sampler.decides(length - 1, share):
            accepted = length
    if accepted == count:
        return [*drafts, sampler.sample(behind, count)], count
    return [*drafts[:accepted], sampler.sample_residual(residual(accepted), p[accepted], accepted)], accepted
