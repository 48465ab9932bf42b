"""Single calls, in Triton's interpreter, that no list of shapes reaches: each was wrong once, or would be easily."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import (
    environment,
    flash_attn_func,
    flash_attn_with_kvcache,
    k_eq_v_attention,
    reference,
    use_backend,
)
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.errors import judge

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

from gemma4_kernels.attention.triton import backend, call, flash
from gemma4_kernels.triton_common import devices, launch


def drawn(rows: int, keys: int, dim: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0):
    rng = draw.generator(seed)
    q = draw.queries((1, rows, 4, dim), rng).to(dtype)
    return q, draw.keys((1, keys, 2, dim), rng).to(dtype), draw.values((1, keys, 2, dim), rng).to(dtype)


def both(function, *arguments, **options):
    """What Triton and eager give."""
    found = []
    for name in ("triton", "eager"):
        with use_backend(name):
            found.append(function(*arguments, **options))
    return found


@pytest.mark.parametrize("limits", [True, False])
def test_rows_in_front_of_the_first_key_see_their_block(limits):
    q, k, v = drawn(8, 8)
    options = {"cache_leftpad": torch.tensor([5]), "block_ids": torch.zeros(1, 8, dtype=torch.int32), "causal": True}
    got, expected = both(flash_attn_with_kvcache, q, k, v, cache_seqlens=8, window_limits_blocks=limits, **options)
    torch.testing.assert_close(got, expected)


def test_blocks_of_no_keys():
    q, k, v = drawn(3, 4)
    with use_backend("triton"):
        out, lse = flash_attn_func(
            q, k[:, :0], v[:, :0], block_ids=torch.zeros(1, 0, dtype=torch.int32), return_lse=True
        )
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_keys_left_of_the_window_may_hold_anything():
    q, k, v = drawn(1, 100)
    options = {"softmax_scale": 1.0, "causal": True, "window_size": (20, 0)}
    (expected, _) = both(flash_attn_func, q, k, v, **options)
    k[:, :79], v[:, :79] = float("nan"), float("inf")
    (got, _) = both(flash_attn_func, q, k, v, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([5, -(2**31) - 1], [0, 9]), ([-3, 2**40], [0, 9]), ([0, 5], [3 * 2**30, 2**33]), ([0, 5], [-(2**40), 9]),
    ],
)  # fmt: skip
def test_hostile_offsets_reach_nothing_outside(cu_q, cu_k):
    """On a device nobody checks them before the launch."""
    q, k, v = drawn(5, 9)
    out, lse = torch.full((12, 4, 32), 7.0), torch.full((4, 12), 7.0)
    asked = call.AttentionCall(
        q[0], k[0], v[0], batch=1, num_rows=4, capacity=9, scale=1.0, left=-1, right=0, cu_q=torch.tensor(cu_q),
        cu_k=torch.tensor(cu_k),
    )  # fmt: skip
    for planned in flash.plan(asked, out[:5], lse[:, :5], devices.INTERPRETED_CARD):
        planned.run()
    assert bool((out[5:] == 7.0).all())
    assert bool((lse[:, 5:] == 7.0).all())


def test_a_pool_without_pages_is_not_read():
    q, k, v = drawn(5, 9)
    paged = backend.flash_attn_kvcache(
        q, k[:, :0].reshape(0, 4, 2, 32), v[:, :0].reshape(0, 4, 2, 32), torch.tensor([5]), None, None,
        torch.zeros(1, 3, dtype=torch.int32), None, 1.0, 0.0, -1, 0, True, 0,
    )  # fmt: skip
    assert not paged[0].any()


@pytest.mark.parametrize("rows", [4, 20])
def test_a_longest_request_that_is_too_short_cuts_decode_and_prefill_alike(rows):
    q, k, v = drawn(rows, 400)
    cu = torch.tensor([0, rows]), torch.tensor([0, 400])
    short, _ = backend.flash_attn_varlen(q[0], k[0], v[0], *cu, None, rows, 128, 1.0, 0.0, -1, 0)
    with use_backend("eager"):
        expected = flash_attn_func(q, k[:, :128], v[:, :128], 1.0, True)
    torch.testing.assert_close(short, expected[0])


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("rotating", [(0, 10), (70, 90), (120, 128), (60, 70), (0, 128), (0, 0)])
def test_whichever_pairs_rotate(rotating, rows):
    """One block of 64 pairs, the first or the second, or both: the last is the slower kernel."""
    q, _, values = drawn(rows, 100, dim=256)
    weight = draw.k_norm_weight(256, draw.generator(1))
    inv_freq = torch.zeros(128)
    inv_freq[slice(*rotating)] = torch.rand(rotating[1] - rotating[0], generator=draw.generator(2)) + 0.01
    with use_backend("triton"):
        result = k_eq_v_attention(q, values, weight, inv_freq, return_lse=True)
    exact = reference.k_eq_v_attention(q, values, weight, inv_freq)
    plain = reference.plain_k_eq_v_attention(q, values, weight, inv_freq)
    for got, want, ordinary in zip(result, exact, plain, strict=True):
        assert (verdict := judge(got, want, ordinary)).ok, str(verdict)


def test_lengths_of_any_stride():
    q, k, v = (torch.cat((x, x)) for x in drawn(2, 40))
    for lengths in (torch.tensor([9, 0, 30, 0])[::2], torch.tensor([17]).expand(2)):
        got, expected = both(flash_attn_with_kvcache, q, k, v, cache_seqlens=lengths, causal=True)
        torch.testing.assert_close(got, expected)


def test_a_grid_beyond_the_device_is_refused():
    with pytest.raises(ValueError, match=r"at most 65535 heads.*split the batch"):
        launch.Launch(backend.append.append_kernel, (1, 70000), {}, {}, 1).run()
