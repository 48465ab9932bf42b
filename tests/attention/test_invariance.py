"""A row's bits depend on its own keys: not on the batch, its place in it, the other rows, or where its cache lies."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.bench import inputs as draw

DTYPES = [torch.bfloat16, torch.float32]
ROWS = 16


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    """A BLAS library may divide a product among threads, and with it the order of its sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def sliding(keys: int, dtype: torch.dtype, batch: int = 1, seed: int = 0):
    rng = draw.generator(seed)
    q = draw.queries((batch, ROWS, 16, 256), rng).to(dtype)
    k = draw.keys((batch, keys, 8, 256), rng).to(dtype)
    v = draw.values((batch, keys, 8, 256), rng).to(dtype)
    return q, k, v


@pytest.mark.parametrize("keys", [20, 513, 1030])
def test_sliding_row_bits_do_not_depend_on_the_number_of_rows(keys, dtype):
    q, k, v = sliding(keys, dtype)
    out, lse = flash_attn_func(q, k, v, 1.0, True, (255, 0), return_lse=True)
    for row in range(ROWS):
        stop = keys - ROWS + row + 1
        alone, alone_lse = flash_attn_func(
            q[:, row : row + 1], k[:, :stop], v[:, :stop], 1.0, True, (255, 0), return_lse=True
        )
        assert torch.equal(alone[:, 0], out[:, row])
        assert torch.equal(alone_lse[..., 0], lse[..., row])


def test_sliding_row_bits_do_not_depend_on_keys_that_left_the_window(dtype):
    """A ring cache holds only the last window + rows keys; a long cache holds all of them."""
    q, k, v = sliding(1400, dtype)
    whole = flash_attn_func(q, k, v, 1.0, True, (255, 0))
    trimmed = flash_attn_func(q, k[:, -(255 + ROWS) :], v[:, -(255 + ROWS) :], 1.0, True, (255, 0))
    assert torch.equal(whole, trimmed)


@pytest.mark.parametrize("keys", [20, 511, 512, 513, 5000])
def test_k_eq_v_row_bits_do_not_depend_on_the_number_of_rows(keys, dtype):
    rng = draw.generator(keys)
    q = draw.queries((1, ROWS, 16, 512), rng).to(dtype)
    values = draw.values((1, keys, 1, 512), rng).to(dtype)
    weight, inv_freq = draw.k_norm_weight(512, rng), draw.inv_freq(512)
    out = k_eq_v_attention(q, values, weight, inv_freq)
    for row in (0, 7, ROWS - 1):
        alone = k_eq_v_attention(q[:, row : row + 1], values[:, : keys - ROWS + row + 1], weight, inv_freq)
        assert torch.equal(alone[:, 0], out[:, row])


def test_row_bits_do_not_depend_on_the_batch(dtype):
    q, k, v = sliding(300, dtype, batch=3)
    lengths = torch.tensor([17, 300, 129], dtype=torch.int32)
    together = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, softmax_scale=1.0, window_size=(99, 0))
    order = torch.tensor([2, 0, 1])
    permuted = flash_attn_with_kvcache(
        q[order], k[order], v[order], cache_seqlens=lengths[order], softmax_scale=1.0, window_size=(99, 0)
    )
    assert torch.equal(permuted, together[order])
    for b, length in enumerate(lengths.tolist()):
        alone = flash_attn_func(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], 1.0, True, (99, 0))
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_pages_give_the_bits_of_a_contiguous_cache(page_size, dtype):
    q, k, v = sliding(700, dtype, batch=2)
    lengths = torch.tensor([333, 700], dtype=torch.int32)
    k_pages, table = draw.scattered_pages(k, page_size, draw.generator(5))
    v_pages, _ = draw.scattered_pages(v, page_size, draw.generator(5))
    options = {"cache_seqlens": lengths, "softmax_scale": 1.0, "window_size": (255, 0)}
    assert torch.equal(
        flash_attn_with_kvcache(q, k_pages, v_pages, block_table=table, **options),
        flash_attn_with_kvcache(q, k, v, **options),
    )
    rng = draw.generator(6)
    q = draw.queries((2, 3, 16, 512), rng).to(dtype)
    values = draw.values((2, 700, 1, 512), rng).to(dtype)
    pages, table = draw.scattered_pages(values, page_size, rng)
    weight, inv_freq = draw.k_norm_weight(512, rng), draw.inv_freq(512)
    assert torch.equal(
        k_eq_v_attention(q, pages, weight, inv_freq, cache_seqlens=lengths, block_table=table),
        k_eq_v_attention(q, values, weight, inv_freq, cache_seqlens=lengths),
    )


