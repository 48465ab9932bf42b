"""The compiled kernels of sliding layers on the emulator: the case list, row bits, every layout of a cache, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import row_bits
import torch
from emulated import DTYPES, _emulate, needs_emulator  # noqa: F401
from row_bits import Setting

from gemma4_kernels import (
    BackendError,
    RingCache,
    explain,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
    use_backend,
)
from gemma4_kernels.attention import cuda
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import AttentionCase, attention_cases, row_counts
from gemma4_kernels.bench.errors import judge

pytestmark = needs_emulator
BF16, FP16 = DTYPES
CPU = torch.device("cpu")


def drawn(batch: int, rows: int, keys: int, heads: tuple[int, int], dim: int, dtype: torch.dtype = BF16, seed: int = 0):
    rng = draw.generator(seed)
    q = draw.rows(draw.queries, (batch, rows, heads[0], dim), rng, dtype)
    k = draw.rows(draw.keys, (batch, keys, heads[1], dim), rng, dtype)
    return q, k, draw.rows(draw.values, (batch, keys, heads[1], dim), rng, dtype)


def assert_error_rule(q, k, v, **options) -> None:
    options = {"softmax_scale": 1.0, "causal": True, **options}
    result = flash_attn_func(q, k, v, **options, return_lse=True)
    exact, plain = reference.flash_attention(q, k, v, **options), reference.plain_attention(q, k, v, **options)
    for got, want, ordinary in zip(result, exact, plain, strict=True):
        assert (verdict := judge(got, want, ordinary)).ok, str(verdict)


# Values -------------------------------------------------------------------------------------------------------------


def served(case: AttentionCase) -> bool:
    if case.op == "k_eq_v_attention" or case.blocks or case.new or case.d % 64 or case.d == 192 or case.d == 320:
        return False
    return max(row_counts(case) if case.op == "flash_attn_varlen_func" else [case.sq]) <= 16


def narrowed(case: AttentionCase) -> AttentionCase:
    """At most two KV heads with at most four query heads each, and a served head_dim: what is left out are blocks that differ
    by an offset, and groups of tiles, which have tests of their own."""
    heads, group = min(case.hkv, 2), min(case.hq // case.hkv, 4)
    return replace(case, hkv=heads, hq=group * heads, d=min(case.d, 256), dtype=case.dtype.replace("32", "16"))


def cases() -> list[AttentionCase]:
    small = {"hq": 4, "hkv": 2, "d": 64, "right": 0}
    packed = [
        AttentionCase("flash_attn_varlen_func", lengths="1:1+7:7+3:130+5:40+0:9+16:70", left=left, page=page, **small)
        for left in (-1, 31)
        for page in (0, 16)
    ]
    return list(dict.fromkeys(map(narrowed, [*filter(served, attention_cases()), *packed])))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["cuda"], CPU)
    assert check.status == "held", check.reasons


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", cuda.FLASH_HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 8, 16])
def test_groups_and_numbers_of_rows(group, dim, dtype):
    """1 to 16 packed rows, 17 to 32, up to 64, and several blocks of 64."""
    for rows in {1: range(1, 17), 2: (1, 8, 9, 16), 8: (1, 3, 8, 11), 16: (1, 5)}[group]:
        assert_error_rule(*drawn(1, rows, 75, (group, 1), dim, dtype, seed=rows), window_size=(40, 0))


@pytest.mark.parametrize("dim", cuda.FLASH_HEAD_DIMS)
def test_many_chunks_of_a_long_cache(dim):
    """On 28 multiprocessors four KV heads have 14 chunks; of 64 keys up to 896, of 128 beyond."""
    for keys in (895, 897, 1500):
        assert_error_rule(*drawn(1, 3, keys, (8, 4), dim))


@pytest.mark.parametrize(
    "window", [(0, 0), (15, 0), (16, 0), (63, 0), (64, 0), (20, 3), (-1, 5), (5, -1), (-1, -1)], ids=str
)
def test_windows_and_their_edges(window):
    for rows, keys in ((1, 64), (5, 65), (16, 190)):
        assert_error_rule(*drawn(1, rows, keys, (2, 1), 128), causal=False, window_size=window)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("dim", cuda.FLASH_HEAD_DIMS)
def test_capped_scores(dim, softcap):
    assert_error_rule(*drawn(1, 10, 100, (4, 2), dim), softcap=softcap, softmax_scale=0.7)


def test_rows_before_the_first_key_give_zeros():
    q, k, v = drawn(1, 9, 4, (4, 2), 64)
    out, lse = flash_attn_func(q, k, v, 1.0, True, return_lse=True)
    assert not out[:, :5].any()
    assert bool((lse[..., :5] == -torch.inf).all())
    assert bool(lse[..., 5:].isfinite().all())


def test_calls_without_rows_requests_or_keys():
    q, k, v = drawn(2, 3, 8, (4, 2), 64)
    assert flash_attn_func(q[:, :0], k, v).shape == (2, 0, 4, 64)
    assert flash_attn_func(q[:0], k[:0], v[:0]).shape == (0, 3, 4, 64)
    assert not flash_attn_func(q, k[:, :0], v[:, :0]).any()


# What is never read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_keys_that_no_row_sees_may_hold_anything(fill):
    q, k, v = drawn(2, 3, 200, (4, 2), 64)
    lengths = torch.tensor([150, 77])
    options = {"cache_seqlens": lengths, "softmax_scale": 1.0, "causal": True, "window_size": (30, 0)}
    expected = flash_attn_with_kvcache(q, k, v, **options)
    for b, length in enumerate(lengths.tolist()):
        for cache in (k, v):
            cache[b, : length - 33], cache[b, length:] = fill, fill
    assert torch.equal(flash_attn_with_kvcache(q, k, v, **options), expected)


def test_lengths_entries_and_pages_out_of_range_are_held_within_the_cache():
    """Nobody checks them on a device: called past the checks of the host, and watched by what lies around."""
    q, k, v = drawn(2, 3, 64, (4, 2), 64)
    around = [torch.full((4, *x.shape[1:]), float("nan"), dtype=x.dtype) for x in (k, v)]
    for whole, cache in zip(around, (k, v), strict=True):
        whole[1:3] = cache
    inside = [whole[1:3] for whole in around]
    rest = (None, 1.0, 0.0, -1, 0, True, 0)
    out, _ = cuda.flash_attn_kvcache(q, *inside, torch.tensor([2**40, 70]), None, torch.tensor([-3, 99]), None, *rest)
    assert torch.equal(out, flash_attn_func(q, k, v, 1.0, True))
    out, lse = cuda.flash_attn_kvcache(q, *inside, torch.tensor([-7, 64]), torch.tensor([5, -9]), None, None, *rest)
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())
    assert torch.equal(out[1], flash_attn_func(q, k, v, 1.0, True)[1])
    pages = [cache.view(8, 16, 2, 64) for cache in inside]
    table = torch.tensor([[0, 1, 2, 3], [-5, 2**33, 6, 7]])
    out, _ = cuda.flash_attn_kvcache(q, *pages, torch.tensor([64, 64]), None, None, table, *rest)
    held = torch.tensor([[0, 1, 2, 3], [0, 7, 6, 7]])
    expected, _ = cuda.flash_attn_kvcache(q, *pages, torch.tensor([64, 64]), None, None, held, *rest)
    assert torch.equal(out, expected)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("cu_q", [[5, -(2**31) - 1], [-3, 2**40], [0, 5], [9, 12]])
@pytest.mark.parametrize("cu_k", [[0, 2**33], [-9, 12], [40, 3], [0, 9]])
def test_hostile_offsets_reach_nothing_outside(cu_q, cu_k):
    q, k, v = drawn(1, 5, 9, (4, 2), 64)
    room = torch.full((3, 9, 2, 64), float("nan"), dtype=BF16)
    room[1] = k[0]
    out, lse = cuda.flash_attn_varlen(
        q[0], room[1], v[0], torch.tensor(cu_q), torch.tensor(cu_k), None, 4, 9, 1.0, 0.0, -1, 0
    )
    assert out.shape == (5, 4, 64)
    assert lse.shape == (4, 5)


# Layouts ------------------------------------------------------------------------------------------------------------


def test_strides_are_taken_as_they_are():
    """Heads before rows, and a cache that is part of a larger one; queries at any address."""
    q, k, v = drawn(2, 5, 90, (4, 2), 64)
    expected = flash_attn_func(q, k, v, 1.0, True)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*turned, 1.0, True), expected)
    larger = [torch.full((3, 200, 5, 80), float("nan"), dtype=BF16) for _ in range(2)]
    parts = [whole[1:, 3:183:2, 1:3, 8:72] for whole in larger]
    for part, cache in zip(parts, (k, v), strict=True):
        part.copy_(cache)
    shifted = torch.empty(q.numel() + 1, dtype=BF16)[1:].view(q.shape).copy_(q)
    assert torch.equal(flash_attn_func(shifted, *parts, 1.0, True), expected)
    one = flash_attn_func(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), 1.0, True)
    assert torch.equal(one, flash_attn_func(q, k[:, :1].repeat(1, 90, 1, 1), v[:, :1].repeat(1, 90, 1, 1), 1.0, True))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_lengths_of_any_stride_and_dtype(integers):
    q, k, v = drawn(2, 2, 40, (4, 2), 64)
    expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([9, 30], dtype=torch.int32), causal=True)
    lengths = torch.tensor([9, 0, 30, 0], dtype=integers)[::2]
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True), expected)


def test_a_ring_gives_the_bits_of_a_cache_that_holds_everything():
    """Verifications of 1 to 16 rows, of which some are rejected, until the ring has turned twice."""
    window, limit, rng = 40, 250, draw.generator(3)
    ring = RingCache.allocate(2, window, 2, 64, dtype=BF16)
    table, lengths = ring.block_table(limit), torch.tensor([0, 3], dtype=torch.int32)
    full = [torch.zeros((2, limit, 2, 64), dtype=BF16) for _ in range(2)]
    options = {"softmax_scale": 1.0, "causal": True, "window_size": (window - 1, 0)}
    for rows in (16, 1, 5, 16, 7, 16, 2, 16, 16, 1, 16, 16, 16, 16, 3, 16, 16):
        q, k, v = drawn(2, rows, rows, (4, 2), 64, seed=int(lengths.sum()))
        with use_backend("eager"):  # the append
            for caches, pages in ((full, None), (ring.pages(), table)):
                flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, block_table=pages, **options)
        after = lengths + rows
        expected = flash_attn_with_kvcache(q, *full, cache_seqlens=after, **options, return_lse=True)
        got = flash_attn_with_kvcache(
            q, *ring.pages(), cache_seqlens=after, block_table=table, **options, return_lse=True
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        lengths = lengths + torch.randint(max(1, rows - 4), rows + 1, (2,), generator=rng, dtype=torch.int32)
    assert int(lengths.min()) > 2 * ring.capacity


# Bits ---------------------------------------------------------------------------------------------------------------

# With eight KV heads a row's keys are cut into seven chunks at most, of 64 keys up to 448 and of 128 beyond: among 16 rows that
# end behind that length, two sizes meet.
TWO_SIZES = Setting("cpu", BF16, hq=8, hkv=8, d=64, keys=456, window=-1)
SHORT = Setting("cpu", FP16, hq=4, hkv=2, d=128, keys=150, window=-1)
WINDOW = Setting("cpu", BF16, hq=4, hkv=2, d=256, keys=260, window=150)
SETTINGS = [SHORT, WINDOW, TWO_SIZES, WINDOW._replace(hq=16, d=64)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_alone(setting):
    row_bits.assert_rows_alone(setting)


@pytest.mark.parametrize("setting", [SHORT, WINDOW], ids=str)
def test_any_batch(setting):
    row_bits.assert_any_batch(setting)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_pages(page_size):
    q, k, v = SHORT.drawn(batch=2)
    lengths = torch.tensor([147, 75])
    pages, table = zip(*(draw.scattered_pages(x, page_size, draw.generator(5)) for x in (k, v)), strict=True)
    options = {"cache_seqlens": lengths, **SHORT.options}
    got = flash_attn_with_kvcache(q[:, :5], *pages, block_table=table[0], **options)
    assert torch.equal(got, flash_attn_with_kvcache(q[:, :5], k, v, **options))


@pytest.mark.parametrize("setting", [SHORT, WINDOW], ids=str)
def test_padding_in_front(setting):
    q, k, v = setting.drawn()
    padded = [torch.cat((torch.full_like(x[:, :37], float("nan")), x), dim=1) for x in (k, v)]
    expected = flash_attn_func(q, k, v, **setting.options)
    got = flash_attn_with_kvcache(q, *padded, cache_leftpad=torch.tensor([37]), **setting.options)
    assert torch.equal(got, expected)


def test_room_beyond_the_length_changes_no_bits():
    q, k, v = WINDOW.drawn()
    expected = flash_attn_func(q, k, v, **WINDOW.options)
    roomy = [torch.cat((x, torch.full_like(x, float("nan"))), dim=1) for x in (k, v)]
    assert torch.equal(flash_attn_with_kvcache(q, *roomy, cache_seqlens=WINDOW.keys, **WINDOW.options), expected)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "rows", "dim", "dtype"),
    [
        ("goes to 16 rows", 17, 64, BF16),
        ("has head_dim 64, 128, 256, the call has 80", 1, 80, BF16),
        ("takes bfloat16, float16, not float32", 1, 64, torch.float32),
    ],
)
def test_what_no_kernel_serves_has_a_reason(reason, rows, dim, dtype):
    with pytest.raises(BackendError, match=reason):
        flash_attn_func(*drawn(1, rows, 20, (4, 2), dim, dtype))


def test_blocks_and_unaligned_caches_are_left_to_others():
    q, k, v = drawn(1, 2, 20, (4, 2), 64)
    with pytest.raises(BackendError, match="does not support block_ids"):
        flash_attn_func(q, k, v, block_ids=torch.zeros(1, 20, dtype=torch.int32))
    shifted = torch.empty(k.numel() + 1, dtype=BF16)[1:].view(k.shape).copy_(k)
    with pytest.raises(BackendError, match="does not support unaligned_cache"):
        flash_attn_func(q, shifted, v)
    with use_backend("auto"):
        assert explain("flash_attn_func", q=q, k=shifted, v=v).taken == "eager"


def test_more_requests_than_a_grid_has_room_for_are_refused_in_words():
    q, k, v = drawn(1, 1, 1, (1, 1), 64)
    many = [x.expand(70000, -1, -1, -1) for x in (q, k, v)]
    with pytest.raises(ValueError, match="batch times kv_heads goes to 65535, got 70000"):
        flash_attn_func(*many)


def test_packed_requests_have_the_bits_of_single_ones():
    q, k, v = drawn(1, 9, 100, (4, 2), 64)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([0, 60, 70, 100], dtype=torch.int32)
    packed = flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 5, 60, softmax_scale=1.0, causal=True)
    assert torch.equal(packed[:4], flash_attn_func(q[:, :4], k[:, :60], v[:, :60], 1.0, True)[0])
    assert torch.equal(packed[4:], flash_attn_func(q[:, 4:], k[:, 70:], v[:, 70:], 1.0, True)[0])
