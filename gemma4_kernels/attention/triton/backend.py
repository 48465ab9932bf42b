"""The attention ops on Triton: what each op's arguments mean for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.attention.triton import append, flash, k_eq_v
from gemma4_kernels.attention.triton.call import AttentionCall, dense
from gemma4_kernels.triton_common.devices import card_of
from gemma4_kernels.triton_common.launch import Launch


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def _first_present(block_ids: Tensor | None) -> Tensor | None:
    """(B,) the first key that is no padding: tiles are counted from there, so a padded row keeps its bits."""
    if block_ids is None or block_ids.shape[1] == 0:
        return None
    return (block_ids != -2).to(torch.int8).argmax(dim=1)


def _attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    out, lse = call.results()
    _run(flash.plan(call, out, lse, card_of(out.device)))
    return out, lse


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int, window_limits_blocks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attend(AttentionCall(
        q, k, v, batch=q.shape[0], num_rows=q.shape[1], capacity=k.shape[1], scale=softmax_scale, softcap=softcap,
        left=window_left, right=window_right, first=_first_present(block_ids), ids=dense(block_ids),
        free_blocks=block_ids is not None and not window_limits_blocks,
    ))  # fmt: skip


def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, softcap: float, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    capacity = min(max_seqlen_k, _capacity(k, block_table)) if block_table is not None else max_seqlen_k
    return _attend(AttentionCall(
        q, k, v, batch=cu_seqlens_q.shape[0] - 1, num_rows=max_seqlen_q, capacity=capacity, scale=softmax_scale,
        softcap=softcap, left=window_left, right=window_right, cu_q=dense(cu_seqlens_q), cu_k=dense(cu_seqlens_k),
        table=dense(block_table),
    ))  # fmt: skip


def flash_attn_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None, block_table: Tensor | None, block_ids: Tensor | None, softmax_scale: float,
    softcap: float, window_left: int, window_right: int, window_limits_blocks: bool, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    capacity = _capacity(k_cache, block_table)
    return _attend(AttentionCall(
        q, k_cache, v_cache, batch=q.shape[0], num_rows=q.shape[1], capacity=capacity, scale=softmax_scale,
        softcap=softcap, left=window_left, right=window_right, lengths=dense(cache_seqlens),
        first=_first_present(block_ids) if cache_leftpad is None else dense(cache_leftpad),
        entry=dense(cache_batch_idx), table=dense(block_table), ids=dense(block_ids),
        free_blocks=block_ids is not None and not window_limits_blocks,
    ))  # fmt: skip


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    entry, table = dense(cache_batch_idx), dense(block_table)
    append.plan(k_cache, v_cache, k, v, cache_seqlens.contiguous(), entry, table).run()


def k_eq_v_attention(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, softmax_scale: float, values_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert values_scale is None, "the features of this backend hold no values of 8 bits"
    call = AttentionCall(
        q, values, values, batch=q.shape[0], num_rows=q.shape[1], capacity=_capacity(values, block_table),
        scale=softmax_scale, left=-1, right=0, lengths=dense(cache_seqlens), table=dense(block_table),
    )  # fmt: skip
    out, lse = call.results()
    _run(k_eq_v.plan(call, k_norm_weight.contiguous(), inv_freq.contiguous(), out, lse, card_of(out.device)))
    return out, lse


def _capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Rows that one request may have; none where there is no entry and no page, whatever a length says."""
    if cache.shape[0] == 0:
        return 0
    return cache.shape[1] * (1 if block_table is None else block_table.shape[1])
