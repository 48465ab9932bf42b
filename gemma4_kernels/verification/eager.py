"""Verification in plain PyTorch: a few requests at a time, row after row, memory for one chunk of rows.

R requests of a chunk, K drafts, V tokens. Rows that a request does not look at (after its drafts, or on a CPU after its
first rejection) cost nothing that could be saved without waiting for the device. Every step is elementwise, a maximum, or
a sum of whole numbers, so a request's tokens do not depend on the chunk that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gemma4_kernels.verification import noise
from gemma4_kernels.verification.filters import (
    Filters,
    Survivors,
    first_largest,
    fixed_sum,
    is_large_row,
    pieces,
    survivors,
    usable,
)
from gemma4_kernels.verification.outcome import Outcome, outcome

CHUNK_ELEMENTS = 2**18
"""Logits worked on at once: one row of Gemma's vocabulary."""

Proposal = tuple[Tensor, Tensor]
"""Tokens (R, K + 1), and how many of them are accepted drafts (R,)."""


@dataclass(frozen=True)
class Chunk:
    """Some of the requests."""

    logits: Tensor
    """(R, K + 1, V)"""
    drafts: Tensor
    """(R, K) int64"""
    num_drafts: Tensor
    """(R,) int64, 0 to K"""
    filters: Filters
    seeds: Tensor
    positions: Tensor
    draft_logits: Tensor | None
    """(R, K, V)"""
    stream: int

    @cached_property
    def usable(self) -> Tensor:
        """(R, K + 1) bool: rows that have a distribution."""
        return usable(self.logits)

    @cached_property
    def usable_drafter(self) -> Tensor | None:
        """(R, K)"""
        return None if self.draft_logits is None or 0 in self.draft_logits.shape else usable(self.draft_logits)

    def refused(self) -> Tensor:
        """(R,) bool: a row that matters has no distribution."""
        row = torch.arange(self.logits.shape[1], device=self.logits.device)
        refused = (~self.usable & (row <= self.num_drafts[:, None])).any(-1)
        if self.usable_drafter is not None:
            refused = refused | (~self.usable_drafter & (row[:-1] < self.num_drafts[:, None])).any(-1)
        return refused

    def target(self, row: int) -> Survivors:
        return survivors(self.logits[:, row], self.filters, self.usable[:, row])

    def drafter(self, row: int) -> Tensor:
        """(R, V) probabilities that the draft of a row had; without draft_logits, 1 for the draft itself."""
        vocab_size = self.logits.shape[-1]
        if self.draft_logits is None or self.usable_drafter is None:
            return torch.nn.functional.one_hot(self.draft(row), vocab_size).to(torch.float32)
        made = survivors(self.draft_logits[:, row], self.filters, self.usable_drafter[:, row])
        return made.probabilities(vocab_size)

    def draft(self, row: int) -> Tensor:
        """(R,) the draft of a row, forced into the vocabulary; `is_draft` says whether it was in there."""
        return self.drafts[:, row].clamp(0, self.logits.shape[-1] - 1)

    def is_draft(self, row: int) -> Tensor:
        """(R,) bool: the request has a draft in this row, and it is a token."""
        if row == self.drafts.shape[1]:
            return torch.zeros_like(self.num_drafts, dtype=torch.bool)
        return (row < self.num_drafts) & (self.drafts[:, row] == self.draft(row))

    def sample(self, distribution: Survivors, row: int) -> Tensor:
        """(R,) argmax of score + Gumbel noise."""
        words = self._words(distribution.ids, row, self.stream)
        return distribution.choose(distribution.scores + noise.gumbel(words))

    def sample_target(self, row: int) -> Tensor:
        """(R,) the target's sample of a row."""
        logits, on_cpu = self.logits[:, row], self.logits.device.type == "cpu"
        if is_large_row(logits) and bool(self.usable[:, row]) and not self.filters.remove_any():
            return self._sample_of_all(logits, row)
        target = self.target(row)
        if on_cpu and bool(self.filters.greedy.all()):  # one token is left, and noise changes nothing
            return target.choose(target.scores)
        return self.sample(target, row)

    def _sample_of_all(self, logits: Tensor, row: int) -> Tensor:
        """(1,) of one row (1, V) whose tokens all stay: the same argmax, with noise only for tokens that can win."""
        largest = torch.stack([scores.amax() for _, scores in pieces(logits, self.filters)]).amax()
        # The largest score has a key above this.
        surpassed = largest + noise.SMALLEST
        ids, scores_of, words_of = [], [], []
        for start, scores in pieces(logits, self.filters):
            stop = start + scores.shape[1]
            words = noise.words_between(self.seeds, self.positions + row, start, stop, self.stream)
            # A token far below needs rare noise, and its word shows without logarithms whether it has that.
            can_win = (scores >= surpassed - noise.RARE) | (words < noise.RARE_WORD)
            which = can_win[0].nonzero().flatten()  # (M,)
            ids.append(which + start)
            scores_of.append(scores[0, which])
            words_of.append(words[0, which])
        keys = torch.cat(scores_of) + noise.gumbel(torch.cat(words_of))
        return first_largest(keys[None], torch.cat(ids)[None])

    def sample_residual(self, residual: Tensor, otherwise: Tensor, row: int) -> Tensor:
        """(R,) argmax of residual / exponential noise, residual (R, V) not normalised; of `otherwise` where it is all 0."""
        mass = torch.where((residual > 0).any(-1, keepdim=True), residual, otherwise)
        if len(mass) == 1 and mass.device.type == "cpu":
            ids = mass[0].nonzero().flatten()[None]
            mass = mass.gather(-1, ids)
        else:
            ids = torch.arange(mass.shape[1], device=mass.device).expand(mass.shape)
        return first_largest(mass / noise.exponential(self._words(ids, row, noise.RESIDUAL)), ids)

    def uniform(self, row: int) -> Tensor:
        """(R,) fp32 in (0, 1), for the decision about the draft of a row."""
        first = torch.zeros(len(self.seeds), 1, dtype=torch.int64, device=self.seeds.device)
        return noise.uniform(noise.words_of(self.seeds, self.positions + row, first, noise.ACCEPTANCE))[:, 0]

    def _words(self, ids: Tensor, row: int, stream: int) -> Tensor:
        vocab_size = self.logits.shape[-1]
        if ids.shape[1] * 4 < vocab_size:
            return noise.words_of(self.seeds, self.positions + row, ids, stream)
        return noise.words_of_all(self.seeds, self.positions + row, vocab_size, stream).gather(-1, ids)

    def nobody(self, concerned: Tensor) -> bool:
        """Whether a step may be skipped because it concerns no request; elsewhere than on a CPU it is never skipped."""
        return concerned.device.type == "cpu" and not bool(concerned.any())


