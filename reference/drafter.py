"""The MTP drafter: four layers without keys and values, reading those of the target model.

One step, with the token t at first the bonus token (sampled, not yet in the target's cache) and h at first the target's
hidden state, after its final norm, that produced t:

    x = pre_projection(concat(target_embedding(t), h))
    y = final_norm(layers(x)), which attend to the target's last sliding and last full layer
    draft = argmax(head(y));  next h = post_projection(y);  next t = the draft

Parameter names are those of transformers' `Gemma4UnifiedAssistantForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gemma4_kernels.geometry import LAYER_TYPE, LayerKind
from gemma4_kernels.reference.config import DrafterConfig
from gemma4_kernels.reference.decoder import TextModel
from gemma4_kernels.reference.loading import load_copy, tie_head

SharedKV = dict[str, tuple[Tensor, Tensor]]
PositionRule = Literal["bonus", "last_committed"]
POSITION_RULES = ("bonus", "last_committed")


@dataclass(frozen=True)
class DrafterOutput:
    """One step of the drafter."""

    logits: Tensor
    """(B, S, V)"""
    hidden: Tensor
    """(B, S, target hidden): the projected state that the next step takes in place of the target's."""


@dataclass(frozen=True)
class Draft:
    """Several steps of the drafter."""

    tokens: Tensor
    """(B, K)"""
    logits: Tensor
    """(B, K, V)"""


class CentroidHead(nn.Module):
    """A head that scores only the tokens of the best `top_k` clusters of the vocabulary.

    `token_ordering` lists the tokens cluster after cluster, all of one size. Every other token gets one value, 1 below
    the lowest score of the whole call: it depends on the other rows, but it is never an argmax.
    """

    token_ordering: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, num_centroids: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.centroids = nn.Linear(hidden_size, num_centroids, bias=False)
        self.register_buffer("token_ordering", torch.arange(vocab_size))

    def forward(self, hidden: Tensor, head_weight: Tensor) -> Tensor:
        """(B, S, hidden), (V, hidden) -> logits (B, S, V)."""
        best = self.centroids(hidden).topk(self.top_k, dim=-1).indices  # (B, S, top_k)
        clusters = self.token_ordering.long().view(self.centroids.out_features, -1)
        tokens = clusters[best].flatten(2)  # (B, S, top_k * size of a cluster)
        scores = torch.einsum("bsh,bsth->bst", hidden, head_weight[tokens])
        unscored = float(scores.detach().min()) - 1.0
        return scores.new_full((*hidden.shape[:2], head_weight.shape[0]), unscored).scatter(-1, tokens, scores)


