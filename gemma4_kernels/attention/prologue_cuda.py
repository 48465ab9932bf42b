"""What stands in front of attention by the compiled kernel of csrc/attention/prologue.cu: one launch for a layer.

    q (B, S, Hq, D)    k, v (B, S, Hkv, D)    cos, sin (B or 1, S, D)    out (B, S, Hq, D), contiguous
    caches (B, capacity, Hkv, D), or pages (num_pages, page_size, Hkv, D) with a block table; values alone in 8 bits too

Shapes, dtypes and dense last dims have been checked before; lengths and pages are looked at by the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.attention import value_codes
from gemma4_kernels.attention.cuda import CODES
from gemma4_kernels.cuda_common import support
from gemma4_kernels.cuda_common.arguments import address, dtype_code, readable, stream_of


def qkv_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    return _call(
        "qkv_prologue", q, k, v, q_norm_weight, k_norm_weight, cos, sin, k_cache, v_cache, cache_seqlens, block_table, eps
    )  # fmt: skip


def k_eq_v_norm_rope_append(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, eps: float, values_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _call(
        "k_eq_v_prologue", q, None, k, q_norm_weight, None, cos, sin, None, values, cache_seqlens, block_table, eps,
        values_scale,
    )  # fmt: skip


def _call(
    function: str, q: Tensor, k: Tensor | None, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor | None,
    cos: Tensor, sin: Tensor, k_cache: Tensor | None, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    eps: float, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """k, its weight and its cache are None where the cache holds values alone; v_scale goes with values of 8 bits."""
    batch, rows, q_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    q_weight, k_weight = readable(q_norm_weight), readable(k_norm_weight)
    lengths = cache_seqlens.contiguous()
    table = block_table if block_table is None or block_table.stride(-1) == 1 else block_table.contiguous()
    module = support.module_for(q.device)
    arguments = module.PrologueArguments(
        batch=batch, rows=rows, q_heads=q_heads, kv_heads=v.shape[2], head_dim=head_dim, dtype=dtype_code(q), eps=eps,
        q=address(q), q_strides=_strides(q), k=address(k), k_strides=_strides(k), v=address(v), v_strides=_strides(v),
        q_weight=address(q_weight), q_weight_dtype=dtype_code(q_weight),
        k_weight=address(k_weight), k_weight_dtype=dtype_code(k_weight),
        cos=address(cos), cos_strides=_rotation_strides(cos), sin=address(sin), sin_strides=_rotation_strides(sin),
        out=address(out),
        k_cache=address(k_cache), k_cache_strides=_strides(k_cache),
        v_cache=address(v_cache), v_cache_strides=_strides(v_cache),
        entries=v_cache.shape[0], entry_rows=v_cache.shape[1],
        lengths=address(lengths), lengths_are_64_bit=lengths.dtype == torch.int64,
        block_table=address(table), block_table_is_64_bit=table is not None and table.dtype == torch.int64,
        table_stride=0 if table is None else table.stride(0), table_columns=0 if table is None else table.shape[1],
        codes=0 if v_scale is None else CODES[value_codes.FEATURES[v_cache.dtype]],
        v_scale=address(v_scale), v_scale_strides=_scale_strides(v_scale),
    )  # fmt: skip
    with stream_of(q.device) as stream:
        getattr(module, function)(arguments, stream)
    return out


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of all dims but the dense last one."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:-1]


def _scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """One number for each row and head, or for each head."""
    if scale is None:
        return (0, 0, 0)
    return scale.stride() if scale.dim() == 3 else (0, 0, *scale.stride())


def _rotation_strides(rotation: Tensor) -> tuple[int, int]:
    """One rotation may be that of all requests."""
    return 0 if rotation.shape[0] == 1 else rotation.stride(0), rotation.stride(1)
