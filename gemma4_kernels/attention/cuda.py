"""Attention over a cache by the compiled kernels of csrc/attention: up to 16 query rows, while a request decodes or verifies.

Shapes and dtypes have been checked before; `refuses` has said that the kernels serve them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.attention import value_codes
from gemma4_kernels.backends import Call
from gemma4_kernels.cuda_common import support
from gemma4_kernels.cuda_common.arguments import address, run
from gemma4_kernels.op_support import DECODE_ROWS

FLASH_HEAD_DIMS = (64, 128, 256)
K_EQ_V_HEAD_DIMS = (128, 256, 512)
CODED_HEAD_DIMS = (128, 512)  # of values in 8 bits
# Not block_ids: blocks of images belong to prompts, and a row that decodes has none.
FEATURES = frozenset({"softcap", "window", "paged", "leftpad", "batch_idx"})
CODES = {"float8_values": 1, "int8_values": 2}  # gemma4_codes of a feature
_ALIGNMENT = 16  # bytes: the copies of a kernel


def head_dims(op: str) -> tuple[int, ...]:
    return K_EQ_V_HEAD_DIMS if op == "k_eq_v_attention" else FLASH_HEAD_DIMS


def refuses(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if reason := support.refuses(call):
        return reason
    if call.shape_class.startswith("prefill"):
        return f"goes to {DECODE_ROWS} rows"
    served = CODED_HEAD_DIMS if call.features & CODES.keys() else head_dims(call.op)
    if call.head_dim and call.head_dim not in served:  # `info` asks for none in particular
        return f"has head_dim {', '.join(map(str, served))}, the call has {call.head_dim}"
    return None


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int, window_limits_blocks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _flash_decode(
        q, k, v, softmax_scale, softcap, window_left, window_right, batch=q.shape[0], rows=q.shape[1],
        capacity=k.shape[1],
    )  # fmt: skip


def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, softcap: float, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    capacity = max_seqlen_k if block_table is None else min(max_seqlen_k, capacity_of(k, block_table))
    return _flash_decode(
        q, k, v, softmax_scale, softcap, window_left, window_right, batch=cu_seqlens_q.shape[0] - 1, rows=max_seqlen_q,
        capacity=capacity, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, block_table=block_table,
    )  # fmt: skip


def flash_attn_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None, block_table: Tensor | None, block_ids: Tensor | None, softmax_scale: float,
    softcap: float, window_left: int, window_right: int, window_limits_blocks: bool, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _flash_decode(
        q, k_cache, v_cache, softmax_scale, softcap, window_left, window_right, batch=q.shape[0], rows=q.shape[1],
        capacity=capacity_of(k_cache, block_table), lengths=cache_seqlens, first=cache_leftpad, entry=cache_batch_idx,
        block_table=block_table,
    )  # fmt: skip


def _flash_decode(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, softcap: float, left: int, right: int, **requests: Any
) -> tuple[Tensor, Tensor]:
    module = support.module_for(q.device)
    call = AttentionCall(module, q, v, softmax_scale, **requests)
    arguments = module.FlashDecodeArguments(
        attention=call.attention, k=rows_of(module, k), left=left, right=right, softcap=softcap
    )
    run(module.flash_decode, module.flash_decode_workspace, arguments, q.device)
    return call.out, call.lse


def k_eq_v_attention(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, softmax_scale: float, values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if k_norm_weight.dtype == torch.float64:
        k_norm_weight = k_norm_weight.float()
    k_norm_weight, inv_freq = k_norm_weight.contiguous(), inv_freq.contiguous()
    module = support.module_for(q.device)
    call = AttentionCall(
        module, q, values, softmax_scale, batch=q.shape[0], rows=q.shape[1], capacity=capacity_of(values, block_table),
        lengths=cache_seqlens, block_table=block_table,
    )  # fmt: skip
    if values_scale is None:
        codes, scale_rows = 0, module.Rows(0, 0, 0, 0)
    else:
        codes = CODES[value_codes.FEATURES[values.dtype]]
        # A scale for every row, or one for all of a head.
        values_scale = values_scale.contiguous().expand(values.shape[:-1])
        scale_rows = rows_of(module, values_scale.unsqueeze(-1))
    arguments = module.KEqVDecodeArguments(
        attention=call.attention, k_norm_weight=k_norm_weight.data_ptr(),
        weight_dtype=support.DTYPE_CODES[k_norm_weight.dtype], inv_freq=inv_freq.data_ptr(),
        inv_freq_is_double=inv_freq.dtype == torch.float64, codes=codes, values_scale=scale_rows,
    )  # fmt: skip
    run(module.k_eq_v_decode, module.k_eq_v_decode_workspace, arguments, q.device)
    return call.out, call.lse


# What all kernels over a cache share ----------------------------------------------------------------------------------


class AttentionCall:
    """gemma4_attention of a call, its results, and what must live until the launch.

        q (B, ROWS, HQ, D) or, with cu_q, packed (total, HQ, D)
        v (entries, S, HKV, D), packed (total, HKV, D) with cu_k, or pages (P, PAGE_SIZE, HKV, D) with block_table

    batch, rows, capacity and the tensors of numbers are those of gemma4_requests; the numbers may be int32 or int64.
    """

    def __init__(
        self, module: Any, q: Tensor, v: Tensor, scale: float, *, batch: int, rows: int, capacity: int,
        block_table: Tensor | None = None, **numbers: Tensor | None,
    ) -> None:  # fmt: skip
        *leading, last_rows, heads, dim = q.shape
        q = aligned(q)
        self.out = q.new_empty((*leading, last_rows, heads, dim))
        self.lse = q.new_empty((*leading, heads, last_rows), dtype=torch.float32)
        names = ("cu_q", "cu_k", "lengths", "first", "entry")
        given = {name: _int32(numbers.get(name)) for name in names}
        table = _int32(block_table)
        packed = v.dim() == 3
        requests = module.Requests(
            batch=batch, rows=rows, capacity=capacity, total_rows=q.shape[0] if given["cu_q"] is not None else 0,
            total_keys=v.shape[0] if packed else 0, entries=0 if packed else v.shape[0],
            page_size=0 if table is None else v.shape[1], table_stride=0 if table is None else table.stride(0),
            block_table=address(table), **{name: address(tensor) for name, tensor in given.items()},
        )  # fmt: skip
        self._kept = (q, table, given)
        out_batch = self.out.stride(0) if leading else 0
        lse_batch = self.lse.stride(0) if leading else 0
        self.attention = module.Attention(
            requests=requests, q=rows_of(module, q), v=rows_of(module, v), out=self.out.data_ptr(),
            out_batch_stride=out_batch, out_row_stride=self.out.stride(-3), out_head_stride=self.out.stride(-2),
            lse=self.lse.data_ptr(), lse_batch_stride=lse_batch, lse_head_stride=self.lse.stride(-2),
            query_heads=heads, kv_heads=v.shape[-2], head_dim=dim, scale=scale, dtype=support.DTYPE_CODES[q.dtype],
        )  # fmt: skip


def rows_of(module: Any, tensor: Tensor) -> Any:
    """gemma4_rows of (batch, rows, heads, D) or packed (rows, heads, D). A dim of one element may have any stride."""
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    batch = strides[0] if tensor.dim() == 4 else 0
    return module.Rows(tensor.data_ptr(), batch, strides[-3], strides[-2])


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """Rows that one request may have; none where there is no entry and no page, whatever a length says."""
    if cache.shape[0] == 0:
        return 0
    return cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def is_aligned(tensor: Tensor) -> bool:
    """Whether each row of the last dim begins at a multiple of 16 bytes."""
    steps = (stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1)
    return tensor.data_ptr() % _ALIGNMENT == 0 and all(step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)


def aligned(tensor: Tensor) -> Tensor:
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _int32(numbers: Tensor | None) -> Tensor | None:
    """Kernels step over them one by one; what is beyond 32 bits is out of range there too."""
    if numbers is None:
        return None
    if numbers.dtype != torch.int32:
        numbers = numbers.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return numbers if numbers.stride(-1) == 1 or numbers.shape[-1] <= 1 else numbers.contiguous()
