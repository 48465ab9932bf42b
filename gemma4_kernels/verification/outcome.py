"""From the tokens that a method proposes to what a request emits: end of text, budget, refusal; no sync anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Outcome = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def outcome(
    proposal: Tensor, accepted: Tensor, refused: Tensor, max_new_tokens: Tensor | None, eos_token_ids: Sequence[int]
) -> Outcome:
    """Cut a proposal and say where it leaves the request.

    Args:
        proposal: (B, K + 1) int64: the drafts that were accepted, then one token of the target's; then anything.
        accepted: (B,) int64, how many drafts.
        refused: (B,) bool: emits nothing.
        max_new_tokens: (B,) or None.
    Returns: what the op returns, in its order.
    """
    column = torch.arange(proposal.shape[1], device=proposal.device)
    proposed = torch.where(refused, 0, accepted + 1)
    if max_new_tokens is not None:
        proposed = torch.minimum(proposed, max_new_tokens.long().clamp(min=0))
    is_proposed = column < proposed[:, None]
    ends = torch.zeros_like(is_proposed)
    for token in eos_token_ids:
        ends |= proposal == token
    ends &= is_proposed
    emitted = is_proposed & (ends.cumsum(-1) - ends.long() == 0)
    num_emitted = emitted.sum(-1)
    last = (num_emitted - 1).clamp(min=0)
    next_token = torch.where(num_emitted > 0, proposal.gather(-1, last[:, None])[:, 0], -1)
    return (
        torch.where(emitted, proposal, -1),
        torch.minimum(accepted, num_emitted),
        next_token,
        num_emitted,
        last,
        (ends & emitted).any(-1),
        refused,
    )
