"""The promise of decode kernels, checked on whatever device and size: a row's bits depend on its own keys and their places."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_kernels import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.bench import inputs as draw

ROWS = 16


class Setting(NamedTuple):
    """Where and how large."""

    device: str
    dtype: torch.dtype
    hq: int
    hkv: int
    d: int
    keys: int
    window: int
    """Neighbours to the left; -1 for no window."""

    def drawn(self, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
        """q (batch, ROWS, hq, d), k, v (batch, keys, hkv, d)"""
        rng = draw.generator(seed)
        made = [
            draw.rows(draw.queries, (batch, ROWS, self.hq, self.d), rng, self.dtype),
            draw.rows(draw.keys, (batch, self.keys, self.hkv, self.d), rng, self.dtype),
            draw.rows(draw.values, (batch, self.keys, self.hkv, self.d), rng, self.dtype),
        ]
        return [x.to(self.device) for x in made]

    def weights(self) -> list[torch.Tensor]:
        """k_norm_weight (d,) and inv_freq (d / 2,)"""
        return [draw.k_norm_weight(self.d, draw.generator(1)).to(self.device), draw.inv_freq(self.d).to(self.device)]

    @property
    def options(self) -> dict:
        return {"softmax_scale": 1.0, "window_size": (self.window, 0)}


def assert_rows_alone(setting: Setting) -> None:
    """Each of 16 rows, alone over its own keys, keeps its bits; so do five of them."""
    q, k, v = setting.drawn()
    out, lse = flash_attn_func(q, k, v, **setting.options, return_lse=True)
    for first, stop in [*((row, row + 1) for row in (0, 1, 7, 15)), (11, 16)]:
        end = setting.keys - ROWS + stop
        part, part_lse = flash_attn_func(q[:, first:stop], k[:, :end], v[:, :end], **setting.options, return_lse=True)
        assert torch.equal(part, out[:, first:stop])
        assert torch.equal(part_lse, lse[..., first:stop])


def assert_k_eq_v_rows_alone(setting: Setting) -> None:
    q, _, values = setting.drawn()
    out, lse = k_eq_v_attention(q, values, *setting.weights(), return_lse=True)
    for first, stop in [*((row, row + 1) for row in (0, 1, 7, 15)), (11, 16)]:
        end = setting.keys - ROWS + stop
        part, part_lse = k_eq_v_attention(q[:, first:stop], values[:, :end], *setting.weights(), return_lse=True)
        assert torch.equal(part, out[:, first:stop])
        assert torch.equal(part_lse, lse[..., first:stop])


def assert_any_batch(setting: Setting) -> None:
    """In any company, at any place, whatever the others hold, and packed."""
    q, k, v = setting.drawn(batch=3)
    rows = 5
    q = q[:, :rows]
    lengths = torch.tensor([rows + 12, setting.keys, setting.keys // 2], dtype=torch.int32, device=setting.device)
    together = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **setting.options)
    order = torch.tensor([2, 0, 1], device=setting.device)
    permuted = flash_attn_with_kvcache(q[order], k[order], v[order], cache_seqlens=lengths[order], **setting.options)
    assert torch.equal(permuted, together[order])
    for b, length in enumerate(lengths.tolist()):
        alone = flash_attn_func(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], **setting.options)
        assert torch.equal(alone[0], together[b])
    packed_k, packed_v = (torch.cat([x[b, :length] for b, length in enumerate(lengths.tolist())]) for x in (k, v))
    cu_q = torch.arange(4, dtype=torch.int32, device=setting.device) * rows
    cu_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = flash_attn_varlen_func(
        q.flatten(0, 1), packed_k, packed_v, cu_q, cu_k, rows, setting.keys, **setting.options
    )
    assert torch.equal(packed.unflatten(0, (3, rows)), together)


def assert_pages(setting: Setting, page_size: int) -> None:
    """Pages in any order, with NaN where no length reaches."""
    q, k, v = setting.drawn(batch=2)
    q = q[:, :5]
    lengths = torch.tensor([setting.keys - 3, setting.keys // 2], dtype=torch.int32, device=setting.device)
    k_pages, table = draw.scattered_pages(k.cpu(), page_size, draw.generator(5))
    v_pages, _ = draw.scattered_pages(v.cpu(), page_size, draw.generator(5))
    k_pages, v_pages, table = (x.to(setting.device) for x in (k_pages, v_pages, table))
    options = {"cache_seqlens": lengths, **setting.options}
    assert torch.equal(
        flash_attn_with_kvcache(q, k_pages, v_pages, block_table=table, **options),
        flash_attn_with_kvcache(q, k, v, **options),
    )
    assert torch.equal(
        k_eq_v_attention(q, v_pages, *setting.weights(), cache_seqlens=lengths, block_table=table),
        k_eq_v_attention(q, v, *setting.weights(), cache_seqlens=lengths),
    )


def assert_padding_in_front(setting: Setting, padding: int = 37) -> None:
    """Tiles and chunks are counted from the first key that is there."""
    q, k, v = setting.drawn()
    padded_k, padded_v = (torch.cat((torch.full_like(x[:, :padding], float("nan")), x), dim=1) for x in (k, v))
    ids = torch.full((1, padding + setting.keys), -1, dtype=torch.int32, device=setting.device)
    ids[:, :padding] = -2
    expected = flash_attn_func(q, k, v, **setting.options)
    assert torch.equal(flash_attn_func(q, padded_k, padded_v, **setting.options, block_ids=ids), expected)
    leftpad = torch.tensor([padding], dtype=torch.int32, device=setting.device)
    assert torch.equal(
        flash_attn_with_kvcache(q, padded_k, padded_v, cache_leftpad=leftpad, **setting.options), expected
    )
