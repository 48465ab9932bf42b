"""How a drafter chooses a token: a dense head, or one that scores only the best clusters of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma4_kernels.linear.api import quantized_argmax, quantized_embedding
from gemma4_kernels.linear.modules import QuantizedLinear
from gemma4_kernels.verification.api import Number, sample_tokens


@dataclass(frozen=True)
class DraftSampling:
    """Drafts are samples, for `verify_drafts` by "rejection" or "block": filters and seeds are those of that call.

    Temperature 0 drafts the first maximum, and returns logits like any other.
    """

    temperature: Number = 1.0
    top_k: int | Tensor = 0
    top_p: Number = 1.0
    min_p: Number = 0.0
    softcap: Number = 0.0
    """That of the call: it acts on the draft's logits too. (A drafter's own logits have none.)"""
    seeds: int | Tensor | None = None
    positions: int | Tensor | None = None
    """Index of the first draft in its text, that of the token that the verification's row 0 predicts. By default
    length + 1, behind the bonus token."""

    def sample(self, logits: Tensor, positions: Tensor) -> Tensor:
        """(B, V), (B,) -> (B,) int64."""
        return sample_tokens(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            softcap=self.softcap, seeds=self.seeds, positions=positions, stream="draft",
        )  # fmt: skip


class CentroidHead(nn.Module):
    """Scores the tokens of the `top_k` clusters whose centroids fit best (E2B, E4B); the other tokens are never drafted.

    `token_ordering` lists the vocabulary cluster after cluster, all of one size. The rows of the head are read for the
    chosen clusters only: top_k * V / C of V.
    """

    token_ordering: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, num_centroids: int, top_k: int) -> None:
        super().__init__()
        self.num_centroids, self.top_k = num_centroids, top_k
        self.centroids = nn.Linear(hidden_size, num_centroids, bias=False)
        self.register_buffer("token_ordering", torch.arange(vocab_size))

    def scores(self, hidden: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
        """(B, hidden) -> tokens (B, T) int64 of the chosen clusters, and their scores (B, T)."""
        best = self.centroids(hidden).topk(self.top_k, dim=-1).indices  # (B, top_k)
        tokens = self.token_ordering.long().view(self.num_centroids, -1)[best].flatten(1)  # (B, T)
        if isinstance(head, QuantizedLinear):
            rows = quantized_embedding(tokens, head.weight, hidden.dtype)  # (B, T, hidden)
        else:
            rows = head.weight[tokens]  # type: ignore[index]
        return tokens, (rows @ hidden[:, :, None]).squeeze(-1)

    def greedy(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """(B,): the token with the largest score, of equals the lowest, as an argmax over the vocabulary would find it."""
        tokens, scores = self.scores(hidden, head)
        last = self.token_ordering.shape[0] - 1
        largest = scores.amax(-1, keepdim=True)  # (B, 1)
        # A row of NaN equals nothing: it drafts the last token, any would do.
        return tokens.masked_fill(scores != largest, last).amin(-1)

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """(B, V), -inf for tokens that are not scored.

        transformers gives those one finite value, 1 below the lowest score of the call. A sampler would draw them, and
        verification needs the distribution that drafts were really drawn from.
        """
        tokens, scores = self.scores(hidden, head)
        logits = scores.new_full((hidden.shape[0], self.token_ordering.shape[0]), float("-inf"))  # (B, V)
        return logits.scatter(-1, tokens, scores)


def greedy_tokens(hidden: Tensor, head: nn.Module, centroids: CentroidHead | None) -> Tensor:
    """(B, hidden) -> (B,) int64, without storing logits where the head's weight is quantised."""
    if centroids is not None:
        return centroids.greedy(hidden, head)
    if isinstance(head, QuantizedLinear) and head.bias is None:
        # -1 is a row of NaN. It must not reach an embedding; token 0 is a draft like another, and will be rejected.
        return quantized_argmax(hidden, head.weight).clamp(min=0)
    logits: Tensor = head(hidden)  # (B, V)
    return logits.argmax(-1)


def all_logits(hidden: Tensor, head: nn.Module, centroids: CentroidHead | None) -> Tensor:
    """(B, hidden) -> (B, V)."""
    if centroids is not None:
        return centroids.logits(hidden, head)
    logits: Tensor = head(hidden)
    return logits
