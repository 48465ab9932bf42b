"""What the arguments mean, beyond the case list."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gemma4_kernels import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, k_eq_v_attention, reference
from gemma4_kernels.attention.ops import DECODE_ROWS
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.eager_attention import peak_bytes


def qkv(batch=2, rows=30, keys=50, heads=4, kv_heads=2, dim=64, dtype=torch.float32, seed=0):
    rng = draw.generator(seed)
    return (
        draw.queries((batch, rows, heads, dim), rng).to(dtype),
        draw.keys((batch, keys, kv_heads, dim), rng).to(dtype),
        draw.values((batch, keys, kv_heads, dim), rng).to(dtype),
    )


def by_sdpa(q, k, v, mask, scale):
    out = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def test_scale_defaults_to_the_inverse_root_of_head_dim():
    q, k, v = qkv()
    torch.testing.assert_close(flash_attn_func(q, k, v), by_sdpa(q, k, v, None, 64**-0.5))


def test_fp64_is_computed_in_fp64():
    q, k, v = qkv(dtype=torch.float64)
    out = flash_attn_func(q, k, v, 1.0, True)
    expected, _ = reference.flash_attention(q, k, v, softmax_scale=1.0, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [3, 40])
def test_strides_do_not_matter(rows):
    q, k, v = qkv(rows=rows)
    expected = flash_attn_func(q, k, v, 1.0, True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(flash_attn_func(*heads_first, 1.0, True), expected)
    wide = [torch.cat((x, x), dim=-1)[..., :64] for x in (q, k, v)]
    torch.testing.assert_close(flash_attn_func(*wide, 1.0, True), expected)


@pytest.mark.parametrize("rows", [DECODE_ROWS, DECODE_ROWS + 1])
def test_a_row_without_keys_gives_zeros_and_minus_infinity(rows):
    q, k, v = qkv(rows=rows, keys=4)
    out, lse = flash_attn_func(q, k, v, 1.0, True, return_lse=True)
    unseen = rows - 4
    assert (out[:, :unseen] == 0).all()
    assert (lse[..., :unseen] == float("-inf")).all()
    assert out[:, unseen:].isfinite().all()
    assert lse[..., unseen:].isfinite().all()


def test_no_keys_at_all():
    q, k, v = qkv(keys=0)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_empty_calls_give_empty_results(shape):
    q, k, v = qkv(*shape)
    assert flash_attn_func(q, k, v).shape == q.shape


@pytest.mark.parametrize("rows", [3, 60])
def test_blocks_are_free_of_the_window_on_request(rows):
    """(causal and within the window) or in the same block, as a bare forward of transformers masks images."""
    q, k, v = qkv(rows=rows, keys=60)
    ids = torch.full((2, 60), -1, dtype=torch.int32)
    ids[:, 10:55] = 0
    out = flash_attn_func(q, k, v, 1.0, True, (7, 0), block_ids=ids, window_limits_blocks=False)
    token, key = torch.arange(60 - rows, 60)[:, None], torch.arange(60)
    same = (ids[0][token] == ids[0]) & (ids[0][token] >= 0)
    mask = ((key <= token) & (key >= token - 7)) | same
    torch.testing.assert_close(out, by_sdpa(q, k, v, mask, 1.0))


def test_append_writes_the_new_rows_and_nothing_else():
    q, k_cache, v_cache = qkv(rows=3, keys=20)
    _, k, v = qkv(rows=3, keys=3, seed=1)
    lengths = torch.tensor([4, 17], dtype=torch.int32)
    before = k_cache.clone(), v_cache.clone()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    for cache, old, new in ((k_cache, before[0], k), (v_cache, before[1], v)):
        for b, start in enumerate(lengths.tolist()):
            assert torch.equal(cache[b, start : start + 3], new[b])
            assert torch.equal(cache[b, :start], old[b, :start])
            assert torch.equal(cache[b, start + 3 :], old[b, start + 3 :])
    assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths + 3, causal=True))


def test_append_to_pages_writes_the_rows_of_the_table():
    q, k_cache, v_cache = qkv(rows=5, keys=64)
    _, k, v = qkv(rows=5, keys=5, seed=1)
    k_pages, table = draw.scattered_pages(k_cache, 16, draw.generator(0))
    v_pages, _ = draw.scattered_pages(v_cache, 16, draw.generator(0))
    lengths = torch.tensor([13, 59], dtype=torch.int32)
    options = {"cache_seqlens": lengths, "causal": True}
    paged = flash_attn_with_kvcache(q, k_pages, v_pages, k, v, block_table=table, **options)
    assert torch.equal(paged, flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options))


def test_batch_index_chooses_the_cache_entry():
    q, k, v = qkv(batch=5, rows=2)
    chosen = torch.tensor([4, 1])
    out = flash_attn_with_kvcache(q[:2], k, v, cache_batch_idx=chosen, causal=True)
    assert torch.equal(out, flash_attn_with_kvcache(q[:2], k[chosen], v[chosen], causal=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary_turns_queries_and_new_keys_by_their_positions(interleaved, causal):
    q, k_cache, v_cache = qkv(rows=3, keys=20)
    _, k, v = qkv(rows=3, keys=3, seed=1)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    angle = torch.arange(20)[:, None] * 0.3 ** torch.arange(16)  # rotary_dim 32 of 64
    rotated_cache = k_cache.clone()
    out = flash_attn_with_kvcache(
        q, rotated_cache, v_cache.clone(), k, v, angle.cos(), angle.sin(), lengths, causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip

    def turned(x, position):
        pairs = (
            x[..., :32].unflatten(-1, (16, 2)) if interleaved else x[..., :32].unflatten(-1, (2, 16)).transpose(-1, -2)
        )
        turn = torch.polar(torch.ones(16), angle[position].float())
        spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        spun = spun.flatten(-2) if interleaved else spun.transpose(-1, -2).flatten(-2)
        return torch.cat((spun, x[..., 32:]), dim=-1)

    for b, start in enumerate(lengths.tolist()):
        new = torch.stack([turned(k[b, i], start + i) for i in range(3)])
        torch.testing.assert_close(rotated_cache[b, start : start + 3], new)
        rows = torch.stack([turned(q[b, i], start + i if causal else start) for i in range(3)])
        keys, values = torch.cat((k_cache[b, :start], new)), torch.cat((v_cache[b, :start], v[b]))
        torch.testing.assert_close(out[b], flash_attn_func(rows[None], keys[None], values[None], causal=causal)[0])


def test_rows_that_no_request_owns_are_left_alone():
    q, k, v = (x[0] for x in qkv(batch=1, rows=10, keys=30))
    cu_q, cu_k = torch.tensor([0, 4, 8]), torch.tensor([0, 10, 25])
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 15, causal=True)
    assert out.shape == q.shape
    second = flash_attn_func(q[None, 4:8], k[None, 10:25], v[None, 10:25], causal=True)
    assert torch.equal(out[4:8], second[0])


@pytest.mark.parametrize("rotated", [[], [0], [3, 4, 5], [0, 5, 31], list(range(32))])
@pytest.mark.parametrize("rows", [2, 40])
def test_any_set_of_pairs_may_rotate(rotated, rows):
    rng = draw.generator(3)
    q, values = draw.queries((1, rows, 8, 64), rng), draw.values((1, 600, 2, 64), rng)
    weight = draw.k_norm_weight(64, rng)
    inv_freq = torch.zeros(32)
    inv_freq[rotated] = torch.rand(len(rotated), generator=rng) + 0.01
    out = k_eq_v_attention(q, values, weight, inv_freq)
    expected, _ = reference.k_eq_v_attention(q, values, weight, inv_freq)
    torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)


def test_a_rotation_by_a_large_position_is_as_exact_as_a_small_one():
    """At position 262000 a product position * frequency in fp32 is off by up to 0.008 radians; ours is not."""
    rng = draw.generator(4)
    length = 262_144
    q, inv_freq, weight = draw.queries((1, 1, 16, 64), rng), draw.inv_freq(64, fraction=1.0), torch.ones(64)
    values = torch.zeros(1, length, 1, 64)
    values[0, -700:] = draw.values((700, 1, 64), rng)
    out, lse = k_eq_v_attention(q, values, weight, inv_freq, softmax_scale=0.3, return_lse=True)
    expected, expected_lse = reference.k_eq_v_attention(q, values, weight, inv_freq, softmax_scale=0.3)
    assert float((lse - expected_lse).abs().max()) < 1e-4
    assert float((out - expected).abs().max()) < 2e-4 * float(expected.abs().max())


def test_memory_does_not_grow_with_the_sequence():
    """Beyond its output, a sliding layer of 16 x 256 needs less than 64 MiB whatever the length."""

    def extra(keys: int) -> int:
        q, k, v = qkv(batch=1, rows=keys, keys=keys, heads=16, kv_heads=8, dim=256)
        return peak_bytes(lambda: flash_attn_func(q, k, v, 1.0, True, (1023, 0)))

    short, long = extra(1024), extra(3072)
    assert short > 1 << 20  # the profiler did see allocations
    assert long < 64 << 20
    assert long < 1.1 * short + (1 << 20)


@pytest.mark.parametrize("rows", [9, 30])
def test_rows_before_the_first_key_see_no_image_at_the_first_key(rows):
    q, k, v = qkv(rows=rows, keys=4)
    ids = torch.tensor([[0, 0, -1, -1]] * 2, dtype=torch.int32)
    out = flash_attn_func(q, k, v, 1.0, True, block_ids=ids)
    assert (out[:, : rows - 4] == 0).all()


def test_rotary_of_fp64_is_computed_in_fp64():
    q, k, v = qkv(batch=1, rows=1, keys=4, dtype=torch.float64)
    angle = torch.arange(4, dtype=torch.float64)[:, None] * 0.7
    out = flash_attn_with_kvcache(
        q, k, v, rotary_cos=angle.cos(), rotary_sin=angle.sin(), cache_seqlens=3, softmax_scale=1.0, causal=True,
        rotary_interleaved=False,
    )  # fmt: skip
    cos, sin = angle[3].cos(), angle[3].sin()
    turned = q.clone()
    turned[..., 0], turned[..., 1] = q[..., 0] * cos - q[..., 1] * sin, q[..., 1] * cos + q[..., 0] * sin
    expected, _ = reference.flash_attention(turned, k[:, :3], v[:, :3], softmax_scale=1.0, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    q, k, v = qkv()
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=numpy.int64(40), softmax_scale=numpy.float32(0.5), causal=True)
    assert torch.equal(out, flash_attn_with_kvcache(q, k, v, cache_seqlens=40, softmax_scale=0.5, causal=True))