def verify_drafts(
    logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, temperature: Tensor, top_k: Tensor, cut: Tensor,
    min_p: Tensor, softcap: Tensor, seeds: Tensor, positions: Tensor, draft_logits: Tensor | None,
    max_new_tokens: Tensor | None, eos_token_ids: Sequence[int], method: str, stream: int,
) -> Outcome:  # fmt: skip
    batch, rows, vocab_size = logits.shape
    if num_drafts is None:
        num_drafts = torch.full((batch,), rows - 1, device=logits.device)
    num_drafts, drafts = num_drafts.long().clamp(0, rows - 1), draft_tokens.long()
    filters = Filters(temperature, top_k.long(), cut, min_p, softcap)
    proposal = torch.full((batch, rows), -1, dtype=torch.int64, device=logits.device)
    accepted = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    refused = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    together = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, batch, together):
        part = slice(start, start + together)
        chunk = Chunk(
            logits[part], drafts[part], num_drafts[part], Filters(*(x[part] for x in filters)), seeds[part],
            positions[part], None if draft_logits is None or method == "match" else draft_logits[part], stream,
        )  # fmt: skip
        proposal[part], accepted[part] = METHODS[method](chunk)
        refused[part] = chunk.refused()
    return outcome(proposal, accepted, refused, max_new_tokens, eos_token_ids)


