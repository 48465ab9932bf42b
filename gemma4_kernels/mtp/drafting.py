"""Whoever makes the drafts, asked in one way: a `Drafter`, transformers' assistant, or a function of the text so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.mtp.drafter import Drafter, DraftSampling, PositionRule
from gemma4_kernels.mtp.rows import SharedRows
from gemma4_kernels.mtp.target import Target

FUNCTION = "generate"


class DraftContext(NamedTuple):
    """What a `DraftFunction` may look at. A: the requests that are not finished."""

    requests: list[int]
    """(A,) their indices in the batch."""
    texts: list[list[int]]
    """The tokens of each, prompt included; the last one is the bonus token, which the target has not read yet."""
    num_drafts: int
    """K: drafts wanted of each. What a request does not want is not looked at."""
    hidden: Tensor
    """(A, hidden): the target's state after its final norm that produced the bonus token."""
    rows: Callable[[], SharedRows]
    """The target's committed keys and values."""


DraftFunction = Callable[[DraftContext], Tensor]
"""Returns (A, K) integers, tokens of the target's vocabulary."""


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
        self, num_drafts: int, requests: list[tuple[int, list[int]]], bonus: Tensor, hidden: Tensor,
        sampling: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """K drafts for each of A requests: tokens (A, K), and the logits (A, K, V) that they were drawn from or None.

        Args:
            requests: index and text of each.
            bonus: (A,). hidden: (A, hidden).
            sampling: filters, seeds and positions of the first draft, (A,) each.
        """
        if isinstance(self.source, Drafter):
            # What the verification does to the target's logits it does to these too, the softcap included.
            draws = DraftSampling(softcap=self.target.softcap, **sampling) if self.samples else None
            drafts = self.source.draft(
                bonus, hidden, SharedRows.of(self.target.rows()), self.target.embed, num_drafts, position=self.position,
                sliding_rows=self.sliding_rows, sampling=draws,
            )  # fmt: skip
            return drafts.tokens, drafts.logits
        indices, texts = [index for index, _ in requests], [text for _, text in requests]
        tokens = self.source(DraftContext(indices, texts, num_drafts, hidden, self.target.rows))
        checks.is_tensor(FUNCTION, "what drafter returned", tokens)
        checks.has_shape(FUNCTION, "what drafter returned", tokens, (len(requests), num_drafts))
        checks.has_dtype(FUNCTION, "what drafter returned", tokens, checks.INTEGERS)
        checks.values_within(FUNCTION, "a token that drafter returned", tokens, 0, self.target.vocab_size - 1)
        return tokens.to(bonus.device, bonus.dtype), None
