"""What stands in front of attention, on plain PyTorch: norms, rotation, and the write into the cache.

    q (B, S, Hq, D)    k, v (B, S, Hkv, D)    cos, sin (B or 1, S, D)    out (B, S, Hq, D)

The order of operations and every rounding are those of transformers' modeling_gemma4_unified: a norm is computed in fp32
(fp64 for fp64 tensors) and rounded once; the rotation is three operations in the tensors' own dtype, each rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.attention import value_codes
from gemma4_kernels.attention.eager import appended_rows


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # pow, not rsqrt: transformers writes it so, and the two need not have the same last bit.
    normed = wide * torch.pow(wide.pow(2).mean(dim=-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return normed.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(2)


def qkv_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    rows = appended_rows(k_cache, k, cache_seqlens, None, block_table)
    out = _rotated(_normed(q, q_norm_weight, eps), cos, sin)
    k_cache[rows] = _rotated(_normed(k, k_norm_weight, eps), cos, sin)
    v_cache[rows] = _normed(v, None, eps)
    return out.contiguous()


def k_eq_v_norm_rope_append(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, eps: float, values_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows = appended_rows(values, k, cache_seqlens, None, block_table)
    out = _rotated(_normed(q, q_norm_weight, eps), cos, sin)
    normed = _normed(k, None, eps)
    if values.dtype != k.dtype:
        normed, scale = value_codes.encode(normed, values.dtype, values_scale)
        if values_scale is not None and values_scale.dim() == 3:  # a scale for each row
            values_scale[rows] = scale
    values[rows] = normed
    return out.contiguous()
