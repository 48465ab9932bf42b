"""Whoever makes the drafts, asked in one way: a `Drafter`, transformers' assistant, or a function of the text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.mtp.drafter import Drafter, DraftSampling, PositionRule
from gemma4_kernels.mtp.prompts import FUNCTION
from gemma4_kernels.mtp.rows import SharedRows
from gemma4_kernels.mtp.target import Target


class DraftContext(NamedTuple):
    """What a `DraftFunction` may look at. A: the requests that are not finished."""

    requests: list[int]
    """(A,) their indices in the batch."""
    texts: list[list[int]]
    """The tokens of each, prompt included; the last one is the bonus token, which the target has not read yet."""
    num_drafts: int
    """K: the most drafts that one of them wants."""
    wanted: list[int]
    """(A,) drafts that each of them wants; what stands behind them is not looked at."""
    hidden: Tensor
    """(A, hidden): the target's state after its final norm that produced the bonus token."""
    rows: Callable[[], SharedRows]
    """The target's committed keys and values."""


DraftFunction = Callable[[DraftContext], Tensor]
"""Returns (A, K) integers, tokens of the target's vocabulary. On the CPU, a negative number among them ends a request's drafts:
it has fewer of them then."""


class DraftsOfRound(NamedTuple):
    """What a round verifies."""

    tokens: Tensor
    """(A, K) int64, tokens of the vocabulary everywhere."""
    logits: Tensor | None
    """(A, K, V) that they were drawn from."""
    lengths: list[int]
    """(A,) how many of them each request has."""


@dataclass(frozen=True)
class Drafting:
    """A source of drafts, bound to its target."""

    source: Drafter | DraftFunction
    target: Target
    samples: bool
    """Draw the drafts instead of taking the most likely ones."""
    position: PositionRule
    sliding_rows: int | None
    num_drafts: int | None
    """What the source's own configuration suggests."""

    @classmethod
    def of(
        cls, drafter: Any, target: Target, method: str, position: PositionRule, sliding_rows: int | None
    ) -> Drafting:
        if hasattr(drafter, "pre_projection") and not isinstance(drafter, Drafter):
            drafter = Drafter.from_model(drafter)
        if not callable(drafter):
            raise TypeError(
                f"{FUNCTION}: drafter must be a Drafter, transformers' assistant, a function or None, got "
                f"{type(drafter).__name__}"
            )
        samples = method != "match" and isinstance(drafter, Drafter)
        suggested = drafter.num_assistant_tokens if isinstance(drafter, Drafter) else None
        return cls(drafter, target, samples, position, sliding_rows, suggested)

    def draft(
        self, wanted: list[int], requests: list[tuple[int, list[int]]], bonus: Tensor, hidden: Tensor,
        sampling: dict[str, Tensor],
    ) -> DraftsOfRound:  # fmt: skip
        """Drafts for A requests.

        Args:
            wanted: how many for each.
            requests: index and text of each.
            bonus: (A,). hidden: (A, hidden).
            sampling: filters, seeds and positions of the first draft, (A,) each.
        """
        num_drafts = max(wanted)
        if isinstance(self.source, Drafter):
            # What the verification does to the target's logits it does to these too, the softcap included.
            draws = DraftSampling(softcap=self.target.softcap, **sampling) if self.samples else None
            drafts = self.source.draft(
                bonus, hidden, SharedRows.of(self.target.rows()), self.target.embed, num_drafts, position=self.position,
                sliding_rows=self.sliding_rows, sampling=draws,
            )  # fmt: skip
            return DraftsOfRound(drafts.tokens, drafts.logits, wanted)
        # Copies: a function may write its guesses behind them.
        indices, texts = [index for index, _ in requests], [list(text) for _, text in requests]
        tokens = self.source(DraftContext(indices, texts, num_drafts, list(wanted), hidden, self.target.rows))
        checks.is_tensor(FUNCTION, "what drafter returned", tokens)
        checks.has_shape(FUNCTION, "what drafter returned", tokens, (len(requests), num_drafts))
        checks.has_dtype(FUNCTION, "what drafter returned", tokens, checks.INTEGERS)
        is_draft = torch.arange(num_drafts, device=tokens.device) < to_device(wanted, tokens.device)[:, None]
        if tokens.device.type == "cpu":
            is_draft &= (tokens >= 0).cumprod(dim=1).bool()
            wanted = is_draft.sum(dim=1).tolist()
        tokens = torch.where(is_draft, tokens, 0)
        checks.values_within(FUNCTION, "a token that drafter returned", tokens, 0, self.target.vocab_size - 1)
        # Out of the vocabulary they must not reach the target's embedding.
        tokens = tokens.clamp(0, self.target.vocab_size - 1)
        return DraftsOfRound(tokens.to(bonus.device, bonus.dtype), None, wanted)


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64, without making the host wait for what the device is doing."""
    tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
