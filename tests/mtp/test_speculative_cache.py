"""The cache of a speculating batch against one that keeps everything: rejected rows, turning rings, requests that leave."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import flash_attn_func
from gemma4_kernels.attention.value_codes import FLOAT8_SCALE, decode, encode
from gemma4_kernels.mtp import CachedLayer, SpeculativeCache
from gemma4_kernels.reference import keys_from_values, proportional_inv_freq

WINDOW, HEADS, HEAD_DIM = 12, 2, 16
SLIDING = CachedLayer("sliding", HEADS, HEAD_DIM, window=WINDOW)
FULL = CachedLayer("full", HEADS, HEAD_DIM)
VALUES_ONLY = CachedLayer(
    "full",
    HEADS,
    HEAD_DIM,
    k_norm_weight=0.5 + torch.rand(HEAD_DIM),
    inv_freq=proportional_inv_freq(HEAD_DIM, 1e4, 0.5),
)
LAYERS = {3: SLIDING, 5: FULL, 8: VALUES_ONLY}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(batch, count, seed):
    """index -> keys and values (B, S, Hkv, D)."""
    return {
        index: tuple(randn(batch, count, HEADS, HEAD_DIM, seed=seed + 10 * index + part) for part in range(2))
        for index in LAYERS
    }


def expected(layer, q, keys, values):
    """Attention of the last rows over everything, from plain keys and values (1, S, Hkv, D)."""
    if layer is VALUES_ONLY:
        keys = keys_from_values(values, layer.k_norm_weight, layer.inv_freq, torch.arange(values.shape[1]))
    window = (layer.window - 1, 0) if layer.window else (-1, -1)
    return flash_attn_func(q, keys, values, 1.0, causal=True, window_size=window)


@pytest.mark.parametrize("drafts", [1, 4, 8])
@pytest.mark.parametrize("lengths", [(1, 5, 11), (12, 13, 30), (40, 2, 25)], ids=str)
def test_attention_is_that_over_all_committed_rows(drafts, lengths):
    batch, rounds = len(lengths), 9
    cache = SpeculativeCache(
        LAYERS, batch=batch, max_positions=max(lengths) + (drafts + 1) * (rounds + 1), tentative_rows=drafts + 1,
        dtype=torch.float64, device="cpu",
    )  # fmt: skip
    prompt = rows_of(batch, max(lengths), seed=0)
    cache.begin_prompts(list(lengths), 0, max(lengths))
    for index, (keys, values) in prompt.items():
        cache.write(index, keys, values)
    cache.commit(torch.tensor(lengths))
    kept = [{i: [x[b : b + 1, :n] for x in prompt[i]] for i in LAYERS} for b, n in enumerate(lengths)]
    rng = torch.Generator().manual_seed(1)
    for turn in range(rounds):
        if turn == 4:  # a request leaves, the others change places
            order = torch.arange(batch).flip(0)[:-1]
            cache.keep(order)
            kept, batch = [kept[b] for b in order.tolist()], len(order)
        # A pass may have fewer rows than the most; what strains a ring is the most rows of which one stays.
        count = drafts + 1 if turn % 3 else int(torch.randint(1, drafts + 2, (), generator=rng))
        new = rows_of(batch, count, seed=1000 * (turn + 1))
        positions = cache.begin_rows(count)
        assert positions[:, 0].tolist() == [rows[5][0].shape[1] for rows in kept]
        for index, layer in LAYERS.items():
            cache.write(index, *new[index])
            q = randn(batch, count, 2 * HEADS, HEAD_DIM, seed=turn)
            out = cache.attend(index, q, softmax_scale=1.0)
            for b, rows in enumerate(kept):
                whole = [
                    torch.cat((old, fresh[b : b + 1]), 1) for old, fresh in zip(rows[index], new[index], strict=True)
                ]
                torch.testing.assert_close(out[b : b + 1], expected(layer, q[b : b + 1], *whole), rtol=1e-9, atol=1e-9)
        accepted = torch.randint(1, count + 1 if turn % 2 else 2, (batch,), generator=rng)
        cache.commit(accepted)
        kept = [
            {i: [torch.cat((old, fresh[b : b + 1, :n]), 1) for old, fresh in zip(rows[i], new[i], strict=True)] for i in LAYERS}
            for b, (rows, n) in enumerate(zip(kept, accepted.tolist(), strict=True))
        ]  # fmt: skip
        _check_what_a_drafter_reads(cache, kept)


def _check_what_a_drafter_reads(cache, kept):
    """The newest window + 1 rows of the sliding layer, all of the full one, in their places."""
    shared = cache.rows(3, 5)
    for rows, index, newest in ((shared.sliding, 3, WINDOW + 1), (shared.full, 5, None)):
        page_size = rows.values.shape[1]
        for b, history in enumerate(kept):
            length = history[index][0].shape[1]
            assert int(shared.lengths[b]) == length
            for found, truth in ((rows.keys, history[index][0]), (rows.values, history[index][1])):
                for position in range(max(0, length - newest) if newest else 0, length):
                    page = int(rows.block_table[b, position // page_size])
                    assert torch.equal(found[page, position % page_size], truth[0, position])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_values_of_8_bits_are_attended_to_as_they_are_written(kind):
    """Rejected rows leave nothing behind, in the codes or in their scales; a drafter gets both."""
    cache = SpeculativeCache(
        {8: VALUES_ONLY}, batch=2, max_positions=200, tentative_rows=4, dtype=torch.float64, device="cpu",
        values_dtype=kind,
    )  # fmt: skip
    lengths = [70, 3]  # more than a page, and less
    prompt = randn(2, 70, HEADS, HEAD_DIM, seed=1)
    cache.begin_prompts(lengths, 0, 70)
    cache.write(8, prompt, prompt)
    cache.commit(torch.tensor(lengths))
    kept = [prompt[b : b + 1, :n] for b, n in enumerate(lengths)]
    for turn in range(4):
        new = randn(2, 4, HEADS, HEAD_DIM, seed=10 + turn) * (1 + turn)
        cache.begin_rows(4)
        cache.write(8, new, new)
        q = randn(2, 4, 2 * HEADS, HEAD_DIM, seed=turn)
        out = cache.attend(8, q, softmax_scale=1.0)
        for b, old in enumerate(kept):
            whole = torch.cat((old, new[b : b + 1]), 1)
            seen = decode(*encode(whole, kind, torch.full((HEADS,), FLOAT8_SCALE))).double()
            torch.testing.assert_close(
                out[b : b + 1], expected(VALUES_ONLY, q[b : b + 1], seen, seen), rtol=1e-9, atol=1e-9
            )
        cache.commit(torch.tensor([2, 4]))
        kept = [torch.cat((old, new[b : b + 1, :n]), 1) for b, (old, n) in enumerate(zip(kept, (2, 4), strict=True))]
    cache.keep(torch.tensor([1]))
    rows = cache.rows(8, 8).full
    pages = decode(rows.values, rows.values_scale)[rows.block_table[0].long()].flatten(0, 1)[None, : kept[1].shape[1]]
    assert torch.equal(pages, decode(*encode(kept[1], kind, torch.full((HEADS,), FLOAT8_SCALE))))


def test_a_dtype_that_values_cannot_have():
    with pytest.raises(TypeError, match=r"values_dtype must be .*float8_e4m3fn or torch.int8, got torch.int16"):
        SpeculativeCache(
            {0: FULL}, batch=1, max_positions=9, tentative_rows=1, dtype=torch.float32, device="cpu",
            values_dtype=torch.int16,
        )  # fmt: skip


def test_a_full_layer_that_needs_no_keys_caches_half():
    def nbytes(layer, values_dtype=None):
        return SpeculativeCache(
            {0: layer}, batch=2, max_positions=128, tentative_rows=5, dtype=torch.bfloat16, device="cpu",
            values_dtype=values_dtype,
        ).nbytes  # fmt: skip

    half = nbytes(VALUES_ONLY)
    assert half * 2 == nbytes(FULL)
    assert nbytes(VALUES_ONLY, torch.float8_e4m3fn) == half // 2 + 4 * HEADS
    assert nbytes(VALUES_ONLY, torch.int8) == half // 2 + 4 * HEADS * 2 * 128


def test_a_ring_does_not_grow_with_the_text():
    def nbytes(max_positions):
        return SpeculativeCache(
            {0: SLIDING}, batch=2, max_positions=max_positions, tentative_rows=5, dtype=torch.bfloat16, device="cpu"
        ).nbytes

    assert nbytes(100) == nbytes(100_000)


def test_layers_with_two_windows_are_refused():
    layers = {0: SLIDING, 1: CachedLayer("sliding", HEADS, HEAD_DIM, window=WINDOW + 1)}
    with pytest.raises(ValueError, match=r"SpeculativeCache: layers must have one window, got \[12, 13\]"):
        SpeculativeCache(layers, batch=1, max_positions=9, tentative_rows=1, dtype=torch.float32, device="cpu")
