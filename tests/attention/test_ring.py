"""A sliding layer over a ring computes what it computes over a cache that holds everything, bit for bit."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import RingCache, flash_attn_with_kvcache, qkv_norm_rope_append
from gemma4_kernels.bench import inputs as draw

B, HQ, HKV, D = 2, 4, 2, 32
MOST_ROWS = 16


def raw_rows(rows, dtype, rng):
    """q, k and v of new rows as a projection gives them: other numbers each time, so that rejected rows were wrong."""
    return torch.randn((B, rows, HQ + 2 * HKV, D), generator=rng).to(dtype).split([HQ, HKV, HKV], dim=2)


def steps(count, rng):
    """(rows, how many of them stay for each request) of verifications of 1 to 16 rows."""
    for _ in range(count):
        rows = int(torch.randint(1, MOST_ROWS + 1, (), generator=rng))
        yield rows, torch.randint(1, rows + 1, (B,), generator=rng, dtype=torch.int32)


def prologue(raw, lengths, caches, table):
    q, k, v = raw
    position = lengths[:, None] + torch.arange(q.shape[1])
    angle = torch.cat([position[..., None] * draw.inv_freq(D, 1.0, 1e4)] * 2, dim=-1)
    weight = torch.linspace(0.5, 1.5, D)
    return qkv_norm_rope_append(
        q, k, v, weight, weight, angle.cos().to(q.dtype), angle.sin().to(q.dtype), *caches, cache_seqlens=lengths,
        block_table=table,
    )  # fmt: skip


def attention(q, lengths, caches, table, window):
    return flash_attn_with_kvcache(
        q, *caches, cache_seqlens=lengths + q.shape[1], block_table=table, softmax_scale=0.2, causal=True,
        window_size=(window - 1, 0), return_lse=True,
    )  # fmt: skip


def attention_with_append(raw, lengths, caches, table, window):
    q, k, v = raw
    return flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, block_table=table, softmax_scale=0.2, causal=True,
        window_size=(window - 1, 0), return_lse=True,
    )  # fmt: skip


def verify_over_both(ring, window, dtype, count, append=False):
    """Verifications over the ring and over a full cache, from the first token on.

    Returns: whether all results are the same bits, and how often the ring turned.
    """
    rng = draw.generator(window)
    limit = MOST_ROWS * (count + 1)
    full = [torch.zeros((B, limit, HKV, D), dtype=dtype) for _ in range(2)]
    table = ring.block_table(limit)
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    prologue(raw_rows(3, dtype, rng), torch.zeros_like(lengths), full, None)
    ring.k[:, :3], ring.v[:, :3] = full[0][:, :3], full[1][:, :3]
    same = True
    for rows, kept in steps(count, rng):
        raw = raw_rows(rows, dtype, rng)
        if append:
            expected = attention_with_append(raw, lengths, full, None, window)
            got = attention_with_append(raw, lengths, ring.pages(), table, window)
        else:
            q = prologue(raw, lengths, full, None)
            assert torch.equal(prologue(raw, lengths, ring.pages(), table), q)
            expected = attention(q, lengths, full, None, window)
            got = attention(q, lengths, ring.pages(), table, window)
        same &= all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        lengths = lengths + kept  # a commit is a length; nothing is copied
    return same, int(lengths.min()) // ring.capacity


@pytest.mark.parametrize("append", [False, True], ids=["prologue", "append"])
@pytest.mark.parametrize("page_size", [1, 16, 5])
@pytest.mark.parametrize("window", [8, 32])
def test_verifications_over_a_ring_have_the_bits_of_a_full_cache(window, page_size, append):
    for dtype in (torch.bfloat16, torch.float32):
        ring = RingCache.allocate(B, window, HKV, D, dtype=dtype, page_size=page_size)
        same, turns = verify_over_both(ring, window, dtype, count=60, append=append)
        assert same
        assert turns >= 4


def test_decoding_one_row_at_a_time_turns_the_ring():
    ring = RingCache.allocate(B, 8, HKV, D, dtype=torch.float32, page_size=4)
    rng = draw.generator(1)
    full = [torch.zeros((B, 200, HKV, D)) for _ in range(2)]
    table = ring.block_table(200)
    for length in range(200):
        lengths, raw = torch.tensor([length] * B), raw_rows(1, torch.float32, rng)
        q = prologue(raw, lengths, full, None)
        prologue(raw, lengths, ring.pages(), table)
        got, expected = attention(q, lengths, ring.pages(), table, 8), attention(q, lengths, full, None, 8)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_ring_without_room_for_tentative_rows_loses_keys():
    """What the room is for, and that the comparison above can fail."""
    ring = RingCache.allocate(B, 8, HKV, D, dtype=torch.float32, page_size=1, tentative_rows=1)
    with pytest.raises(ValueError, match="a place of its own"):  # 16 rows do not even fit
        verify_over_both(ring, 8, torch.float32, count=40)
    ring = RingCache.allocate(B, 32, HKV, D, dtype=torch.float32, page_size=1, tentative_rows=1)
    assert not verify_over_both(ring, 32, torch.float32, count=40)[0]


@pytest.mark.parametrize(("window", "page_size", "capacity"), [(8, 16, 32), (1024, 16, 1040), (8, 5, 25), (8, 1, 24)])
def test_a_position_lies_at_its_remainder(window, page_size, capacity):
    ring = RingCache.allocate(3, window, 1, 2, dtype=torch.bfloat16, page_size=page_size)
    assert ring.capacity == capacity
    assert ring.pages()[0].shape == (3 * capacity // page_size, page_size, 1, 2)
    assert ring.pages()[1].data_ptr() == ring.v.data_ptr()
    position = torch.arange(5 * capacity)
    table = ring.block_table(len(position))
    assert table.dtype == torch.int32
    for request in range(3):
        row = table[request, position // page_size] * page_size + position % page_size
        assert torch.equal(row, request * capacity + position % capacity)


def test_a_table_covers_its_positions_and_no_requests_are_fine():
    ring = RingCache.allocate(2, 8, 1, 2, dtype=torch.bfloat16)
    assert [ring.block_table(n).shape[1] for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert RingCache.allocate(0, 8, 1, 2, dtype=torch.bfloat16).pages()[0].shape == (0, 16, 1, 2)


@pytest.mark.parametrize("wrong", ["window", "num_heads", "head_dim", "page_size", "tentative_rows"])
def test_wrong_sizes_are_refused(wrong):
    sizes = {"batch": 1, "window": 8, "num_heads": 1, "head_dim": 2, "page_size": 4, "tentative_rows": 2} | {wrong: 0}
    with pytest.raises(ValueError, match=f"RingCache.allocate: {wrong} must be at least 1, got 0"):
        RingCache.allocate(**sizes, dtype=torch.bfloat16)
