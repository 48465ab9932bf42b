"""The compiled prologue on the emulator: transformers' bits, in the right rows of any cache, and nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import _emulate, needs_emulator  # noqa: F401
from prologue_helpers import (
    DTYPES,
    GEMMA,
    KINDS,
    assert_leaves_out_rows_beyond,
    assert_rows_keep_their_bits_alone,
    full_layer,
    sliding_layer,
    with_exact_sums,
    written,
)

from gemma4_kernels import BackendError, RingCache, explain, k_eq_v_attention, use_backend
from gemma4_kernels.attention import prologue_cuda, value_codes
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.reference.layers import apply_rope, rms_norm

pytestmark = needs_emulator
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def eager(layer, caches, *args, **changes):
    with use_backend("eager"):
        return layer.append(caches, *args, **changes)


def assert_like_eager(layer, caches, table=None, **changes):
    """The same bits in q and in the whole of the caches."""
    expected = [cache.clone() for cache in caches]
    out = layer.append(caches, table, **changes)
    assert torch.equal(out, eager(layer, expected, table, **changes))
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(got, want)


# The numbers --------------------------------------------------------------------------------------------------------


@kinds
@dtypes
def test_bits_of_transformers_where_sums_are_exact(kind, dtype):
    """The order of the sum of squares is all that may differ, and here it makes no difference."""
    pytest.importorskip("transformers")
    layer = with_exact_sums(KINDS[kind](dtype, **GEMMA[kind]))
    caches = layer.caches(8)
    out = layer.append(caches)
    q, rows = layer.expected()
    assert torch.equal(out, q)
    for got, want in zip(written(caches, layer), rows, strict=True):
        assert torch.equal(got, want)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_all_bits_where_sums_are_rounded(kind, dtype):
    layer = KINDS[kind](dtype, rows=8, **GEMMA[kind])
    caches, expected = layer.caches(13), layer.caches(13)
    out, q = layer.append(caches), eager(layer, expected)
    for got, want in zip([out, *written(caches, layer)], [q, *written(expected, layer)], strict=True):
        assert float((got == want).double().mean()) >= 0.999
        low, high = want.float().chunk(2, dim=-1)
        reach = torch.cat([torch.hypot(low, high)] * 2, dim=-1)  # the larger of a pair sets the unit of both
        assert bool(((got.float() - want.float()).abs() <= 4 * torch.finfo(dtype).eps * reach).all())


@kinds
def test_fp32_holds_the_error_rule(kind):
    layer = KINDS[kind](torch.float32, rows=4, **GEMMA[kind])
    caches, plain_caches = layer.caches(9), layer.caches(9)
    out, plain = layer.append(caches), eager(layer, plain_caches)
    q, q_weight, cos, sin, v = (x.double() for x in (layer.q, layer.q_weight, layer.cos, layer.sin, layer.v))
    assert judge(out, apply_rope(rms_norm(q, q_weight), cos, sin), plain).ok
    assert judge(written(caches, layer)[-1], rms_norm(v), written(plain_caches, layer)[-1]).ok


@kinds
@dtypes
@pytest.mark.parametrize("head_dim", [2, 6, 80, 96, 130, 256, 272, 384, 510])
def test_any_even_head_dim(kind, dtype, head_dim):
    layer = with_exact_sums(KINDS[kind](dtype, d=head_dim, hq=6))
    assert_like_eager(layer, layer.caches(8, fill=3.0))


@kinds
def test_the_angles_of_a_pair_need_not_be_equal(kind):
    """transformers repeats each angle; the formula does not ask for it."""
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    layer = replace(layer, cos=torch.randn(layer.cos.shape).bfloat16(), sin=torch.randn(layer.sin.shape).bfloat16())
    assert_like_eager(layer, layer.caches(8, fill=0.0))


@kinds
def test_eps_goes_to_every_norm(kind):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    assert_like_eager(layer, layer.caches(8, fill=0.0), eps=8.0)


@kinds
def test_weights_of_any_dtype(kind):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = replace(layer, q_weight=layer.q_weight.to(dtype), k_weight=layer.k_weight.to(dtype))
        assert_like_eager(cast, cast.caches(8, fill=0.0))


@kinds
def test_special_numbers_stay_in_their_head(kind):
    layer = KINDS[kind](torch.bfloat16, rows=5)
    clean = layer.caches(12, fill=0.0)
    expected = layer.append(clean)
    q, k, v = layer.q.clone(), layer.k.clone(), layer.v.clone()
    q[0, 1, 2, 7], k[1, 3, 0, 9], v[1, 3, 0, 9] = float("nan"), float("inf"), float("nan")
    spoiled = replace(layer, q=q, k=k, v=k if layer.k_eq_v else v)
    caches = spoiled.caches(12, fill=0.0)
    out = spoiled.append(caches)
    assert bool(out[0, 1, 2].isnan().all())
    out[0, 1, 2] = expected[0, 1, 2]
    assert torch.equal(out, expected)
    for got, want in zip(caches, clean, strict=True):
        row = got[1, int(layer.lengths[1]) + 3, 0]
        assert bool(row.isnan().any())
        row.copy_(want[1, int(layer.lengths[1]) + 3, 0])
        assert torch.equal(got, want)


# Where rows go ------------------------------------------------------------------------------------------------------


@kinds
def test_only_the_new_rows_of_a_cache_change(kind):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    assert_like_eager(layer, layer.caches(9, fill=7.0))


@kinds
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_pages_and_lengths_of_both_integer_dtypes(kind, integers):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16, rows=7))
    layer.lengths = torch.tensor([3, 0], dtype=integers)
    table = torch.tensor([[5, 0, 2, 99], [1, 7, -1, 3]], dtype=integers)  # 4 rows a page; no row reaches 99 or -1
    pages = [cache.view(9, 4, *cache.shape[2:]) for cache in layer.caches(18, fill=3.0)]
    assert_like_eager(layer, pages, table)
    apart = table.repeat_interleave(2, dim=1)[:, ::2]  # page numbers that are no neighbours in memory
    assert_like_eager(layer, [torch.full_like(page, 3.0) for page in pages], apart)


@kinds
@pytest.mark.parametrize("rows", range(1, 17))
def test_pages_in_random_order(kind, rows):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16, rows=rows, batch=3))
    table = torch.randperm(30, generator=torch.Generator().manual_seed(rows)).view(3, 10).to(torch.int32)
    pages = [cache.view(30, 3, *cache.shape[2:]) for cache in layer.caches(30, fill=3.0)]
    assert_like_eager(layer, pages, table)


def test_a_ring_is_written_across_its_seam():
    layer = with_exact_sums(sliding_layer(torch.bfloat16, rows=7))
    layer.lengths = torch.tensor([20, 93])
    ring = RingCache.allocate(2, 8, 2, 64, dtype=torch.bfloat16, page_size=4)
    assert_like_eager(layer, ring.pages(), ring.block_table(100))
    used = ring.k.ne(0).any(dim=-1).any(dim=-1)  # (B, 24)
    assert used[0].nonzero().flatten().tolist() == [0, 1, 2, 20, 21, 22, 23]
    assert used[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 21, 22, 23]


@kinds
@pytest.mark.parametrize("shift", [0, 1])
def test_strides_are_taken_as_they_are(kind, shift):
    """Heads before rows in memory, one rotation for all, a cache that is part of a larger one, at 16-byte places and others."""
    layer = with_exact_sums(KINDS[kind](torch.bfloat16, rows=5))
    layer = replace(layer, cos=layer.cos[:1], sin=layer.sin[:1])
    expected = layer.caches(12, fill=3.0)
    out = eager(layer, expected)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    cos = torch.cat((layer.cos, layer.sin), dim=-1)[..., :64]
    turned = replace(layer, q=q, k=k, v=k if layer.k_eq_v else v, cos=cos)
    inner = slice(shift, 64 + shift)
    caches = [cache.new_full((3, 20, 5, 80), 3.0)[1:, 2:14, : cache.shape[2], inner] for cache in expected]
    assert torch.equal(turned.append(caches), out)
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(got, want)
        around = got._base.clone()
        around[1:, 2:14, : got.shape[2], inner] = 3.0
        assert bool((around == 3.0).all())


@kinds
@pytest.mark.parametrize(
    ("lengths", "table", "kept"),
    [
        ([-2, 6], None, [1, 2]),  # the first request's third row is position 0; of the second, 6 and 7 fit
        ([2**33, 5], None, [0, 3]),
        ([2**63 - 2, -(2**63)], None, [0, 0]),
        ([1, 6], [[0, 9], [-1, 2]], [3, 2]),
        ([2, 3], [[4, 0], [1, -5]], [1, 1]),
        ([2, 3], [[2**40, 0], [1, 2**62]], [1, 1]),
    ],
    ids=["lengths", "a length beyond 32 bits", "a sum beyond 64 bits", "no such column", "no such page", "far pages"],
)
def test_the_kernel_leaves_out_rows_beyond_the_cache(kind, lengths, table, kept):
    """What a GPU call may hold unnoticed, as the host does not look at its numbers."""
    layer = KINDS[kind](torch.bfloat16)
    out = assert_leaves_out_rows_beyond(prologue_cuda, layer, lengths, table, kept)
    assert torch.equal(out, layer.append(layer.caches(8)))


@kinds
@dtypes
def test_row_bits_do_not_depend_on_the_batch(kind, dtype):
    assert_rows_keep_their_bits_alone(KINDS[kind](dtype, rows=5))


@kinds
def test_no_rows_and_no_requests_are_calls_too(kind):
    for empty in (KINDS[kind](torch.float32, rows=0), KINDS[kind](torch.float32, batch=0)):
        caches = empty.caches(8, fill=0.0)
        assert empty.append(caches).shape == empty.q.shape
        assert not any(cache.any() for cache in caches)


def test_explain_says_why_it_is_passed_over():
    with use_backend(None):
        assert "only where asked for by name" in str(explain("qkv_norm_rope_append"))
    assert explain("qkv_norm_rope_append", dtype=torch.bfloat16, head_dim=256).taken == "cuda"
    assert "takes bfloat16" in str(explain("k_eq_v_norm_rope_append", dtype=torch.float64))
    layer = sliding_layer(torch.float64)
    with pytest.raises(BackendError, match="takes bfloat16, float16, float32, not float64"):
        layer.append(layer.caches(8))


# Values of 8 bits ---------------------------------------------------------------------------------------------------

CODES = [torch.float8_e4m3fn, torch.int8]
codes = pytest.mark.parametrize("codes", CODES, ids=str)


def cache_of_codes(layer, codes, capacity=12):
    """Of zeros, and the scale that goes with it: of int8 rows to come."""
    batch, _, heads, head_dim = layer.k.shape
    values, scale = value_codes.allocate((batch, capacity, heads, head_dim), codes, "cpu")
    if codes == torch.float8_e4m3fn:
        return values, scale * torch.arange(1, heads + 1)  # the second head's numbers end beyond what fits no code
    return values, scale.fill_(7.0)


def assert_codes_like_eager(layer, values, scale, table=None):
    """The same bits in q, in the whole cache and in all scales; one NaN is like another."""
    want_values, want_scale = values.clone(), scale.clone()
    out = layer.append([values], table, values_scale=scale)
    assert torch.equal(out, eager(layer, [want_values], table, values_scale=want_scale))
    numbers, want_numbers = values.float(), want_values.float()
    assert torch.equal(numbers.nan_to_num(1e9), want_numbers.nan_to_num(1e9))
    assert torch.equal(numbers.signbit() & ~numbers.isnan(), want_numbers.signbit() & ~want_numbers.isnan())
    assert torch.equal(scale.nan_to_num(-1.0), want_scale.nan_to_num(-1.0))


@codes
@dtypes
@pytest.mark.parametrize("head_dim", [2, 64, 130, 256, 272, 512])
def test_codes_are_those_of_the_eager_backend(codes, dtype, head_dim):
    layer = with_exact_sums(full_layer(dtype, d=head_dim, hkv=2))
    assert_codes_like_eager(layer, *cache_of_codes(layer, codes))


@codes
def test_pages_get_codes_and_scales_and_nothing_else_changes(codes):
    layer = with_exact_sums(full_layer(torch.bfloat16, rows=7, hkv=2))
    layer.lengths = torch.tensor([3, 0], dtype=torch.int32)
    table = torch.tensor([[5, 0, 2], [1, 7, 3]], dtype=torch.int32)
    values, scale = (x.view(9, 4, *x.shape[2:]) if x.dim() > 1 else x for x in cache_of_codes(layer, codes, 18))
    assert_codes_like_eager(layer, values, scale, table)


@codes
@pytest.mark.parametrize("shift", [0, 1])
def test_codes_and_scales_in_parts_of_larger_tensors(codes, shift):
    layer = with_exact_sums(full_layer(torch.bfloat16, hkv=2))
    _, scale = cache_of_codes(layer, codes)
    inner = slice(shift, 64 + shift)
    whole = torch.zeros((3, 20, 5, 80), dtype=torch.uint8).view(codes)
    around = torch.full((3, 20, 5), 7.0) if scale.dim() == 3 else torch.full((5,), 7.0)
    part = around[1:, 2:14, 1:3] if scale.dim() == 3 else around[::2][:2]
    part.copy_(scale)
    assert_codes_like_eager(layer, whole[1:, 2:14, 1:3, inner], part)
    bytes_ = whole.view(torch.uint8)
    bytes_[1:, 2:14, 1:3, inner] = 0
    part.fill_(7.0)
    assert not bytes_.any()
    assert bool((around == 7.0).all())


@codes
def test_every_number_between_codes_goes_to_the_nearest(codes):
    """Rows of all magnitudes: subnormal codes, ties of both, what lies beyond the range."""
    layer = full_layer(torch.float32, batch=1, rows=16, d=512)
    powers = torch.exp2(torch.randint(-20, 4, (512,), generator=torch.Generator().manual_seed(1)).float())
    k = layer.k.clone()
    k.copy_(torch.randint(-31, 32, k.shape, generator=torch.Generator().manual_seed(2)) * powers)
    k[0, 3] = 0.0  # a row of nothing but zeros
    k[0, 4, 0, 1:] = 0.0  # and one of a single number, the largest that a norm gives
    layer = replace(layer, k=k, v=k)
    values, scale = cache_of_codes(layer, codes, 24)
    for factor in (1.0, 0.04) if codes == torch.float8_e4m3fn else (1.0,):
        got, want = values.clone(), values.clone()
        got_scale, want_scale = scale * factor, scale * factor
        q, wide = layer.append([got], values_scale=got_scale), layer.caches(24, fill=0.0)
        assert torch.equal(q, layer.append(wide))
        normed = written(wide, layer)[0]
        want_codes, row_scale = value_codes.encode(normed, codes, want_scale)
        assert torch.equal(written([got.view(torch.uint8)], layer)[0], want_codes.view(torch.uint8)), want
        if codes == torch.int8:
            assert torch.equal(written([got_scale.unsqueeze(-1)], layer)[0].squeeze(-1), row_scale)
        else:
            assert len(want_codes.view(torch.uint8).unique()) > 200
    if codes == torch.float8_e4m3fn:
        assert bool((want_codes.float().abs() == value_codes.FLOAT8_MAX).any())


@codes
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_a_row_cannot_hold_is_not_made_a_number(codes, special):
    layer = full_layer(torch.bfloat16, rows=5, hkv=2)
    k = layer.k.clone()
    k[1, 3, 0, 9] = special
    layer = replace(layer, k=k, v=k)
    # The other heads' sums are rounded: codes of both backends come from what each of them normed.
    values, scale = cache_of_codes(layer, codes)
    layer.append([values], values_scale=scale)
    wide = layer.caches(12, fill=0.0)
    layer.append(wide)
    want, row_scale = value_codes.encode(written(wide, layer)[0], codes, scale)
    got = written([values.view(torch.uint8)], layer)[0].view(codes)
    got_scale = scale if codes == torch.float8_e4m3fn else written([scale.unsqueeze(-1)], layer)[0].squeeze(-1)
    assert torch.equal(got_scale.nan_to_num(-1.0), row_scale.nan_to_num(-1.0))
    decoded, want_decoded = value_codes.decode(got, got_scale), value_codes.decode(want, row_scale)
    assert torch.equal(decoded.nan_to_num(1e9), want_decoded.nan_to_num(1e9))
    assert bool(decoded[1, 3, 0].isnan().any()) == (special != 3e38)
    assert not decoded[1, 3, 1].isnan().any()


@codes
def test_a_scale_that_is_no_number_or_zero(codes):
    layer = with_exact_sums(full_layer(torch.float16, hkv=2))
    values, scale = cache_of_codes(layer, codes)
    if codes == torch.float8_e4m3fn:
        for first, second in ((float("nan"), 0.0), (float("inf"), -0.0625)):
            assert_codes_like_eager(layer, values.clone(), torch.tensor([first, second]))
    else:  # which is written, whatever was there
        assert_codes_like_eager(layer, values, scale.fill_(float("nan")))


@codes
def test_the_kernel_leaves_out_codes_beyond_the_cache(codes):
    layer = full_layer(torch.bfloat16)
    values, scale = cache_of_codes(layer, codes, 8)
    rows = (layer.q, layer.k, layer.q_weight, layer.cos, layer.sin)
    prologue_cuda.k_eq_v_norm_rope_append(*rows, values, torch.tensor([7, -3]), None, 1e-6, scale)
    changed = values.view(torch.uint8).any(dim=-1).any(dim=-1)  # (2, 8)
    assert changed.nonzero().tolist() == [[0, 7]]
    if codes == torch.int8:
        assert bool((scale != 7.0).nonzero().tolist() == [[0, 7, 0]])


@codes
def test_the_attention_reads_what_the_prologue_wrote(codes):
    """Bit for bit what it makes of a cache of the rounded values."""
    layer = full_layer(torch.bfloat16, hkv=2, d=128)
    values, scale = cache_of_codes(layer, codes)
    q = layer.append([values], values_scale=scale)
    where = {"cache_seqlens": layer.lengths + 3}
    weights = (layer.k_weight, torch.arange(64) / 64.0)
    got = k_eq_v_attention(q, values, *weights, values_scale=scale, **where)
    rounded = value_codes.decode(values, scale).bfloat16()
    assert torch.equal(got, k_eq_v_attention(q, rounded, *weights, **where))


@codes
def test_explain_says_who_writes_codes(codes):
    layer = full_layer(torch.bfloat16)
    values, scale = cache_of_codes(layer, codes)
    said = explain(
        "k_eq_v_norm_rope_append", q=layer.q, k=layer.k, q_norm_weight=layer.q_weight, cos=layer.cos, sin=layer.sin,
        values=values, cache_seqlens=layer.lengths, values_scale=scale,
    )  # fmt: skip
    assert said.taken == "cuda"
