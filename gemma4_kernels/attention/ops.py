"""The attention ops: torch.library schemas, fakes, what a call needs, and the table of implementations.

Every op is opaque to torch.compile. Its implementation checks the values that the host can see (CPU tensors only), describes
the call, and hands it to the backend that `backends.dispatch` names. All backends take the same positional arguments.

An op here serves inference: its backward raises, with the reason, so that a forward outside torch.no_grad() still works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.attention import cuda, value_codes
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.op_support import DECODE_ROWS, fp32_sums, refuse_backward
from gemma4_kernels.triton_common import support

MAX_HEAD_DIM = 512

# In every schema: window_left and window_right count neighbours, -1 for no limit; causal has been folded into window_right.
# window_limits_blocks False: the tokens of one image see each other beyond the window too.
SCHEMAS = {
    "flash_attn": (
        "(Tensor q, Tensor k, Tensor v, Tensor? block_ids, float softmax_scale, float softcap, int window_left, "
        "int window_right, bool window_limits_blocks) -> (Tensor, Tensor)"
    ),
    "flash_attn_varlen": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? block_table, int max_seqlen_q, "
        "int max_seqlen_k, float softmax_scale, float softcap, int window_left, int window_right) -> (Tensor, Tensor)"
    ),
    "flash_attn_kvcache": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? cache_leftpad, Tensor? cache_batch_idx, "
        "Tensor? block_table, Tensor? block_ids, float softmax_scale, float softcap, int window_left, int window_right, "
        "bool window_limits_blocks, int num_splits) -> (Tensor, Tensor)"
    ),
    # The same, after writing k and v to the rows from cache_seqlens on. Backends implement the append as `append_kv`.
    "flash_attn_kvcache_append": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
        "Tensor? cache_leftpad, Tensor? cache_batch_idx, Tensor? block_table, Tensor? block_ids, float softmax_scale, "
        "float softcap, int window_left, int window_right, bool window_limits_blocks, int num_splits) -> (Tensor, Tensor)"
    ),
    "k_eq_v_attention": (
        "(Tensor q, Tensor values, Tensor k_norm_weight, Tensor inv_freq, Tensor cache_seqlens, Tensor? block_table, "
        "float softmax_scale, Tensor? values_scale=None) -> (Tensor, Tensor)"
    ),
}


# What a call needs --------------------------------------------------------------------------------------------------


def _call(op: str, q: Tensor, rows: int, *caches: Tensor, **wanted: bool) -> Call:
    wanted["unaligned_cache"] = not all(map(cuda.is_aligned, caches))
    return Call(
        op=op,
        device_type=q.device.type,
        architecture=backends.architecture_of(q.device),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        features=frozenset(name for name, is_wanted in wanted.items() if is_wanted),
        shape_class=f"{'decode' if rows <= DECODE_ROWS else 'prefill'}, head_dim {q.shape[-1]}",
    )


def _describe_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int, window_limits_blocks: bool,
) -> Call:  # fmt: skip
    return _call(
        "flash_attn", q, q.shape[1], k, v, block_ids=block_ids is not None, softcap=softcap != 0,
        window=window_left >= 0 or window_right > 0, blocks_beyond_window=not window_limits_blocks,
    )  # fmt: skip


def _describe_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, softcap: float, window_left: int, window_right: int,
) -> Call:  # fmt: skip
    return _call(
        "flash_attn_varlen", q, max_seqlen_q, k, v, paged=block_table is not None, softcap=softcap != 0,
        window=window_left >= 0 or window_right > 0,
    )  # fmt: skip


def _describe_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None, block_table: Tensor | None, block_ids: Tensor | None, softmax_scale: float,
    softcap: float, window_left: int, window_right: int, window_limits_blocks: bool, num_splits: int,
) -> Call:  # fmt: skip
    return _call(
        "flash_attn_kvcache", q, q.shape[1], k_cache, v_cache, paged=block_table is not None, block_ids=block_ids is not None,
        leftpad=cache_leftpad is not None, batch_idx=cache_batch_idx is not None, softcap=softcap != 0,
        window=window_left >= 0 or window_right > 0, blocks_beyond_window=not window_limits_blocks,
    )  # fmt: skip


def _describe_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> Call:  # fmt: skip
    return _call(
        "append_kv", k, k.shape[1], paged=block_table is not None, batch_idx=cache_batch_idx is not None
    )  # fmt: skip


def _describe_k_eq_v(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, softmax_scale: float, values_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    return _call(
        "k_eq_v_attention", q, q.shape[1], values, paged=block_table is not None, **value_codes.feature(values)
    )  # fmt: skip


DESCRIBERS: dict[str, Callable[..., Call]] = {
    "flash_attn": _describe_flash_attn,
    "flash_attn_varlen": _describe_varlen,
    "flash_attn_kvcache": _describe_kvcache,
    "append_kv": _describe_append,
    "k_eq_v_attention": _describe_k_eq_v,
}


# Values that the host can check without a sync: a wrong length or page would reach another request's memory ------------

_VARLEN, _KVCACHE, _K_EQ_V = "flash_attn_varlen_func", "flash_attn_with_kvcache", "k_eq_v_attention"


def _capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Rows that one request may hold."""
    return cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]


