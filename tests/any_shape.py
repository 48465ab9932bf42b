"""Checks on shapes, strides, masks and lengths that hypothesis draws, for whichever backend serves them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from gemma4_kernels import flash_attn_func, flash_attn_with_kvcache, k_eq_v_attention, reference
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.errors import judge

HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (16, 8)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def strided(x: torch.Tensor, kind: int) -> torch.Tensor:
    """The same numbers, laid out otherwise: heads first, or every second row of something larger."""
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        return torch.repeat_interleave(x, 2, dim=1)[:, ::2]
    return x


def block_layout(data: st.DataObject, keys: int) -> torch.Tensor:
    """Runs of tokens: of none, of padding, or of a block."""
    ids, number = [], 0
    while len(ids) < keys:
        run, kind = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([-1, -1, -2, 0]))
        ids += [number if kind == 0 else kind] * run
        number += 1
    return torch.tensor(ids[:keys], dtype=torch.int32)


def attention_keeps_the_error_rule(data):
    heads, kv_heads = data.draw(HEADS)
    batch, rows, keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    dim, dtype = data.draw(st.sampled_from([1, 2, 8, 24, 64])), data.draw(DTYPES)
    left, right = data.draw(st.integers(-1, 30)), data.draw(st.integers(-1, 10))
    rng = draw.generator(data.draw(st.integers(0, 99)))
    q = draw.queries((batch, rows, heads, dim), rng).to(dtype)
    k, v = (
        draw.keys((batch, keys, kv_heads, dim), rng).to(dtype),
        draw.values((batch, keys, kv_heads, dim), rng).to(dtype),
    )
    kind = data.draw(st.integers(0, 2))
    ids = None
    if data.draw(st.booleans()):
        ids = torch.stack([block_layout(data, keys) for _ in range(batch)])
    options = {"softmax_scale": 1.0, "causal": data.draw(st.booleans()), "window_size": (left, right), "block_ids": ids}
    out, lse = flash_attn_func(*(strided(x, kind) for x in (q, k, v)), **options, return_lse=True)
    exact_out, exact_lse = reference.flash_attention(q, k, v, **options)
    plain_out, plain_lse = reference.plain_attention(q, k, v, **options)
    assert (verdict := judge(out, exact_out, plain_out)).ok, str(verdict)
    assert (verdict := judge(lse, exact_lse, plain_lse)).ok, str(verdict)


def a_cache_of_any_layout_gives_the_same_bits(data):
    heads, kv_heads = data.draw(HEADS)
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    rows, page = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 3, 16]))
    rng = draw.generator(data.draw(st.integers(0, 99)))
    batch, capacity = len(lengths), max(1, *lengths)
    q = draw.queries((batch, rows, heads, 16), rng)
    k, v = draw.keys((batch, capacity, kv_heads, 16), rng), draw.values((batch, capacity, kv_heads, 16), rng)
    pages_k, table = draw.scattered_pages(k, page, draw.generator(1))
    pages_v, _ = draw.scattered_pages(v, page, draw.generator(1))
    options = {
        "cache_seqlens": torch.tensor(lengths), "window_size": (data.draw(st.integers(-1, 20)), 0), "softmax_scale": 1.0
    }  # fmt: skip
    contiguous = flash_attn_with_kvcache(q, k, v, **options)
    assert torch.equal(flash_attn_with_kvcache(q, pages_k, pages_v, block_table=table, **options), contiguous)
    for b, length in enumerate(lengths):
        alone = flash_attn_func(
            q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], 1.0, True, options["window_size"]
        )
        assert torch.equal(alone[0], contiguous[b])


def k_eq_v_keeps_the_error_rule(data):
    heads, kv_heads = data.draw(HEADS)
    rows, keys, half = (
        data.draw(st.integers(1, 30)),
        data.draw(st.integers(1, 70)),
        data.draw(st.sampled_from([1, 4, 32])),
    )
    dtype = data.draw(DTYPES)
    rng = draw.generator(data.draw(st.integers(0, 99)))
    q = draw.queries((2, rows, heads, 2 * half), rng).to(dtype)
    values = draw.values((2, keys, kv_heads, 2 * half), rng).to(dtype)
    weight = draw.k_norm_weight(2 * half, rng).to(dtype)
    rotates = torch.tensor(data.draw(st.lists(st.booleans(), min_size=half, max_size=half)))
    inv_freq = torch.where(rotates, torch.rand(half, generator=rng), 0.0)
    result = k_eq_v_attention(q, strided(values, data.draw(st.integers(0, 2))), weight, inv_freq, return_lse=True)
    exact = reference.k_eq_v_attention(q, values, weight, inv_freq)
    plain = reference.plain_k_eq_v_attention(q, values, weight, inv_freq)
    for got, want, ordinary in zip(result, exact, plain, strict=True):
        assert (verdict := judge(got, want, ordinary)).ok, str(verdict)


CHECKS = [attention_keeps_the_error_rule, a_cache_of_any_layout_gives_the_same_bits, k_eq_v_keeps_the_error_rule]
