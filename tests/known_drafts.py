"""Drafts of a source that knows how the texts go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma4_kernels.mtp import DraftContext


def known_drafts(context: DraftContext, texts: Sequence[list[int]], behind: int = 1) -> Tensor:
    """(A, K): what follows in texts, prompts and answers by request; `behind` where a text is over."""
    count = context.num_drafts
    return torch.tensor(
        [
            (texts[request] + [behind] * count)[len(text) : len(text) + count]
            for request, text in zip(context.requests, context.texts, strict=True)
        ]
    )


def known_places(context: DraftContext) -> Tensor:
    """(A, K): the index in its text of each draft."""
    return torch.tensor([len(text) for text in context.texts])[:, None] + torch.arange(context.num_drafts)
