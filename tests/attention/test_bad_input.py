"""Every wrong call is refused before anything is written, in a message that names the argument and what came."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import (
    BackendError,
    DeviceError,
    DTypeError,
    ShapeError,
    StrideError,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    k_eq_v_attention,
    use_backend,
)

B, SQ, SK, HQ, HKV, D = 2, 3, 8, 4, 2, 16


def dense(**changes):
    call = {"q": torch.zeros(B, SQ, HQ, D), "k": torch.zeros(B, SK, HKV, D), "v": torch.zeros(B, SK, HKV, D)}
    return call | changes


def varlen(**changes):
    call = {
        "q": torch.zeros(5, HQ, D), "k": torch.zeros(9, HKV, D), "v": torch.zeros(9, HKV, D),
        "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 9]), "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }  # fmt: skip
    return call | changes


def cached(**changes):
    call = {
        "q": torch.zeros(B, SQ, HQ, D),
        "k_cache": torch.zeros(B, SK, HKV, D),
        "v_cache": torch.zeros(B, SK, HKV, D),
    }
    return call | changes


def appended(**changes):
    new = torch.zeros(B, 2, HKV, D)
    return cached(k=new, v=new, cache_seqlens=torch.tensor([1, 2])) | changes


def paged(**changes):
    pages = torch.zeros(6, 4, HKV, D)
    table = torch.tensor([[0, 1], [5, 2]])
    return cached(k_cache=pages, v_cache=pages, block_table=table, cache_seqlens=torch.tensor([8, 5])) | changes


def k_eq_v(**changes):
    call = {
        "q": torch.zeros(B, SQ, HQ, D), "values": torch.zeros(B, SK, HKV, D), "k_norm_weight": torch.ones(D),
        "inv_freq": torch.zeros(D // 2),
    }  # fmt: skip
    return call | changes


ELSEWHERE = {"device": "meta"}
TRANSPOSED = torch.zeros(B, SK, D, HKV).transpose(2, 3)

# function, arguments, the exception, and what its message must say
WRONG = [
    (flash_attn_func, dense(q=None), TypeError, "q must be a tensor, got NoneType"),
    (flash_attn_func, dense(q=torch.zeros(B, SQ, D)), ShapeError, r"q must have shape \(B, Sq, Hq, D\), got \(2, 3, 16\)"),
    (flash_attn_func, dense(k=torch.zeros(B, SK, HKV, 8)), ShapeError, r"k must have shape \(2, Sk, Hkv, 16\), got"),
    (flash_attn_func, dense(v=torch.zeros(B, 7, HKV, D)), ShapeError, r"v must have shape \(2, 8, 2, 16\), got \(2, 7"),
    (flash_attn_func, dense(k=torch.zeros(1, SK, HKV, D)), ShapeError, r"k must have shape \(2, Sk"),
    (flash_attn_func, dense(q=torch.zeros(B, SQ, 3, D)), ShapeError, "multiple of k's 2 heads, got 3"),
    (flash_attn_func, dense(k=torch.zeros(B, SK, 0, D), v=torch.zeros(B, SK, 0, D)), ShapeError, "k's 0 heads"),
    (
        flash_attn_func,
        {n: torch.zeros(1, 2, 1, 520) for n in "qkv"},
        ShapeError,
        r"head_dim must lie in \[1, 512\], got 520",
    ),
    (flash_attn_func, dense(q=torch.zeros(B, SQ, HQ, D).half()), DTypeError, "k must be float16, got float32"),
    (flash_attn_func, {n: torch.zeros(1, 2, 1, 4, dtype=torch.int32) for n in "qkv"}, DTypeError, "q must be bfloat16 or"),
    (flash_attn_func, dense(k=TRANSPOSED), StrideError, r"k must be dense in its last dim .*contiguous"),
    (flash_attn_func, dense(k=torch.zeros(B, SK, HKV, D, **ELSEWHERE)), DeviceError, "k must be on cpu like q, got meta"),
    (flash_attn_func, dense(softmax_scale=0.0), ValueError, "softmax_scale must be positive.*dropout_p, is a keyword"),
    (flash_attn_func, dense(softmax_scale=float("nan")), ValueError, "softmax_scale must be positive and finite, got nan"),
    (flash_attn_func, dense(softmax_scale="1"), TypeError, "softmax_scale must be a number, got '1'"),
    (flash_attn_func, dense(causal=0.5), TypeError, "causal must be True or False, got 0.5"),
    (flash_attn_func, dense(window_size=7), TypeError, r"window_size must be a pair \(left, right\), got 7"),
    (flash_attn_func, dense(window_size=(-2, 0)), ValueError, r"window_size\[0\] must be at least -1, got -2"),
    (flash_attn_func, dense(window_size=(1.5, 0)), TypeError, r"window_size\[0\] must be a whole number, got 1.5"),
    (flash_attn_func, dense(softcap=-1.0), ValueError, "softcap must be positive and finite, got -1.0"),
    (flash_attn_func, dense(dropout_p=0.1), ValueError, "dropout_p must be 0.0, got 0.1: dropout belongs to training"),
    (flash_attn_func, dense(alibi_slopes=torch.ones(4)), ValueError, r"alibi_slopes must be None, got a tensor of shape"),
    (flash_attn_func, dense(return_attn_probs=True), ValueError, "return_attn_probs must be False, got True.*return_lse"),
    (flash_attn_func, dense(return_lse=1), TypeError, "return_lse must be True or False, got 1"),
    (flash_attn_func, dense(deterministic=None), TypeError, "deterministic must be True or False, got None"),
    (
        flash_attn_func,
        dense(block_ids=torch.zeros(B, 7, dtype=torch.int32)),
        ShapeError,
        r"block_ids must have shape \(2, 8\), got \(2, 7\)",
    ),
    (flash_attn_func, dense(block_ids=torch.zeros(B, SK)), DTypeError, "block_ids must be int32 or int64, got float32"),
    (flash_attn_varlen_func, varlen(q=torch.zeros(1, 5, HQ, D)), ShapeError, r"q must have shape \(total_q, Hq, D\)"),
    (flash_attn_varlen_func, varlen(cu_seqlens_k=torch.tensor([0, 9])), ShapeError, r"cu_seqlens_k must have shape \(3\)"),
    (
        flash_attn_varlen_func,
        varlen(cu_seqlens_q=torch.zeros(0, dtype=torch.int32), cu_seqlens_k=torch.zeros(0, dtype=torch.int32)),
        ShapeError,
        "cu_seqlens_q must have at least one element",
    ),
    (flash_attn_varlen_func, varlen(cu_seqlens_q=torch.tensor([0.0, 2, 5])), DTypeError, "cu_seqlens_q must be int32 or"),
    (
        flash_attn_varlen_func,
        varlen(cu_seqlens_q=torch.tensor([0, 3, 2])),
        ValueError,
        "difference of cu_seqlens_q must lie in .* got -1",
    ),
    (flash_attn_varlen_func, varlen(cu_seqlens_q=torch.tensor([1, 2, 5])), ValueError, r"cu_seqlens_q\[0\] must lie"),
    (flash_attn_varlen_func, varlen(cu_seqlens_q=torch.tensor([0, 3, 6])), ValueError, r"cu_seqlens_q\[-1\] .*, got 6"),
    (flash_attn_varlen_func, varlen(cu_seqlens_k=torch.tensor([0, 5, 10])), ValueError, r"cu_seqlens_k\[-1\] .*, got 10"),
    (flash_attn_varlen_func, varlen(max_seqlen_k=4), ValueError, r"cu_seqlens_k must lie in \[0, 4\], got 5"),
    (flash_attn_varlen_func, varlen(max_seqlen_q=2.0), TypeError, "max_seqlen_q must be a whole number, got 2.0"),
    (flash_attn_varlen_func, varlen(dropout_p=0.5), ValueError, "dropout_p must be 0.0, got 0.5"),
    (flash_attn_with_kvcache, cached(k_cache=torch.zeros(3, SK, HKV, D)), ShapeError, r"k_cache must have shape \(2, S"),
    (flash_attn_with_kvcache, cached(cache_seqlens=9), ValueError, "cache_seqlens must be at most 8, got 9"),
    (flash_attn_with_kvcache, cached(cache_seqlens=-1), ValueError, "cache_seqlens must be at least 0, got -1"),
    (flash_attn_with_kvcache, cached(cache_seqlens=1.0), TypeError, "cache_seqlens must be a whole number, got 1.0"),
    (flash_attn_with_kvcache, cached(cache_seqlens=torch.tensor([9, 1])), ValueError, r"cache_seqlens must lie .*, got 9"),
    (flash_attn_with_kvcache, cached(cache_seqlens=torch.tensor([-1, 1])), ValueError, r"cache_seqlens must lie .* got -1"),
    (flash_attn_with_kvcache, cached(cache_seqlens=torch.tensor([1.0, 1])), DTypeError, "cache_seqlens must be int32 or"),
    (flash_attn_with_kvcache, cached(cache_seqlens=torch.tensor([1])), ShapeError, r"cache_seqlens must have shape \(2\)"),
    (flash_attn_with_kvcache, cached(k=torch.zeros(B, 1, HKV, D)), ValueError, "k and v must be given together, got only k"),
    (flash_attn_with_kvcache, cached(cache_batch_idx=torch.tensor([0, 2])), ValueError, r"cache_batch_idx must lie .* got 2"),
    (flash_attn_with_kvcache, cached(cache_leftpad=torch.tensor([0, 9])), ValueError, r"cache_leftpad must lie .* got 9"),
    (flash_attn_with_kvcache, cached(alibi_slopes=torch.ones(4)), ValueError, "alibi_slopes must be None"),
    (flash_attn_with_kvcache, cached(num_splits=-1), ValueError, "num_splits must be at least 0, got -1"),
    (flash_attn_with_kvcache, cached(rotary_cos=torch.ones(8, 4)), ValueError, "rotary_sin must be given together"),
    (
        flash_attn_with_kvcache,
        cached(rotary_cos=torch.ones(7, 4), rotary_sin=torch.ones(7, 4)),
        ShapeError,
        "rotary_cos must have a row for each of the cache's 8 positions, got 7",
    ),
    (
        flash_attn_with_kvcache,
        cached(rotary_cos=torch.ones(8, 4), rotary_sin=torch.ones(8, 4), cache_seqlens=torch.tensor([9, 1])),
        ValueError,
        r"cache_seqlens must lie in \[0, 8\], got 9",
    ),
    (
        flash_attn_with_kvcache,
        cached(rotary_cos=torch.ones(8, 9), rotary_sin=torch.ones(8, 9)),
        ShapeError,
        "rotary_dim must be at most head_dim 16, got 18",
    ),
    (flash_attn_with_kvcache, appended(cache_seqlens=None), ValueError, "cache_seqlens must say where"),
    (flash_attn_with_kvcache, appended(cache_seqlens=7), ValueError, "cache_seqlens must be at most 6, got 7"),
    (flash_attn_with_kvcache, appended(cache_seqlens=torch.tensor([7, 1])), ValueError, r"before 2 new rows must lie .* got 7"),
    (flash_attn_with_kvcache, appended(v=torch.zeros(B, 2, 1, D)), ShapeError, r"v must have shape \(2, 2, 2, 16\)"),
    (flash_attn_with_kvcache, appended(k=torch.zeros(B, 2, HKV, D).half()), DTypeError, "k must be float32, got float16"),
    (flash_attn_with_kvcache, paged(block_table=torch.tensor([[0, 6], [5, 2]])), ValueError, r"block_table must .* got 6"),
    (flash_attn_with_kvcache, paged(block_table=torch.tensor([[0, -1], [5, 2]])), ValueError, r"block_table must .* got -1"),
    (flash_attn_with_kvcache, paged(block_table=torch.tensor([[0.0, 1], [5, 2]])), DTypeError, "block_table must be int32"),
    (flash_attn_with_kvcache, paged(block_table=torch.tensor([[0, 1]])), ShapeError, "block_table must have shape"),
    (flash_attn_with_kvcache, paged(cache_seqlens=torch.tensor([9, 1])), ValueError, r"cache_seqlens must lie .* got 9"),
    (flash_attn_with_kvcache, paged(cache_leftpad=torch.tensor([0, 0])), ValueError, "cache_leftpad must be None with block_"),
    (k_eq_v_attention, k_eq_v(values=torch.zeros(B, SK, HKV, 8)), ShapeError, r"values must have shape \(2, S, Hkv, 16\)"),
    (k_eq_v_attention, k_eq_v(k_norm_weight=torch.ones(8)), ShapeError, r"k_norm_weight must have shape \(16\), got \(8\)"),
    (k_eq_v_attention, k_eq_v(inv_freq=torch.zeros(D)), ShapeError, r"inv_freq must have shape \(8\), got \(16\)"),
    (k_eq_v_attention, k_eq_v(inv_freq=torch.zeros(8).half()), DTypeError, "inv_freq must be float32 or float64"),
    (k_eq_v_attention, k_eq_v(cache_seqlens=9), ValueError, "cache_seqlens must be at most 8, got 9"),
    (k_eq_v_attention, k_eq_v(softmax_scale=None), TypeError, "softmax_scale must be a number, got None"),
    (
        k_eq_v_attention,
        {"q": torch.zeros(1, 1, 1, 15), "values": torch.zeros(1, 2, 1, 15), "k_norm_weight": torch.ones(15),
         "inv_freq": torch.zeros(7)},
        ShapeError,
        "head_dim must be even, got 15",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "call", "error", "says"), WRONG, ids=[f"{w[0].__name__}-{w[3]}" for w in WRONG])
def test_a_wrong_call_is_refused_by_name(function, call, error, says):
    with pytest.raises(error, match=says) as caught:
        function(**call)
    assert str(caught.value).startswith(function.__name__ + ": ")
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize("call", [dense(), varlen(), cached(), appended(), paged(), k_eq_v()])
def test_the_right_calls_are_right(call):
    functions = {"values": k_eq_v_attention, "cu_seqlens_q": flash_attn_varlen_func, "k_cache": flash_attn_with_kvcache}
    function = next((f for name, f in functions.items() if name in call), flash_attn_func)
    assert function(**call).shape == call["q"].shape


@pytest.mark.parametrize(
    ("wrong", "backend", "says"),
    [
        ({"cache_seqlens": torch.tensor([7, 1])}, "eager", "cache_seqlens"),
        ({"cache_leftpad": torch.tensor([0, 99])}, "eager", "cache_leftpad"),
        ({}, "cuda", "has no kernel for this op"),
    ],
)
def test_a_refused_append_writes_nothing(wrong, backend, says):
    call = appended(k=torch.ones(B, 2, HKV, D), v=torch.ones(B, 2, HKV, D)) | wrong
    with use_backend(backend), pytest.raises((ValueError, BackendError), match=says):
        flash_attn_with_kvcache(**call)
    assert not call["k_cache"].any()
    assert not call["v_cache"].any()
