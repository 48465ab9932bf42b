"""Calls of the prologue, and what transformers' own modules make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import k_eq_v_norm_rope_append, qkv_norm_rope_append
from gemma4_kernels.bench import inputs as draw

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass
class Layer:
    """Raw projections of one layer, its weights and its rotation."""

    q: Tensor  # (B, S, Hq, D)
    k: Tensor  # (B, S, Hkv, D)
    v: Tensor  # (B, S, Hkv, D); k itself where K is a function of V
    q_weight: Tensor  # (D,)
    k_weight: Tensor  # (D,)
    cos: Tensor  # (B, S, D)
    sin: Tensor  # (B, S, D)
    lengths: Tensor  # (B,) rows in use before the call

    @property
    def k_eq_v(self) -> bool:
        return self.v is self.k

    def caches(self, capacity: int, fill: float = float("nan")) -> list[Tensor]:
        """One or two contiguous caches that hold nothing but `fill`."""
        batch, _, heads, head_dim = self.k.shape
        return [self.k.new_full((batch, capacity, heads, head_dim), fill) for _ in range(1 if self.k_eq_v else 2)]

    def append(self, caches: list[Tensor], block_table: Tensor | None = None, **changes: Any) -> Tensor:
        """The public function."""
        places = {"cache_seqlens": self.lengths, "block_table": block_table} | changes
        if self.k_eq_v:
            return k_eq_v_norm_rope_append(self.q, self.k, self.q_weight, self.cos, self.sin, *caches, **places)
        return qkv_norm_rope_append(
            self.q, self.k, self.v, self.q_weight, self.k_weight, self.cos, self.sin, *caches, **places
        )

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """q, and the new rows of each cache, by transformers' modules."""
        from transformers.models.gemma4_unified.modeling_gemma4_unified import apply_rotary_pos_emb

        q = apply_rotary_pos_emb(_norm(self.q, self.q_weight), self.cos, self.sin, unsqueeze_dim=2)
        v = _norm(self.v, None)
        if self.k_eq_v:
            return q, [v]
        return q, [apply_rotary_pos_emb(_norm(self.k, self.k_weight), self.cos, self.sin, unsqueeze_dim=2), v]


@torch.no_grad()
def _norm(x: Tensor, weight: Tensor | None) -> Tensor:
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedRMSNorm

    module = Gemma4UnifiedRMSNorm(x.shape[-1], with_scale=weight is not None)
    if weight is not None:
        module.weight.data = weight
    return module(x)


def written(caches: list[Tensor], layer: Layer) -> list[Tensor]:
    """The new rows (B, S, Hkv, D) of contiguous caches."""
    rows = layer.lengths.long()[:, None] + torch.arange(layer.k.shape[1])
    return [cache[torch.arange(len(rows))[:, None], rows] for cache in caches]


def sliding_layer(dtype: torch.dtype, batch: int = 2, rows: int = 3, **shape: int) -> Layer:
    """A small sliding layer: 4 heads of 64 over 2 unless told otherwise, q, k and v slices of one merged projection."""
    return _layer(dtype, batch, rows, fraction=1.0, theta=1e4, k_eq_v=False, **shape)


def full_layer(dtype: torch.dtype, batch: int = 2, rows: int = 3, **shape: int) -> Layer:
    """A small full layer with K = V, a quarter of its pairs rotated."""
    return _layer(dtype, batch, rows, fraction=0.25, theta=1e6, k_eq_v=True, **({"hkv": 1} | shape))


