"""Attention against a loop over batch, head and query, and against transformers' eager attention."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import randn
from torch import Tensor
from transformers.models.gemma4_unified.modeling_gemma4_unified import eager_attention_forward

from gemma4_kernels.reference import attention, flash_attention, plain_attention, visible

BLOCKS = torch.tensor([[-2, -2, -1, 0, 0, 0, 0, -1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)


def inputs(num_queries: int = 5, num_keys: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q (2, Sq, 6, 16), k and v (2, Sk, 2, 16)."""
    q = randn(2, num_queries, 6, 16, seed=1, dtype=dtype)
    return q, randn(2, num_keys, 2, 16, seed=2, dtype=dtype), randn(2, num_keys, 2, 16, seed=3, dtype=dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One query of one head at a time, over the keys it sees."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(2, 6, q.shape[1], dtype=torch.float64)
    for b in range(2):
        for head in range(6):
            keys, values = k[b, :, head // 3].double(), v[b, :, head // 3].double()
            for i in range(q.shape[1]):
                seen = mask[b % len(mask), i]
                scores = keys[seen] @ q[b, i, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / scores.exp().sum()
                out[b, i, head] = weights @ values[seen]
                lse[b, head, i] = scores.exp().sum().log()
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 0.5])
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    ("causal", "window_size"), [(False, (-1, -1)), (True, (-1, -1)), (True, (3, 0)), (False, (2, 1)), (True, (2, 7))]
)
def test_flash_attention_is_the_loop(
    softcap: float, scale: float | None, causal: bool, window_size: tuple[int, int]
) -> None:
    q, k, v = inputs()
    key_lengths = torch.tensor([11, 6])
    out, lse = flash_attention(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        block_ids=BLOCKS,
        key_lengths=key_lengths,
    )
    mask = visible(
        5,
        11,
        causal=causal,
        window_size=window_size,
        block_ids=BLOCKS,
        key_lengths=key_lengths,
        key_visible=BLOCKS != -2,
    )
    expected, expected_lse = by_hand(q, k, v, scale or 0.25, softcap, mask)
    assert out.dtype == torch.float64
    assert float((out - expected).abs().max()) < 1e-13
    assert float((lse - expected_lse).abs().max()) < 1e-13


def test_a_gemma_window_counts_the_token_itself() -> None:
    q, k, v = inputs()
    out, _ = flash_attention(q[:, -1:], k, v, causal=True, window_size=(3, 0))
    only_four, _ = flash_attention(q[:, -1:], k[:, -4:], v[:, -4:], causal=True)
    assert float((out - only_four).abs().max()) < 1e-14


def test_hidden_keys_are_seen_by_nobody() -> None:
    q, k, v = inputs(num_queries=11)
    out, lse = flash_attention(q[:1], k[:1], v[:1], causal=True, block_ids=BLOCKS[:1])
    assert (out[:, :2] == 0).all()
    assert (lse[:, :, :2] == -math.inf).all()
    without, _ = flash_attention(q[:1, 2:], k[:1, 2:], v[:1, 2:], causal=True, block_ids=BLOCKS[:1, 2:])
    assert float((out[:, 2:] - without).abs().max()) < 1e-14


@pytest.mark.parametrize("function", [flash_attention, plain_attention])
def test_rows_that_see_nothing_are_zero_and_never_nan(function: Any) -> None:
    q, k, v = inputs()
    out, lse = function(q, k, v, causal=True, key_lengths=torch.tensor([3, 0]))
    assert not out.isnan().any()
    assert (out[0, :2] == 0).all()
    assert (out[1] == 0).all()
    assert (lse[0, :, :2] == -math.inf).all()
    assert (lse[1] == -math.inf).all()
    assert (lse[0, :, 2:] > -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    out, lse = flash_attention(q, k, v, causal=True, dtype=dtype)
    exact, exact_lse = flash_attention(q, k, v, causal=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((out - exact).abs().max()) <= float(exact.abs().max()) * max(torch.finfo(dtype).eps, 1e-6)
    assert float((lse - exact_lse).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_plain_attention_has_the_bits_of_transformers_eager(dtype: torch.dtype, softcap: float) -> None:
    # Laid out as transformers has them, (B, H, S, D): a product's last bits depend on it.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(dtype=dtype))
    mask = visible(5, 11, causal=True, window_size=(6, 0), block_ids=BLOCKS, key_visible=BLOCKS != -2)
    theirs, _ = eager_attention_forward(
        SimpleNamespace(num_key_value_groups=3, training=False),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        torch.zeros(2, 1, 5, 11, dtype=dtype).masked_fill(~mask[:, None], torch.finfo(dtype).min),
        scaling=0.25,
        softcap=softcap or None,
    )
    out, lse = plain_attention(q, k, v, causal=True, window_size=(6, 0), block_ids=BLOCKS, softcap=softcap)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, theirs)


def test_bias_is_added_to_the_scores() -> None:
    q, k, v = inputs()
    bias = randn(2, 6, 5, 11)
    out, lse = attention(q, k, v, scale=1.0, visible=None, bias=bias, dtype=torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(3, dim=2)) + bias
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double().repeat_interleave(3, dim=2))
    assert float((out - expected).abs().max()) < 1e-13
    assert float((lse - scores.logsumexp(-1)).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 96)}, ValueError, "q: expected"),
        ({"k": torch.zeros(2, 11, 2, 16, dtype=torch.long)}, TypeError, "k: expected a floating dtype"),
        ({"v": torch.zeros(2, 10, 2, 16)}, ValueError, "v: expected k's shape"),
        ({"q": torch.zeros(2, 5, 6, 8)}, ValueError, "k: expected batch 2 and head_dim 8"),
        ({"q": torch.zeros(2, 5, 5, 16)}, ValueError, "q: expected a multiple of k's 2 heads, got 5"),
        ({"window_size": (-2, 0)}, ValueError, "window_size: expected"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"block_ids": torch.zeros(2, 5, dtype=torch.int32)}, ValueError, r"block_ids: expected shape \(2, 11\)"),
        ({"block_ids": torch.zeros(2, 11)}, TypeError, "block_ids: expected integers"),
        ({"key_lengths": torch.tensor([3])}, ValueError, r"key_lengths: expected shape \(2,\)"),
        ({"key_lengths": torch.tensor([3, 12])}, ValueError, r"key_lengths: expected 0 to 11.*\[3, 12\]"),
        ({"key_lengths": torch.tensor([3, -1])}, ValueError, "key_lengths: expected 0 to 11"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs()
    for function in (flash_attention, plain_attention):
        with pytest.raises(error, match=message):
            function(**{"q": q, "k": k, "v": v, **changes})
