"""The public functions in front of attention: q, k and v as the projections give them, to a query and rows in a cache.

A layer is then two calls: `qkv_norm_rope_append` and `flash_attn_with_kvcache`, or, where K is a function of V,
`k_eq_v_norm_rope_append` and `k_eq_v_attention`. Both attend over `cache_seqlens + S` rows.

Each function checks its arguments and turns them into those of the op of its name (`prologue_ops.SCHEMAS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.attention import prologue_ops, value_codes
from gemma4_kernels.attention.api import _check_block_table, _check_heads, _lengths
from gemma4_kernels.attention.ops import _capacity
from gemma4_kernels.backends import Call

P = ParamSpec("P")


def _calls_its_op(plan: Callable[P, tuple[Any, ...]]) -> Callable[P, Tensor]:
    """Make a function that plans a call of the op of its name into one that makes it, and make it known to `explain`."""
    name = plan.__name__

    @functools.wraps(plan)
    def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        # Not through autograd: the op changes a cache, and no gradient flows back from that.
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in plan(*args, **kwargs)]
        out: Tensor = getattr(torch.ops.gemma4_kernels, name)(*arguments)
        return out

    def describe(*args: P.args, **kwargs: P.kwargs) -> Call:
        return prologue_ops.DESCRIBERS[name](*plan(*args, **kwargs))

    function.__annotations__["return"] = Tensor
    backends.register_describer(name, name, describe)
    return function


@_calls_its_op
def qkv_norm_rope_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: int | Tensor, block_table: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Any, ...]:  # fmt: skip
    """Norm q, k and v per head, rotate q and k, and append k and v to the cache: one pass over the projections' output.

    x / sqrt(mean(x^2) + eps) in fp32, for q and k times the weight, rounded once; then, in x's dtype with every operation
    rounded, x * cos + rotate_half(x) * sin with rotate_half((a, b)) = (-b, a). Operations and roundings are those of
    Gemma4UnifiedTextAttention in transformers (modeling_gemma4_unified.py).

    Args:
        q: (B, S, Hq, D) bf16, fp16, fp32 or fp64: what the projection gave; D even, up to 512. Any strides with a dense
            last dim, here and below: q, k and v may be slices of one tensor.
        k, v: (B, S, Hkv, D) like q.
        q_norm_weight, k_norm_weight: (D,), any float dtype.
        cos, sin: (B or 1, S, D) in q's dtype, as transformers' rotary embedding gives them. Dims that do not rotate have
            cos 1 and sin 0.
        k_cache, v_cache: (B, capacity, Hkv, D), or pages (num_pages, page_size, Hkv, D) with block_table. Changed in place.
        cache_seqlens: int or (B,) int32: rows in use before the call. Row i of a request goes to row cache_seqlens + i.
        block_table: (B, pages of a request) int32. With `RingCache.block_table` the cache is a ring.
        eps: of the norms.
    Returns: q, normed and rotated, (B, S, Hq, D), contiguous. A row's bits depend on that row only. No gradient flows
        through it.
    Raises: ShapeError, StrideError, DeviceError, ValueError, DTypeError, TypeError, all before anything is written;
        BackendError where the backend asked for by name cannot do it. Lengths and pages are looked at only on the CPU.
        On a GPU the kernel leaves out rows beyond the cache, and two rows for one place leave either of them there.
    """
    name = "qkv_norm_rope_append"
    _check_query(name, q, q_norm_weight, cos, sin)
    batch, rows, _, head_dim = q.shape
    checks.has_shape(name, "k", k, (batch, rows, "Hkv", head_dim))
    checks.has_shape(name, "v", v, tuple(k.shape))
    _check_heads(name, q, k=k, v=v)
    _check_weight(name, "k_norm_weight", k_norm_weight, head_dim)
    _check_block_table(name, block_table, batch)
    _check_cache(name, "k_cache", k_cache, k, block_table)
    _check_cache(name, "v_cache", v_cache, v, block_table)
    checks.has_shape(name, "v_cache", v_cache, tuple(k_cache.shape))
    checks.same_device(
        name, q=q, k=k, v=v, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, cos=cos, sin=sin, k_cache=k_cache,
        v_cache=v_cache, block_table=block_table,
    )  # fmt: skip
    lengths = _rows_in_use(name, cache_seqlens, k_cache, block_table, q)
    eps = checks.positive_number(name, "eps", eps)
    return q, k, v, q_norm_weight, k_norm_weight, cos, sin, k_cache, v_cache, lengths, block_table, eps


@_calls_its_op
def k_eq_v_norm_rope_append(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor, values: Tensor, *,
    cache_seqlens: int | Tensor, block_table: Tensor | None = None, values_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Any, ...]:  # fmt: skip
    """`qkv_norm_rope_append` for a layer whose k and v are one projection and whose cache holds the values alone.

    What is written is k / sqrt(mean(k^2) + eps), the layer's v, rounded to k's dtype and then, where the cache has 8 bits, to
    its codes (`attention.value_codes`). k_norm and the rotation of the keys belong to
    `k_eq_v_attention`, which reads them out of the values.

    Args:
        q: (B, S, Hq, D), as in `qkv_norm_rope_append`.
        k: (B, S, Hkv, D): what k_proj gave.
        values: (B, capacity, Hkv, D), or pages (num_pages, page_size, Hkv, D) with block_table; of q's dtype, float8_e4m3fn
            or int8. Changed in place.
        values_scale: fp32, for values of 8 bits alone: (Hkv,) for float8_e4m3fn, which is read (1/16 fits what a norm gives,
            to head_dim 512); values.shape[:-1] for int8, changed in place.
        The others: as in `qkv_norm_rope_append`.
    Returns: q, normed and rotated, (B, S, Hq, D), contiguous.
    Raises: as `qkv_norm_rope_append`.
    """
    name = "k_eq_v_norm_rope_append"
    _check_query(name, q, q_norm_weight, cos, sin)
    batch, rows, _, head_dim = q.shape
    checks.has_shape(name, "k", k, (batch, rows, "Hkv", head_dim))
    _check_heads(name, q, k=k)
    _check_block_table(name, block_table, batch)
    _check_cache(name, "values", values, k, block_table, tuple(value_codes.FEATURES))
    value_codes.check(name, values, values_scale, k.dtype)
    if values_scale is not None:
        _check_own_memory(name, "values_scale", values_scale)
    checks.same_device(
        name, q=q, k=k, q_norm_weight=q_norm_weight, cos=cos, sin=sin, values=values, values_scale=values_scale,
        block_table=block_table,
    )  # fmt: skip
    lengths = _rows_in_use(name, cache_seqlens, values, block_table, q)
    eps = checks.positive_number(name, "eps", eps)
    return q, k, q_norm_weight, cos, sin, values, lengths, block_table, eps, values_scale


# Checks that both share ---------------------------------------------------------------------------------------------


def _check_query(name: str, q: Tensor, q_norm_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    checks.has_shape(name, "q", q, ("B", "S", "Hq", "D"))
    _check_heads(name, q)
    batch, rows, _, head_dim = q.shape
    if head_dim % 2:
        raise checks.ShapeError(f"{name}: head_dim must be even, got {head_dim}")
    _check_weight(name, "q_norm_weight", q_norm_weight, head_dim)
    for argument, tensor in (("cos", cos), ("sin", sin)):
        checks.has_shape(name, argument, tensor, ("B or 1", rows, head_dim))
        if tensor.shape[0] not in (1, batch):
            checks.has_shape(name, argument, tensor, (batch, rows, head_dim))
        checks.has_dtype(name, argument, tensor, (q.dtype,))
        checks.is_dense(name, argument, tensor)
    checks.has_shape(name, "sin", sin, tuple(cos.shape))


def _check_weight(name: str, argument: str, weight: Tensor, head_dim: int) -> None:
    checks.has_shape(name, argument, weight, (head_dim,))
    checks.has_dtype(name, argument, weight, checks.FLOATS)
    checks.is_dense(name, argument, weight)


def _check_cache(
    name: str, argument: str, cache: Tensor, new: Tensor, block_table: Tensor | None,
    codes: tuple[torch.dtype, ...] = (),
) -> None:  # fmt: skip
    """A cache that takes the rows of `new`, and in which each row has its own memory."""
    batch, _, heads, head_dim = new.shape
    entries = (batch, "capacity") if block_table is None else ("num_pages", "page_size")
    checks.has_shape(name, argument, cache, (*entries, heads, head_dim))
    checks.has_dtype(name, argument, cache, (new.dtype, *codes))
    checks.is_dense(name, argument, cache)
    _check_own_memory(name, argument, cache)


def _check_own_memory(name: str, argument: str, cache: Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        raise checks.StrideError(f"{name}: {argument} must not be expanded, got strides {tuple(cache.stride())}")


def _rows_in_use(
    name: str, cache_seqlens: int | Tensor, cache: Tensor, block_table: Tensor | None, q: Tensor
) -> Tensor:
    if cache_seqlens is None:
        raise ValueError(f"{name}: cache_seqlens must say where the new rows are written, got None")
    return _lengths(name, cache_seqlens, _capacity(cache, block_table), q, new_rows=q.shape[1])