def _layer(
    dtype: torch.dtype, batch: int, rows: int, fraction: float, theta: float, k_eq_v: bool, hq: int = 4, hkv: int = 2,
    d: int = 64, seed: int = 0,
) -> Layer:  # fmt: skip
    rng = draw.generator(seed)
    # Projections have a scale of their own for each token and head.
    scale = torch.exp(0.7 * torch.randn((batch, rows, hq + 2 * hkv, 1), generator=rng))
    merged = (scale * torch.randn((batch, rows, hq + 2 * hkv, d), generator=rng)).to(dtype)
    q, k, v = merged.split([hq, hkv, hkv], dim=2)
    lengths = torch.randint(0, 5, (batch,), generator=rng, dtype=torch.int32)
    position = lengths[:, None] * 1000 + torch.arange(rows)  # (B, S)
    angle = position[..., None].float() * draw.inv_freq(d, fraction, theta)  # (B, S, D / 2)
    angle = torch.cat((angle, angle), dim=-1)
    return Layer(
        q, k, k if k_eq_v else v, 1 + 0.2 * torch.randn(d, generator=rng), draw.k_norm_weight(d, rng),
        angle.cos().to(dtype), angle.sin().to(dtype), lengths,
    )  # fmt: skip


def with_exact_sums(layer: Layer) -> Layer:
    """The same layer with small integers in the projections: their squares sum exactly in fp32, in whatever order."""
    rng = draw.generator(7)
    merged = torch.randint(
        -8, 9, (*layer.q.shape[:2], layer.q.shape[2] + 2 * layer.k.shape[2], layer.q.shape[3]), generator=rng
    )
    q, k, v = merged.to(layer.q.dtype).split([layer.q.shape[2], layer.k.shape[2], layer.k.shape[2]], dim=2)
    return Layer(
        q, k, k if layer.k_eq_v else v, layer.q_weight, layer.k_weight, layer.cos, layer.sin, layer.lengths
    )  # fmt: skip


KINDS = {
    "sliding": lambda dtype, **shape: sliding_layer(dtype, **shape),
    "full": lambda dtype, **shape: full_layer(dtype, **shape),
}
GEMMA = {"sliding": {"hq": 16, "hkv": 8, "d": 256}, "full": {"hq": 16, "hkv": 1, "d": 512}}
"""The shapes of the 12B."""


def assert_rows_keep_their_bits_alone(layer: Layer) -> None:
    """Each row of a batch of 2 x 5 has the bits that it has alone, with B and S having changed places in memory."""
    caches = layer.caches(12)
    out, rows = layer.append(caches), written(caches, layer)
    for request in range(2):
        for row in range(5):
            one = (slice(request, request + 1), slice(row, row + 1))
            q, k, v = (x[one].transpose(0, 1).contiguous().transpose(0, 1) for x in (layer.q, layer.k, layer.v))
            alone = replace(
                layer, q=q, k=k, v=k if layer.k_eq_v else v, cos=layer.cos[one], sin=layer.sin[one],
                lengths=torch.tensor([2]),
            )  # fmt: skip
            single = alone.caches(4)
            assert torch.equal(alone.append(single), out[one])
            for got, want in zip(single, rows, strict=True):
                assert torch.equal(got[:, 2:3], want[one])


def assert_leaves_out_rows_beyond(
    backend: Any, layer: Layer, lengths: list[int], table: list[list[int]] | None, kept: list[int]
) -> Tensor:
    """Calls a backend's own function, which nobody checked numbers for: of each request so many rows are written, and nothing
    else of a larger tensor. Returns q."""
    caches = layer.caches(8, fill=3.0)
    guarded = [torch.full((6, *cache.shape[1:]), 3.0, dtype=cache.dtype) for cache in caches]
    inner = [whole[2:4] if table is None else whole[2:4].view(4, 4, *whole.shape[2:]) for whole in guarded]
    block_table = None if table is None else torch.tensor(table)
    name = "k_eq_v_norm_rope_append" if layer.k_eq_v else "qkv_norm_rope_append"
    raw = (layer.q, layer.k, layer.q_weight) if layer.k_eq_v else (
        layer.q, layer.k, layer.v, layer.q_weight, layer.k_weight
    )  # fmt: skip
    out: Tensor = getattr(backend, name)(*raw, layer.cos, layer.sin, *inner, torch.tensor(lengths), block_table, 1e-6)
    for whole in guarded:
        changed = (whole != 3.0).any(dim=-1).any(dim=-1)  # (6, 8)
        assert not changed[:2].any()
        assert not changed[4:].any()
        assert int(changed.sum()) == sum(kept)
    return out
