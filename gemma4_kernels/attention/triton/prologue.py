"""What stands in front of attention, in one launch: norms of q, k and v, rotation of q and k, the write into the cache.

    q       (B, S, HQ, D)          k, v  (B, S, HKV, D), k absent where the cache holds values alone
    cos, sin (B or 1, S, D)        out   (B, S, HQ, D), contiguous
    caches  (B, CAPACITY, HKV, D), or pages (P, PAGE, HKV, D) with a block table (B, pages of a request)

One program owns one row and a few heads of it: of q, or of k and v. A head is held as its two halves, because RoPE turns the
pairs (d, d + D/2): both numbers of a pair are then in the same place of two tiles, and nothing is exchanged.

Sums are fp32. Every rounding of transformers' modules is made where they make it: a norm is rounded to the tensors' dtype
once, and of the rotation each product and the sum. Multiply-adds are not fused (`enable_fp_fusion=False`): fp32 tensors would
lose the rounding of a product. What may still differ from PyTorch is the order of the sum of squares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.attention.triton.call import dense
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.triton_common.rounding import round_to, to_fp32

# Numbers of a half-head tile: eight for each of 128 threads, 16 bytes of bf16. At head_dim 256 and 512 a head then lies
# within one warp, and its sum of squares needs no shared memory.
TILE_NUMBERS = 1024
NUM_WARPS = 4


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """x (fp32) after a rounding to DTYPE, still as fp32."""
    return to_fp32(round_to(x, DTYPE))


# One head, as its halves --------------------------------------------------------------------------------------------


@triton.jit
def _load_halves(ptrs, mask, HEAD_DIM: tl.constexpr):
    """The two halves of what stands at ptrs, as fp32."""
    low = tl.load(ptrs, mask=mask, other=0.0)
    high = tl.load(ptrs + HEAD_DIM // 2, mask=mask, other=0.0)
    return to_fp32(low), to_fp32(high)


@triton.jit
def _store_halves(ptrs, low, high, mask, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    tl.store(ptrs, round_to(low, DTYPE), mask=mask)
    tl.store(ptrs + HEAD_DIM // 2, round_to(high, DTYPE), mask=mask)


@triton.jit
def _normed(low, high, weight_ptr, pair, in_head, eps, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """x * (mean(x^2) + eps)^-0.5 (* weight), rounded once; low, high, pair, in_head [HEADS, PAIRS]."""
    total = tl.sum(low * low + high * high, axis=1)  # [HEADS]
    mean = tl.div_rn(total, tl.full(total.shape, HEAD_DIM, tl.float32))
    # PyTorch's CPU kernel takes pow(m, -0.5) as 1 / sqrt(m), both rounded to nearest, and this gives its bits. Its CUDA
    # kernel takes rsqrt, whose last bits are left to the card: nothing could equal it on every one.
    inverse = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))[:, None]
    low, high = low * inverse, high * inverse
    if weight_ptr is not None:
        weight_low, weight_high = _load_halves(weight_ptr + pair, in_head, HEAD_DIM)
        low, high = low * weight_low, high * weight_high
    return _rounded(low, DTYPE), _rounded(high, DTYPE)


@triton.jit
def _rotated(low, high, cos_ptr, sin_ptr, pair, in_head, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """x * cos + rotate_half(x) * sin with rotate_half((a, b)) = (-b, a); of three roundings the last is left to the store."""
    cos_low, cos_high = _load_halves(cos_ptr + pair, in_head, HEAD_DIM)  # [HEADS, PAIRS]
    sin_low, sin_high = _load_halves(sin_ptr + pair, in_head, HEAD_DIM)
    turned_low = _rounded(low * cos_low, DTYPE) - _rounded(high * sin_low, DTYPE)
    turned_high = _rounded(high * cos_high, DTYPE) + _rounded(low * sin_high, DTYPE)
    return turned_low, turned_high


@triton.jit
def _place(position, request, block_table_ptr, stride_tb, table_pages, num_pages, page_size):
    """(entry, row) of a position in the cache, and whether there is such a row."""
    inside = (position >= 0) & (position < table_pages * page_size)
    if block_table_ptr is None:
        # A contiguous cache is one page for each request, the request's own.
        return request, position, inside
    else:
        column = tl.where(inside, position // page_size, 0)
        page = tl.load(block_table_ptr + request * stride_tb + column, mask=inside, other=-1).to(tl.int64)
        return page, position % page_size, inside & (page >= 0) & (page < num_pages)


# The kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def norm_rope_append(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr,
    block_table_ptr,
    num_rows, num_q_heads, num_kv_heads, table_pages, num_pages, page_size, eps,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_cb, stride_cs, stride_sb, stride_ss,
    stride_kcb, stride_kcs, stride_kch, stride_vcb, stride_vcs, stride_vch, stride_tb,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # strides of a long prefill go beyond 32 bits
    request, row = token // num_rows, token % num_rows
    block = tl.program_id(1)
    q_blocks = tl.cdiv(num_q_heads, HEADS)
    # Weights and angles are loaded once for each head, by the threads that need them: what several heads share comes
    # from the L1 cache, and no thread waits for another.
    pair = tl.broadcast_to(tl.arange(0, PAIRS)[None, :], [HEADS, PAIRS])
    in_head = pair < HEAD_DIM // 2
    cos_ptr += request * stride_cb + row * stride_cs
    sin_ptr += request * stride_sb + row * stride_ss
    if block < q_blocks:
        head = (block * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)  # [HEADS, 1]
        mask = (head < num_q_heads) & in_head
        q_ptrs = q_ptr + request * stride_qb + row * stride_qs + head * stride_qh + pair
        low, high = _load_halves(q_ptrs, mask, HEAD_DIM)  # [HEADS, PAIRS]
        low, high = _normed(low, high, q_weight_ptr, pair, in_head, eps, HEAD_DIM, DTYPE)
        low, high = _rotated(low, high, cos_ptr, sin_ptr, pair, in_head, HEAD_DIM, DTYPE)
        _store_halves(out_ptr + (token * num_q_heads + head) * HEAD_DIM + pair, low, high, mask, HEAD_DIM, DTYPE)
    else:
        head = ((block - q_blocks) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)  # [HEADS, 1]
        position = tl.load(lengths_ptr + request).to(tl.int64) + row
        entry, place, inside = _place(
            position, request, block_table_ptr, stride_tb, table_pages, num_pages, page_size
        )  # fmt: skip
        mask = (head < num_kv_heads) & in_head
        v_ptrs = v_ptr + request * stride_vb + row * stride_vs + head * stride_vh + pair
        low, high = _load_halves(v_ptrs, mask, HEAD_DIM)  # [HEADS, PAIRS]
        low, high = _normed(low, high, None, pair, in_head, eps, HEAD_DIM, DTYPE)
        v_cache_ptrs = v_cache_ptr + entry * stride_vcb + place * stride_vcs + head * stride_vch + pair
        _store_halves(v_cache_ptrs, low, high, mask & inside, HEAD_DIM, DTYPE)
        if k_ptr is not None:
            k_ptrs = k_ptr + request * stride_kb + row * stride_ks + head * stride_kh + pair
            low, high = _load_halves(k_ptrs, mask, HEAD_DIM)
            low, high = _normed(low, high, k_weight_ptr, pair, in_head, eps, HEAD_DIM, DTYPE)
            low, high = _rotated(low, high, cos_ptr, sin_ptr, pair, in_head, HEAD_DIM, DTYPE)
            k_cache_ptrs = k_cache_ptr + entry * stride_kcb + place * stride_kcs + head * stride_kch + pair
            _store_halves(k_cache_ptrs, low, high, mask & inside, HEAD_DIM, DTYPE)


# The launcher -------------------------------------------------------------------------------------------------------

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def plan(
    q: Tensor, k: Tensor | None, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor | None, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float, out: Tensor,
) -> Launch:  # fmt: skip
    """The launch for one layer; k, k_norm_weight and k_cache are None where the cache holds values alone."""
    batch, num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = v.shape[2]
    cache_seqlens, block_table = cache_seqlens.contiguous(), dense(block_table)
    entries, rows_of_entry = v_cache.shape[:2]
    pairs = triton.next_power_of_2(head_dim // 2)
    heads = min(max(1, TILE_NUMBERS // pairs), triton.next_power_of_2(max(num_q_heads, num_kv_heads)))
    strides = {
        **_strides("q", "bsh", q), **_strides("k", "bsh", k), **_strides("v", "bsh", v),
        **_strides("c", "bs", cos), **_strides("s", "bs", sin),
        **_strides("kc", "bsh", k_cache), **_strides("vc", "bsh", v_cache), **_strides("t", "b", block_table),
    }  # fmt: skip
    for name, table in (("c", cos), ("s", sin)):
        if table.shape[0] == 1:  # one rotation for all requests
            strides[f"stride_{name}b"] = 0
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "q_weight_ptr": q_norm_weight, "k_weight_ptr": k_norm_weight, "cos_ptr": cos,
        "sin_ptr": sin, "out_ptr": out, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "lengths_ptr": cache_seqlens,
        "block_table_ptr": block_table, "num_rows": num_rows, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads,
        "table_pages": 1 if block_table is None else block_table.shape[1], "num_pages": entries,
        "page_size": rows_of_entry, "eps": eps,
    }  # fmt: skip
    return Launch(
        kernel=norm_rope_append,
        grid=(batch * num_rows, triton.cdiv(num_q_heads, heads) + triton.cdiv(num_kv_heads, heads)),
        arguments=arguments | strides,
        constants={"HEAD_DIM": head_dim, "PAIRS": pairs, "HEADS": heads, "DTYPE": _DTYPES[q.dtype]},
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _strides(name: str, dims: str, tensor: Tensor | None) -> dict[str, int]:
    """stride_qb, stride_qs, ...: of the leading dims, 0 for a tensor that is absent."""
    return {f"stride_{name}{dim}": 0 if tensor is None else tensor.stride(i) for i, dim in enumerate(dims)}


def qkv_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    out = q.new_empty(q.shape)
    plan(
        q, k, v, q_norm_weight, k_norm_weight, cos, sin, k_cache, v_cache, cache_seqlens, block_table, eps, out
    ).run()  # fmt: skip
    return out


def k_eq_v_norm_rope_append(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, eps: float, values_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert values_scale is None, "the features of this backend hold no values of 8 bits"
    out = q.new_empty(q.shape)
    plan(q, None, k, q_norm_weight, None, cos, sin, None, values, cache_seqlens, block_table, eps, out).run()
    return out
