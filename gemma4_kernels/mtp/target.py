"""What speculative generation asks of a target model, whoever made it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gemma4_kernels.mtp.rows import SharedRows


class Pass(NamedTuple):
    """What a pass of the target leaves for a verification and for the drafter."""

    logits: Tensor
    """(B, S, V), before the softcap."""
    hidden: Tensor
    """(B, S, hidden), after the final norm."""


class Target(Protocol):
    """A model and the state of one batch in it.

    A model that has a method `speculative_target()` gives one of these; transformers' models get
    `integrations.transformers_target.TransformersTarget`.
    """

    device: torch.device
    vocab_size: int
    softcap: float
    """Of the logits; 0 for none."""
    eos_token_ids: tuple[int, ...]
    """Of the model's own configuration."""

    def prefill(
        self, tokens: Tensor, lengths: list[int], *, max_positions: int, tentative_rows: int, inputs: dict[str, Any]
    ) -> Pass:
        """Read whole prompts, tokens (B, S) padded on the right, and commit them. Returns the last row of each: S = 1.

        Args:
            max_positions: the longest text that any request will have, tentative rows included.
            tentative_rows: the most rows that `step` will be given.
            inputs: what else belongs to the prompts: images and the like, in the model's own terms.
        """

    def step(self, tokens: Tensor) -> Pass:
        """Read tokens (B, S) behind the committed ones: the bonus token and its drafts. Nothing is committed."""

    def commit(self, count: Tensor) -> None:
        """Keep the first count (B,) rows of the last `step`."""

    def keep(self, requests: Tensor) -> None:
        """Go on with these requests (R,) of the batch, in this order."""

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., hidden), scaled: what a drafter is fed with."""

    def rows(self) -> SharedRows:
        """The committed rows that a drafter reads."""
