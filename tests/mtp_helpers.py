"""A small target and its drafter, and what the drafter reads after the target has committed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from small_models import WINDOW, mtp_pair, random_ids
from torch import Tensor

from gemma4_kernels import RingCache
from gemma4_kernels.mtp.rows import LayerRows, SharedRows

LAST_FULL_LAYER = 5


@cache
def pair(ordered_embeddings: bool = False) -> tuple[Any, Any]:
    """Shared by the tests of a process: none of them may change it."""
    return mtp_pair(ordered_embeddings=ordered_embeddings)


@dataclass(frozen=True)
class Committed:
    """A batch after a verification: the arguments of `Drafter.draft`, and the same rows as transformers has them."""

    tokens: Tensor
    hidden: Tensor
    rows: SharedRows
    embed: Callable[[Tensor], Tensor]
    hf_rows: dict[str, tuple[Tensor, Tensor]]
    """(B, Hkv, rows, D): rows behind a request's length are there too, those of tokens that were rejected."""

    @property
    def arguments(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "hidden": self.hidden, "rows": self.rows, "embed": self.embed}

    def to(self, dtype: torch.dtype) -> Committed:
        """`embed` stays that of the target, rounded."""
        hf_rows = {name: (keys.to(dtype), values.to(dtype)) for name, (keys, values) in self.hf_rows.items()}
        rows = shared_rows(hf_rows, self.rows.lengths)
        return Committed(self.tokens, self.hidden.to(dtype), rows, lambda ids: self.embed(ids).to(dtype), hf_rows)


def committed(target: Any, lengths: list[int], rejected: int = 0) -> Committed:
    """Requests with that many committed rows, and rows of `rejected` more tokens behind the longest."""
    ids = random_ids(len(lengths), max(lengths) + rejected)
    out = target(ids, return_shared_kv_states=True, output_hidden_states=True)
    request, last = torch.arange(len(lengths)), torch.tensor(lengths) - 1
    hf_rows = dict(out.shared_kv_states)
    return Committed(
        out.logits[request, last].argmax(-1), out.hidden_states[-1][request, last],
        shared_rows(hf_rows, torch.tensor(lengths, dtype=torch.int32)), target.model.embed_tokens, hf_rows,
    )  # fmt: skip


def shared_rows(hf_rows: dict[str, tuple[Tensor, Tensor]], lengths: Tensor) -> SharedRows:
    layers = (
        LayerRows(*(rows.transpose(1, 2) for rows in hf_rows[f"{kind}_attention"])) for kind in ("sliding", "full")
    )
    return SharedRows(*layers, lengths)


def values_only(rows: SharedRows, target: Any) -> SharedRows:
    """The full layer as a V-only cache holds it."""
    weight = target.model.layers[LAST_FULL_LAYER].self_attn.k_norm.weight
    inv_freq = target.model.rotary_emb.full_attention_inv_freq
    return replace(rows, full=LayerRows(None, rows.full.values, None, weight, inv_freq))


def in_pages(rows: LayerRows, page_size: int) -> LayerRows:
    """Dense rows as pages in scrambled order; pages that nobody owns hold NaN."""
    batch, size = rows.values.shape[:2]
    per_request = -(-size // page_size)
    order = torch.randperm(2 * batch * per_request, generator=torch.Generator().manual_seed(3))
    order = order[: batch * per_request]

    def paged(dense: Tensor) -> Tensor:
        padded = dense.new_full((batch, per_request * page_size, *dense.shape[2:]), torch.nan)
        padded[:, :size] = dense
        pages = dense.new_full((2 * batch * per_request, page_size, *dense.shape[2:]), torch.nan)
        pages[order] = padded.view(batch * per_request, page_size, *dense.shape[2:])
        return pages

    keys = None if rows.keys is None else paged(rows.keys)
    return replace(rows, keys=keys, values=paged(rows.values), block_table=order.view(batch, -1).int())


def in_a_ring(rows: LayerRows, written: list[int], tentative_rows: int, page_size: int) -> LayerRows:
    """Dense rows as a ring holds them after `written[b]` rows of request b have been written."""
    assert rows.keys is not None
    batch, size, heads, head_dim = rows.values.shape
    ring = RingCache.allocate(
        batch, WINDOW, heads, head_dim, dtype=rows.values.dtype, page_size=page_size, tentative_rows=tentative_rows
    )
    for request, count in enumerate(written):
        for position in range(count):  # later rows take the place of earlier ones
            place = position % ring.capacity
            ring.k[request, place], ring.v[request, place] = (
                rows.keys[request, position],
                rows.values[request, position],
            )
    keys, values = ring.pages()
    return LayerRows(keys, values, ring.block_table(size))