def _check_pages(function: str, block_table: Tensor | None, lengths: Tensor, pages: Tensor) -> None:
    """Entries of a block table that a length reaches name existing pages; the others may hold anything."""
    if block_table is not None and block_table.device.type == "cpu":
        used = torch.arange(block_table.shape[1]) * pages.shape[1] < lengths[:, None]  # (B, pages of a request)
        checks.values_within(function, "block_table", block_table[used], 0, pages.shape[0] - 1)


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, *_: Any,
) -> None:  # fmt: skip
    lengths = torch.diff(cu_seqlens_k)
    longest = max_seqlen_k if block_table is None else min(max_seqlen_k, _capacity(k, block_table))
    checks.values_within(_VARLEN, "cu_seqlens_q[0]", cu_seqlens_q[:1], 0, 0)
    checks.values_within(_VARLEN, "cu_seqlens_q[-1]", cu_seqlens_q[-1:], 0, q.shape[0])
    checks.values_within(_VARLEN, "a difference of cu_seqlens_q", torch.diff(cu_seqlens_q), 0, max_seqlen_q)
    checks.values_within(_VARLEN, "cu_seqlens_k[0]", cu_seqlens_k[:1], 0, 0)
    checks.values_within(_VARLEN, "a difference of cu_seqlens_k", lengths, 0, longest)
    if block_table is None:
        checks.values_within(_VARLEN, "cu_seqlens_k[-1]", cu_seqlens_k[-1:], 0, k.shape[0])
    _check_pages(_VARLEN, block_table, lengths, k)


def _check_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None, block_table: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    checks.values_within(_KVCACHE, "cache_seqlens", cache_seqlens, 0, _capacity(k_cache, block_table))
    checks.values_within(_KVCACHE, "cache_leftpad", cache_leftpad, 0, k_cache.shape[1])
    checks.values_within(_KVCACHE, "cache_batch_idx", cache_batch_idx, 0, k_cache.shape[0] - 1)
    _check_pages(_KVCACHE, block_table, cache_seqlens, k_cache)


def _check_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    rows = k.shape[1]
    room = _capacity(k_cache, block_table) - rows
    checks.values_within(_KVCACHE, f"cache_seqlens before {rows} new rows", cache_seqlens, 0, room)
    checks.values_within(_KVCACHE, "cache_batch_idx", cache_batch_idx, 0, k_cache.shape[0] - 1)
    _check_pages(_KVCACHE, block_table, cache_seqlens + rows, k_cache)