def test_padding_in_front_leaves_a_row_its_bits(dtype):
    q, k, v = sliding(300, dtype)
    padded_k, padded_v = (torch.cat((torch.full_like(x[:, :37], float("nan")), x), dim=1) for x in (k, v))
    ids = torch.full((1, 337), -1, dtype=torch.int32)
    ids[:, :37] = -2
    padded = flash_attn_func(q, padded_k, padded_v, 1.0, True, (255, 0), block_ids=ids)
    assert torch.equal(padded, flash_attn_func(q, k, v, 1.0, True, (255, 0)))
    leftpad = flash_attn_with_kvcache(
        q, padded_k, padded_v, cache_leftpad=torch.tensor([37]), softmax_scale=1.0, window_size=(255, 0)
    )
    assert torch.equal(padded, leftpad)


def test_packed_requests_give_the_bits_of_single_ones(dtype):
    q, k, v = sliding(200, dtype)
    rows, lengths = [1, 5, 10], [40, 60, 100]
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(torch.int32) for sizes in (rows, lengths))
    packed = flash_attn_varlen_func(
        q[0], k[0], v[0], cu_q, cu_k, max(rows), max(lengths), softmax_scale=1.0, causal=True, window_size=(31, 0)
    )
    for b in range(3):
        mine, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = flash_attn_func(q[:, mine], k[:, keys], v[:, keys], 1.0, True, (31, 0))
        assert torch.equal(alone[0], packed[mine])


def test_two_runs_give_the_same_bits(dtype):
    q, k, v = sliding(600, dtype)
    first = flash_attn_func(q, k, v, 1.0, True)
    assert torch.equal(first, flash_attn_func(q, k, v, 1.0, True))


@pytest.mark.parametrize("dim", [7, 33, 80])
def test_row_bits_do_not_depend_on_where_a_request_starts_in_memory(dim):
    """With rows of 28 or 132 bytes, each request is aligned otherwise."""
    rng = draw.generator(dim)
    q = draw.queries((3, 2, 4, dim), rng)
    k, v = draw.keys((3, 37, 2, dim), rng), draw.values((3, 37, 2, dim), rng)
    together = flash_attn_func(q, k, v, 1.0, True)
    for b in range(3):
        alone = flash_attn_func(q[b : b + 1].clone(), k[b : b + 1].clone(), v[b : b + 1].clone(), 1.0, True)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("dim", [7, 33, 80])
def test_row_bits_do_not_depend_on_where_a_window_starts_in_memory(dim, dtype):
    """Rows of one verification read windows that start one key apart: at another alignment each."""
    rng = draw.generator(dim)
    q = draw.queries((1, 8, 4, dim), rng).to(dtype)
    k, v = draw.keys((1, 90, 2, dim), rng).to(dtype), draw.values((1, 90, 2, dim), rng).to(dtype)
    together = flash_attn_func(q, k, v, 1.0, True, (40, 0))
    for row in range(8):
        stop = 90 - 8 + row + 1
        alone = flash_attn_func(q[:, row : row + 1], k[:, :stop].clone(), v[:, :stop].clone(), 1.0, True, (40, 0))
        trimmed = [x[:, stop - 41 : stop].clone() for x in (k, v)]
        assert torch.equal(alone[:, 0], together[:, row])
        assert torch.equal(flash_attn_func(q[:, row : row + 1], *trimmed, 1.0, True, (40, 0))[:, 0], together[:, row])