class ReferenceDrafter(nn.Module):
    """The drafter of a `ReferenceModel`."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        text = config.text
        if any(text.owns_kv(layer) for layer in range(len(text.layers))):
            raise ValueError(
                f"num_kv_shared_layers: expected {len(text.layers)}, all layers, got {text.num_kv_shared_layers}"
            )
        self.config = config
        self.model = TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.tied_head:
            tie_head(self, self.model)
        self.pre_projection = nn.Linear(2 * config.target_hidden_size, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, config.target_hidden_size, bias=False)
        self.masked_embedding = (
            CentroidHead(text.hidden_size, text.vocab_size, config.num_centroids, config.centroid_top_k)
            if config.num_centroids
            else None
        )

    @classmethod
    def from_transformers(cls, hf_model: Any, dtype: torch.dtype | None = None) -> ReferenceDrafter:
        """A copy of a `Gemma4UnifiedAssistantForCausalLM`; `dtype` None keeps its own."""
        with torch.device("meta"):
            drafter = cls(DrafterConfig.from_transformers(hf_model.config))
        return load_copy(drafter, drafter.model, hf_model, dtype)

    def logits(self, inputs_embeds: Tensor, **inputs: Any) -> Tensor:
        """The logits of `step`."""
        return self.step(inputs_embeds, **inputs).logits

    def step(
        self,
        inputs_embeds: Tensor,
        *,
        position_ids: Tensor,
        shared_kv_states: SharedKV,
        attention_mask: Tensor | None = None,
    ) -> DrafterOutput:
        """One forward pass; the arguments are those of transformers' `forward`.

        On the full layer every row given is visible. On the sliding layers transformers 5.23 builds a two-sided window
        over the reversed rows, so that query i sees the row at distance n from the newest (n = 0) if
        |i - n| <= window: for one query the newest window + 1 rows, one more than the target itself would see.

        Args:
            inputs_embeds: (B, S, 2 * target hidden): the target's embedding of the token, then the hidden state. S is 1
                but for tests.
            position_ids: (1 or B, S), for the rotation of the queries.
            shared_kv_states: "full_attention" and "sliding_attention" to keys and values (B, Hkv, rows, D) of the
                target. The sliding rows may be fewer: then they are the newest.
            attention_mask: (B, at least the full rows), 0 for rows that are padding.
        Raises: ValueError naming the argument.
        """
        expected_size = self.pre_projection.in_features
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != expected_size:
            raise ValueError(
                f"inputs_embeds: expected (batch, tokens, {expected_size}), got {tuple(inputs_embeds.shape)}"
            )
        batch, num_queries = inputs_embeds.shape[:2]
        if position_ids.shape not in ((1, num_queries), (batch, num_queries)):
            raise ValueError(f"position_ids: expected (1 or {batch}, {num_queries}), got {tuple(position_ids.shape)}")
        for kind in set(self.config.text.layers):
            if LAYER_TYPE[kind] not in shared_kv_states:
                raise ValueError(
                    f"shared_kv_states: expected a {LAYER_TYPE[kind]!r} entry, got {sorted(shared_kv_states)}"
                )

        shared: dict[LayerKind, tuple[Tensor, Tensor]] = {}
        masks: dict[LayerKind, Tensor] = {}
        num_full_rows = shared_kv_states[LAYER_TYPE["full"]][0].shape[2]
        for kind in set(self.config.text.layers):
            keys, values = (rows.transpose(1, 2) for rows in shared_kv_states[LAYER_TYPE[kind]])  # (B, rows, Hkv, D)
            num_rows = keys.shape[1]
            mask = keys.new_ones((batch, num_queries, num_rows), dtype=torch.bool)
            if kind == "sliding":
                from_newest = torch.arange(num_rows - 1, -1, -1, device=keys.device)  # (rows,)
                query_index = torch.arange(num_queries, device=keys.device)[:, None]  # (S, 1)
                mask = mask & ((query_index - from_newest).abs() <= self.config.text.window)
            if attention_mask is not None:
                mask = mask & attention_mask[:, :num_full_rows].bool()[:, None, -num_rows:]
            shared[kind], masks[kind] = (keys, values), mask

        hidden, _ = self.model(self.pre_projection(inputs_embeds), position_ids.expand(batch, -1), masks, shared=shared)
        if self.masked_embedding is None:
            logits = self.lm_head(hidden)
        else:
            logits = self.masked_embedding(hidden, self.lm_head.weight)
        return DrafterOutput(logits, self.post_projection(hidden))

    @torch.no_grad()
    def draft(
        self,
        token: Tensor,
        hidden: Tensor,
        shared_kv_states: SharedKV,
        embed: Callable[[Tensor], Tensor],
        *,
        num_drafts: int,
        num_committed: Tensor | None = None,
        position: PositionRule = "bonus",
        sliding_rows: int | None = None,
    ) -> Draft:
        """K greedy steps for each request, from committed rows only; a request's drafts do not depend on the others.

        With C committed rows the bonus token has index C. All K steps stand at one position: C for "bonus" (as in
        transformers and llama.cpp), C - 1 for "last_committed" (as in vLLM and SGLang).

        Args:
            token: (B,) bonus tokens.
            hidden: (B, target hidden), the target's state after its final norm that produced them.
            shared_kv_states: (B, Hkv, rows, D) as in `step`; row j is the token at index j.
            embed: the target's scaled embedding, `ReferenceModel.embed`.
            num_committed: (B,) rows in use; None: all of them.
            sliding_rows: hand only that many of the newest rows to the sliding layers. None hands them all, of which
                `step` shows window + 1. An engine whose window holds W rows is W here.
        Raises: ValueError naming the argument.
        """
        batch = token.shape[0]
        if num_drafts < 1:
            raise ValueError(f"num_drafts: expected at least 1, got {num_drafts}")
        if position not in POSITION_RULES:
            raise ValueError(f"position: expected one of {POSITION_RULES}, got {position!r}")
        if token.ndim != 1 or hidden.shape != (batch, self.config.target_hidden_size):
            raise ValueError(
                f"token, hidden: expected (batch,) and (batch, {self.config.target_hidden_size}), got"
                f" {tuple(token.shape)} and {tuple(hidden.shape)}"
            )
        if sliding_rows is not None and sliding_rows < 1:
            raise ValueError(f"sliding_rows: expected None or at least 1, got {sliding_rows}")
        num_rows = {name: keys.shape[2] for name, (keys, _) in shared_kv_states.items()}
        if len(set(num_rows.values())) != 1:
            raise ValueError(f"shared_kv_states: expected the same rows for both kinds of layers, got {num_rows}")
        available = min(num_rows.values())
        lengths = [available] * batch if num_committed is None else num_committed.tolist()
        if len(lengths) != batch or not all(1 <= length <= available for length in lengths):
            raise ValueError(f"num_committed: expected {batch} numbers from 1 to {available}, got {lengths}")

        all_tokens, all_logits = [], []
        for request, committed in enumerate(lengths):
            this = slice(request, request + 1)
            rows = {
                name: (keys[this, :, :committed], values[this, :, :committed])
                for name, (keys, values) in shared_kv_states.items()
            }
            if sliding_rows is not None:
                keys, values = rows[LAYER_TYPE["sliding"]]
                rows[LAYER_TYPE["sliding"]] = keys[:, :, -sliding_rows:], values[:, :, -sliding_rows:]
            index = committed if position == "bonus" else committed - 1
            position_ids = torch.tensor([[index]], device=token.device)
            last_token, last_hidden = token[request].view(1, 1), hidden[request].view(1, 1, -1)
            tokens, logits = [], []
            for _ in range(num_drafts):
                out = self.step(
                    torch.cat((embed(last_token), last_hidden), dim=-1),
                    position_ids=position_ids,
                    shared_kv_states=rows,
                )
                last_token, last_hidden = out.logits.argmax(dim=-1), out.hidden
                tokens.append(last_token)
                logits.append(out.logits)
            all_tokens.append(torch.cat(tokens, dim=1))
            all_logits.append(torch.cat(logits, dim=1))
        return Draft(torch.cat(all_tokens), torch.cat(all_logits))