def _check_k_eq_v(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    checks.values_within(_K_EQ_V, "cache_seqlens", cache_seqlens, 0, _capacity(values, block_table))
    _check_pages(_K_EQ_V, block_table, cache_seqlens, values)


VALUE_CHECKS: dict[str, Callable[..., None]] = {
    "flash_attn_varlen": _check_varlen,
    "flash_attn_kvcache": _check_kvcache,
    "append_kv": _check_append,
    "k_eq_v_attention": _check_k_eq_v,
}


# Fakes: shapes and dtypes of what an op returns ---------------------------------------------------------------------


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_batched(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _dim = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (batch, heads, rows), dtype=_lse_dtype(q)
    )


def _fake_varlen(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total, heads, _dim = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((heads, total), dtype=_lse_dtype(q))


FAKES: dict[str, Callable[..., Any]] = {
    "flash_attn": _fake_batched,
    "flash_attn_varlen": _fake_varlen,
    "flash_attn_kvcache": _fake_batched,
    "flash_attn_kvcache_append": _fake_batched,
    "k_eq_v_attention": _fake_batched,
}


# Registration -------------------------------------------------------------------------------------------------------


def _run(op: str, *arguments: Any) -> Any:
    """Check what the host can see, then let the chosen backend do it."""
    function = _checked(op, *arguments)
    with fp32_sums(arguments[0].device.type):
        return function(*arguments)


def _append_and_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    cache_leftpad: Tensor | None, cache_batch_idx: Tensor | None, block_table: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    """Both are checked, and both have a backend, before the first writes anything."""
    append = (k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table)
    attend = (
        q, k_cache, v_cache, cache_seqlens + k.shape[1], cache_leftpad, cache_batch_idx, block_table, *rest
    )  # fmt: skip
    write, read = _checked("append_kv", *append), _checked("flash_attn_kvcache", *attend)
    with fp32_sums(q.device.type):
        write(*append)
        return read(*attend)


def _checked(op: str, *arguments: Any) -> Callable[..., Any]:
    """The backend's function for a call whose values are in range."""
    if op in VALUE_CHECKS:
        VALUE_CHECKS[op](*arguments)
    return backends.dispatch(DESCRIBERS[op](*arguments))


for _op, _schema in SCHEMAS.items():
    _name = f"gemma4_kernels::{_op}"
    _appends = _op == "flash_attn_kvcache_append"
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "CompositeExplicitAutograd", _append_and_attend if _appends else partial(_run, _op))
    torch.library.register_fake(_name, FAKES[_op])
    if not _appends:  # autograd formulas exist for ops that change none of their arguments
        torch.library.register_autograd(_name, refuse_backward(_op))

_ALL_FEATURES = cuda.FEATURES | {"block_ids", "blocks_beyond_window", "unaligned_cache"}

for _op in DESCRIBERS:
    backends.register(
        Implementation(
            op=_op,
            backend="eager",
            entry=f"gemma4_kernels.attention.eager:{_op}",
            dtypes=frozenset(checks.FLOATS),
            features=_ALL_FEATURES | frozenset(value_codes.FEATURES.values()),
            max_head_dim=MAX_HEAD_DIM,
        )
    )
    backends.register(
        support.implementation(_op, f"gemma4_kernels.attention.triton.backend:{_op}", _ALL_FEATURES, MAX_HEAD_DIM)
    )

for _op in ("flash_attn", "flash_attn_varlen", "flash_attn_kvcache", "k_eq_v_attention"):
    backends.register(
        Implementation(
            op=_op,
            backend="cuda",
            entry=f"gemma4_kernels.attention.cuda:{_op}",
            dtypes=frozenset({torch.bfloat16, torch.float16}),
            features=cuda.FEATURES | (cuda.CODES.keys() if _op == "k_eq_v_attention" else frozenset()),
            refuses=cuda.refuses,
            only_by_name=cuda_support.only_by_name,
            serves=f"up to {DECODE_ROWS} rows of head_dim {', '.join(map(str, cuda.head_dims(_op)))}",
        )
    )
