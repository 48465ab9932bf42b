"""The ops in front of attention: schemas, fakes, what a call needs, checks of values, and who serves them.

The same pattern as `ops`, for ops that write into a cache and return the query. They have no backward: autograd has no
formula for an op that changes its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.attention import cuda, value_codes
from gemma4_kernels.attention.ops import MAX_HEAD_DIM, _call, _capacity
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.op_support import fp32_sums
from gemma4_kernels.triton_common import support

SCHEMAS = {
    "qkv_norm_rope_append": (
        "(Tensor q, Tensor k, Tensor v, Tensor q_norm_weight, Tensor k_norm_weight, Tensor cos, Tensor sin, "
        "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? block_table, float eps) -> Tensor"
    ),
    "k_eq_v_norm_rope_append": (
        "(Tensor q, Tensor k, Tensor q_norm_weight, Tensor cos, Tensor sin, Tensor(a!) values, Tensor cache_seqlens, "
        "Tensor? block_table, float eps, Tensor(b!)? values_scale=None) -> Tensor"
    ),
}


# What a call needs --------------------------------------------------------------------------------------------------


def _describe_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float,
) -> Call:  # fmt: skip
    return _call("qkv_norm_rope_append", q, q.shape[1], paged=block_table is not None)


def _describe_k_eq_v(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, eps: float, values_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    return _call(
        "k_eq_v_norm_rope_append", q, q.shape[1], paged=block_table is not None, **value_codes.feature(values)
    )  # fmt: skip


DESCRIBERS: dict[str, Callable[..., Call]] = {
    "qkv_norm_rope_append": _describe_qkv,
    "k_eq_v_norm_rope_append": _describe_k_eq_v,
}


# Values that the host can check without a sync ----------------------------------------------------------------------


def _check_rows(op: str, cache: Tensor, rows: int, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    """The rows to be written exist, and no two of a call are the same one."""
    room = _capacity(cache, block_table) - rows
    checks.values_within(op, f"cache_seqlens before {rows} new rows", cache_seqlens, 0, room)
    if block_table is None or rows == 0 or {block_table.device.type, cache_seqlens.device.type} != {"cpu"}:
        return
    page_size = cache.shape[1]
    position = cache_seqlens.long()[:, None] + torch.arange(rows)  # (B, rows)
    page = block_table.long().gather(1, position // page_size)  # (B, rows)
    checks.values_within(op, "block_table where rows are written", page, 0, cache.shape[0] - 1)
    slot = (page * page_size + position % page_size).flatten().sort().values
    if bool((slot[1:] == slot[:-1]).any()):
        # A ring that turns a whole round within one call, or one page in the hands of two requests.
        raise ValueError(f"{op}: block_table must give each new row a place of its own, got two rows for one place")


def _check_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, eps: float,
) -> None:  # fmt: skip
    _check_rows("qkv_norm_rope_append", k_cache, k.shape[1], cache_seqlens, block_table)


def _check_k_eq_v(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, eps: float, values_scale: Tensor | None = None,
) -> None:  # fmt: skip
    _check_rows("k_eq_v_norm_rope_append", values, k.shape[1], cache_seqlens, block_table)


VALUE_CHECKS: dict[str, Callable[..., None]] = {
    "qkv_norm_rope_append": _check_qkv,
    "k_eq_v_norm_rope_append": _check_k_eq_v,
}


# Registration -------------------------------------------------------------------------------------------------------


def _run(op: str, *arguments: Any) -> Tensor:
    """Check what the host can see, then let the chosen backend do it."""
    VALUE_CHECKS[op](*arguments)
    function = backends.dispatch(DESCRIBERS[op](*arguments))
    with fp32_sums(arguments[0].device.type):
        out: Tensor = function(*arguments)
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


for _op, _schema in SCHEMAS.items():
    _name = f"gemma4_kernels::{_op}"
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "CompositeExplicitAutograd", partial(_run, _op))
    torch.library.register_fake(_name, _fake)
    backends.register(
        Implementation(
            op=_op,
            backend="eager",
            entry=f"gemma4_kernels.attention.eager_prologue:{_op}",
            dtypes=frozenset(checks.FLOATS),
            features=frozenset({"paged", *value_codes.FEATURES.values()}),
            max_head_dim=MAX_HEAD_DIM,
        )
    )
    backends.register(
        support.implementation(
            _op, f"gemma4_kernels.attention.triton.prologue:{_op}", frozenset({"paged"}), MAX_HEAD_DIM
        )
    )
    backends.register(
        Implementation(
            op=_op,
            backend="cuda",
            entry=f"gemma4_kernels.attention.prologue_cuda:{_op}",
            dtypes=frozenset(cuda_support.DTYPE_CODES),
            features=frozenset({"paged"}) | (cuda.CODES.keys() if _op == "k_eq_v_norm_rope_append" else frozenset()),
            max_head_dim=MAX_HEAD_DIM,
            refuses=cuda_support.refuses,
            only_by_name=cuda_support.only_by_name,
        )
    )