def _match(chunk: Chunk) -> Proposal:
    """Sample the target at every row; keep drafts while they equal the samples."""
    proposal, accepted, running = _start(chunk)
    for row in range(proposal.shape[1]):
        sample = chunk.sample_target(row)
        proposal[:, row] = sample
        if row < chunk.drafts.shape[1]:
            running = running & chunk.is_draft(row) & (sample == chunk.drafts[:, row])
            accepted += running
            if chunk.nobody(running):
                break
    return proposal, accepted


def _rejection(chunk: Chunk) -> Proposal:
    """Accept a draft with probability min(1, p / q); after the first that is not, sample from max(p - q, 0)."""
    proposal, accepted, running = _start(chunk)
    for row in range(proposal.shape[1]):
        target, has_draft = chunk.target(row), chunk.is_draft(row)
        own = torch.full_like(accepted, -1)
        if not chunk.nobody(running & ~has_draft):  # all of whose drafts have been accepted
            own = chunk.sample(target, row)
        if row < chunk.drafts.shape[1]:
            p, q, draft = target.probabilities(chunk.logits.shape[-1]), chunk.drafter(row), chunk.draft(row)
            p_draft, q_draft = _at(p, draft), _at(q, draft)
            accepts = running & has_draft & (chunk.uniform(row) * q_draft < p_draft)
            residual = chunk.sample_residual((p - q).clamp(min=0), p, row)
            own = torch.where(has_draft, residual, own)
            own = torch.where(accepts, draft, own)
            accepted += accepts
        else:
            accepts = torch.zeros_like(running)
        proposal[:, row] = torch.where(running, own, -1)
        running = accepts
        if chunk.nobody(running):
            break
    return proposal, accepted


def _block(chunk: Chunk) -> Proposal:
    """Block verification (Sun et al. 2024, algorithm 2): keep the longest block of drafts that is accepted as a whole."""
    proposal, accepted, _ = _start(chunk)
    proposal[:, :-1] = chunk.drafts
    last = torch.zeros_like(accepted)  # the token after the accepted block
    joint = torch.ones(len(accepted), device=accepted.device)  # min(.. min(min(1, p1 / q1) * p2 / q2, 1) .., 1)
    for row in range(proposal.shape[1]):
        # Has the block of the first `row` drafts been accepted, and which token follows it?
        target = chunk.target(row)
        follows, share = torch.full_like(accepted, -1), joint
        if row < chunk.drafts.shape[1]:
            p, q, draft = target.probabilities(chunk.logits.shape[-1]), chunk.drafter(row), chunk.draft(row)
            residual = (joint[:, None] * p - q).clamp(min=0)
            mass = fixed_sum(residual)[:, 0]
            rest = mass + (1.0 - joint)
            partial = torch.where(rest > 0, mass / rest, 1.0)
            more = chunk.is_draft(row)
            share = torch.where(more, partial, joint)
            follows = chunk.sample_residual(residual, p, row)
            p_draft, q_draft = _at(p, draft), _at(q, draft)
            ratio = torch.where(q_draft > 0, p_draft / q_draft, (p_draft > 0).to(torch.float32))
            following = torch.where(more, (joint * ratio).clamp(max=1.0), 0.0)
        else:
            more, following = torch.zeros_like(chunk.num_drafts, dtype=torch.bool), torch.zeros_like(joint)
        if not chunk.nobody(~more & (joint > 0)):  # the block ends here, whole
            follows = torch.where(more, follows, chunk.sample(target, row))
        stays = row <= chunk.num_drafts
        if row:
            stays = stays & (chunk.uniform(row - 1) < share)
        accepted, last = torch.where(stays, row, accepted), torch.where(stays, follows, last)
        joint = following
        if chunk.nobody(joint > 0):
            break
    return proposal.scatter(-1, accepted[:, None], last[:, None]), accepted


METHODS = {"match": _match, "rejection": _rejection, "block": _block}


def _start(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing proposed, nothing accepted, all running."""
    proposal = chunk.drafts.new_full(chunk.logits.shape[:2], -1)
    return proposal, torch.zeros_like(chunk.num_drafts), torch.ones_like(chunk.num_drafts, dtype=torch.bool)


def _at(probabilities: Tensor, tokens: Tensor) -> Tensor:
    return probabilities.gather(-1, tokens[:, None])[:, 0]
