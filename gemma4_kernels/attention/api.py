"""The public attention functions: FlashAttention-2's, to head_dim 512 and with image blocks, and K-equals-V attention.

Below, each function checks its arguments and turns them into the arguments of one op (`ops.SCHEMAS`); the decorator calls
the op and returns what the docstring says, and `explain` stops before the call.

Shapes: B requests, Sq query rows, Sk keys, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), D head_dim. Any
strides, as long as the last dim is dense. Errors are those of `gemma4_kernels.checks`.

What FlashAttention-2 takes and attention for inference has no use for (dropout_p, alibi_slopes, return_attn_probs) is
accepted at the value that changes nothing, by keyword.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.attention import ops, value_codes
from gemma4_kernels.backends import Call

P = ParamSpec("P")
Result = Tensor | tuple[Tensor, Tensor]


class Plan(NamedTuple):
    """A checked call."""

    arguments: tuple[Any, ...]
    """Of the op, in the order of its schema."""
    return_lse: bool
    append: tuple[Tensor, Tensor] | None = None
    """Rows that flash_attn_with_kvcache appends first."""


def _calls(op: str) -> Callable[[Callable[P, Plan]], Callable[P, Result]]:
    """Make a function that plans a call of `op` into one that makes it, and make it known to `explain`."""

    def decorate(plan: Callable[P, Plan]) -> Callable[P, Result]:
        @functools.wraps(plan)
        def function(*args: P.args, **kwargs: P.kwargs) -> Result:
            arguments, return_lse, append = plan(*args, **kwargs)
            if append is None:
                out, lse = getattr(torch.ops.gemma4_kernels, op)(*arguments)
            else:
                q, k_cache, v_cache, *rest = arguments
                # Not through autograd: the op changes a cache, and no gradient flows back from that.
                detached = (x.detach() for x in (q, k_cache, v_cache, *append))
                out, lse = torch.ops.gemma4_kernels.flash_attn_kvcache_append(*detached, *rest)
            return (out, lse) if return_lse else out

        def describe(*args: P.args, **kwargs: P.kwargs) -> Call:
            return ops.DESCRIBERS[op](*plan(*args, **kwargs).arguments)

        function.__annotations__["return"] = Result
        backends.register_describer(plan.__name__, op, describe)
        return function

    return decorate


@_calls("flash_attn")
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), *, block_ids: Tensor | None = None, window_limits_blocks: bool = True,
    return_lse: bool = False, softcap: float = 0.0, dropout_p: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Plan:  # fmt: skip
    """softmax(q @ k.T * softmax_scale) @ v under a mask, without a matrix of scores.

    Query row i is the token of key Sk - Sq + i (bottom-right alignment). It sees key j if j >= token - left and
    (j <= token + right or j lies in the token's image block).

    Args:
        q: (B, Sq, Hq, D) bf16, fp16, fp32 or fp64; D up to 512.
        k, v: (B, Sk, Hkv, D) like q.
        softmax_scale: D**-0.5 by default. Gemma 4 wants 1.0: its q and k are normed.
        causal: right becomes 0.
        window_size: (left, right) neighbours, -1 for no limit. A window of 1024 tokens that counts the token itself,
            as Gemma's does, is (1023, 0).
        block_ids: (B, Sk) int32 or int64. Tokens with the same id >= 0 see each other both ways; -1: in no block;
            -2: a key that nobody sees (padding).
        window_limits_blocks: False lets the tokens of a block see each other beyond the window too.
        return_lse: also return lse.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        deterministic: no effect, results always are.
    Returns: out (B, Sq, Hq, D) in q's dtype, sums in fp32; with return_lse also lse (B, Hq, Sq) fp32, the natural log
        of the sum of exponentials (both fp64 for fp64). A row that sees no key gives zeros and -inf. Up to 16 rows, a
        row's bits depend on its own keys only (not promised by the eager backend off the CPU).
    Raises: ShapeError, StrideError, DeviceError, ValueError, DTypeError, TypeError; BackendError where the backend asked
        for by name cannot do it.
    """
    name = "flash_attn_func"
    checks.has_shape(name, "q", q, ("B", "Sq", "Hq", "D"))
    checks.has_shape(name, "k", k, (q.shape[0], "Sk", "Hkv", q.shape[3]))
    checks.has_shape(name, "v", v, tuple(k.shape))
    _check_heads(name, q, k=k, v=v)
    _check_block_ids(name, block_ids, q, k.shape[1])
    checks.same_device(name, q=q, k=k, v=v, block_ids=block_ids)
    for flag, value in (("return_lse", return_lse), ("window_limits_blocks", window_limits_blocks)):
        checks.is_flag(name, flag, value)
    _check_training_arguments(name, dropout_p, alibi_slopes, deterministic, return_attn_probs)
    scale, cap, left, right = _score_arguments(name, q, softmax_scale, softcap, causal, window_size)
    return Plan((q, k, v, block_ids, scale, cap, left, right, window_limits_blocks), return_lse)


@_calls("flash_attn_varlen")
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    block_table: Tensor | None = None, return_lse: bool = False, softcap: float = 0.0, dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Plan:  # fmt: skip
    """`flash_attn_func` over requests of different lengths, packed one behind the other.

    Args:
        q: (total_q, Hq, D).
        k, v: (total_k, Hkv, D), or pages (num_pages, page_size, Hkv, D) with block_table.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32: request b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen_q, max_seqlen_k: the longest request.
        block_table: (B, pages of a request) int32: the pages of each request, in order.
        The others: as in `flash_attn_func`.
    Returns: out (total_q, Hq, D); with return_lse also lse (Hq, total_q) fp32. Rows that no request owns are undefined.
    Raises: as `flash_attn_func`.
    """
    name = "flash_attn_varlen_func"
    checks.has_shape(name, "q", q, ("total_q", "Hq", "D"))
    rows = ("total_k",) if block_table is None else ("num_pages", "page_size")
    checks.has_shape(name, "k", k, (*rows, "Hkv", q.shape[2]))
    checks.has_shape(name, "v", v, tuple(k.shape))
    _check_heads(name, q, k=k, v=v)
    checks.has_shape(name, "cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    checks.has_shape(name, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if cu_seqlens_q.shape[0] == 0:
        raise checks.ShapeError(f"{name}: cu_seqlens_q must have at least one element, got none")
    for argument, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.has_dtype(name, argument, tensor, checks.INTEGERS)
    _check_block_table(name, block_table, cu_seqlens_q.shape[0] - 1)
    checks.same_device(
        name, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table
    )
    max_seqlen_q = checks.whole_number(name, "max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.whole_number(name, "max_seqlen_k", max_seqlen_k)
    checks.is_flag(name, "return_lse", return_lse)
    _check_training_arguments(name, dropout_p, alibi_slopes, deterministic, return_attn_probs)
    scale, cap, left, right = _score_arguments(name, q, softmax_scale, softcap, causal, window_size)
    arguments = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, max_seqlen_q, max_seqlen_k, scale, cap, left, right
    )  # fmt: skip
    return Plan(arguments, return_lse)


@_calls("flash_attn_kvcache")
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False, *, block_ids: Tensor | None = None, window_limits_blocks: bool = True,
    return_lse: bool = False,
) -> Plan:  # fmt: skip
    """Attention over a cache, after appending new rows to it if k and v are given.

    Query row i is the token of key length - Sq + i, where length counts the new rows.

    Args:
        q: (B, Sq, Hq, D).
        k_cache, v_cache: (B_cache, S, Hkv, D), or pages (num_pages, page_size, Hkv, D) with block_table. Changed in
            place where k and v are given.
        k, v: (B, S_new, Hkv, D): written to the rows from cache_seqlens on.
        rotary_cos, rotary_sin: (at least S, rotary_dim / 2): q and k are rotated first, k from position cache_seqlens on,
            q likewise if the mask is causal or windowed, else all of its rows by cache_seqlens.
        cache_seqlens: int or (B,) int32: rows in use before the append. By default S.
        cache_batch_idx: (B,) int32: which entry of the cache request b has. Not with block_table.
        cache_leftpad: (B,) int32: the first row of each request's cache. Not with block_table or rotary_cos.
        block_table: (B, pages of a request) int32.
        rotary_interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        num_splits: a hint for backends that split the cache; 0 leaves it to them. Results do not depend on it where the
            split size is fixed, as it is here.
        block_ids: (B, S), or (B, pages of a request * page_size) with block_table, as in `flash_attn_func`.
        return_softmax_lse, return_lse: either also returns lse.
        The others: as in `flash_attn_func`.
    Returns: out (B, Sq, Hq, D); with lse (B, Hq, Sq) fp32.
    Raises: as `flash_attn_func`.
    """
    name = "flash_attn_with_kvcache"
    checks.has_shape(name, "q", q, ("B", "Sq", "Hq", "D"))
    batch, num_rows, _, head_dim = q.shape
    entries = "num_pages" if block_table is not None else "B_cache" if cache_batch_idx is not None else batch
    checks.has_shape(name, "k_cache", k_cache, (entries, "S" if block_table is None else "page_size", "Hkv", head_dim))
    checks.has_shape(name, "v_cache", v_cache, tuple(k_cache.shape))
    _check_heads(name, q, k_cache=k_cache, v_cache=v_cache)
    _check_block_table(name, block_table, batch)
    capacity = k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    for argument, tensor in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if tensor is not None:
            checks.has_shape(name, argument, tensor, (batch,))
            checks.has_dtype(name, argument, tensor, checks.INTEGERS)
            if block_table is not None:
                raise ValueError(f"{name}: {argument} must be None with block_table: pages already say where rows lie")
    _check_block_ids(name, block_ids, q, capacity)
    for flag, value in (
        ("return_softmax_lse", return_softmax_lse), ("return_lse", return_lse),
        ("window_limits_blocks", window_limits_blocks), ("rotary_interleaved", rotary_interleaved),
    ):  # fmt: skip
        checks.is_flag(name, flag, value)
    checks.neutral(name, "alibi_slopes", alibi_slopes, None, "Gemma has no ALiBi")
    num_splits = checks.whole_number(name, "num_splits", num_splits)
    scale, cap, left, right = _score_arguments(name, q, softmax_scale, softcap, causal, window_size)
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v must be given together, got only {'k' if v is None else 'v'}")
    if k is not None and v is not None:
        checks.has_shape(name, "k", k, (batch, "S_new", k_cache.shape[2], head_dim))
        checks.has_shape(name, "v", v, tuple(k.shape))
        for argument, tensor in (("k", k), ("v", v)):
            checks.has_dtype(name, argument, tensor, (q.dtype,))
            checks.is_dense(name, argument, tensor)
        if cache_seqlens is None:
            raise ValueError(f"{name}: cache_seqlens must say where k and v are appended, got None")
    checks.same_device(
        name, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table, block_ids=block_ids, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
    )  # fmt: skip
    lengths = _lengths(name, cache_seqlens, capacity, q, new_rows=0 if k is None else k.shape[1])
    if (rotary_cos is None) != (rotary_sin is None):
        given = "rotary_cos" if rotary_sin is None else "rotary_sin"
        raise ValueError(f"{name}: rotary_cos and rotary_sin must be given together, got only {given}")
    if rotary_cos is not None and rotary_sin is not None:
        _check_rotary(name, rotary_cos, rotary_sin, q, capacity, cache_leftpad)
        steps = torch.arange(num_rows, device=q.device) if left >= 0 or right >= 0 else 0
        q = _rotate(q, rotary_cos, rotary_sin, lengths.long()[:, None] + steps, rotary_interleaved)
        if k is not None:
            position = lengths.long()[:, None] + torch.arange(k.shape[1], device=q.device)
            k = _rotate(k, rotary_cos, rotary_sin, position, rotary_interleaved)
    append = None if k is None or v is None else (k, v)
    arguments = (
        q, k_cache, v_cache, lengths, cache_leftpad, cache_batch_idx, block_table, block_ids, scale, cap, left, right,
        window_limits_blocks, num_splits,
    )  # fmt: skip
    return Plan(arguments, return_lse or return_softmax_lse, append)


@_calls("k_eq_v_attention")
def k_eq_v_attention(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, *, cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None, softmax_scale: float = 1.0, values_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Plan:  # fmt: skip
    """Causal attention of a layer whose keys are a function of its values: k[j] = rope(v[j] * k_norm_weight, j).

    In Gemma 4's full layers k and v come from one projection u: v = u / rms(u) and k = rope(u / rms(u) * weight), so a
    cache of the values alone is enough, at half the bytes of a cache of both.

    Args:
        q: (B, Sq, Hq, D), normed and rotated; row i is the token at position length - Sq + i.
        values: (B, S, Hkv, D) like q, or pages (num_pages, page_size, Hkv, D): what the layer's v_norm gave; row j of a
            request is position j. Or codes of 8 bits, float8_e4m3fn or int8, with values_scale.
        k_norm_weight: (D,), any float dtype.
        inv_freq: (D/2,) fp32 or fp64, in radians per position; pair (d, d + D/2) rotates by position * inv_freq[d], and a
            zero means that it does not rotate.
        cache_seqlens: int or (B,) int32: rows in use. By default all.
        block_table: (B, pages of a request) int32.
        softmax_scale: 1.0 by default, as in Gemma 4.
        values_scale: fp32, for codes of 8 bits alone; a value is code * scale. (Hkv,) for float8_e4m3fn; for int8 one scale for
            each row and KV head, values.shape[:-1]. `k_eq_v_norm_rope_append` writes both.
        return_lse: also return lse.
    Returns: out (B, Sq, Hq, D) in q's dtype, sums in fp32; with return_lse also lse (B, Hq, Sq) fp32. Rows before the
        first position give zeros and -inf. Row bits as in `flash_attn_func`.
    Raises: as `flash_attn_func`.
    """
    name = "k_eq_v_attention"
    checks.has_shape(name, "q", q, ("B", "Sq", "Hq", "D"))
    batch, _, _, head_dim = q.shape
    entries = (batch, "S") if block_table is None else ("num_pages", "page_size")
    checks.has_shape(name, "values", values, (*entries, "Hkv", head_dim))
    _check_heads(name, q)
    _check_groups(name, q, "values", values)
    value_codes.check(name, values, values_scale, q.dtype)
    if head_dim % 2:
        raise checks.ShapeError(f"{name}: head_dim must be even, got {head_dim}")
    checks.has_shape(name, "k_norm_weight", k_norm_weight, (head_dim,))
    checks.has_dtype(name, "k_norm_weight", k_norm_weight, checks.FLOATS)
    checks.has_shape(name, "inv_freq", inv_freq, (head_dim // 2,))
    checks.has_dtype(name, "inv_freq", inv_freq, (torch.float32, torch.float64))
    _check_block_table(name, block_table, batch)
    checks.same_device(
        name, q=q, values=values, values_scale=values_scale, k_norm_weight=k_norm_weight, inv_freq=inv_freq,
        block_table=block_table,
    )  # fmt: skip
    checks.is_flag(name, "return_lse", return_lse)
    scale = checks.positive_number(name, "softmax_scale", softmax_scale)
    capacity = values.shape[1] if block_table is None else values.shape[1] * block_table.shape[1]
    lengths = _lengths(name, cache_seqlens, capacity, q, new_rows=0)
    return Plan((q, values, k_norm_weight, inv_freq, lengths, block_table, scale, values_scale), return_lse)


# Checks that several functions share --------------------------------------------------------------------------------


def _check_heads(name: str, q: Tensor, **caches: Tensor) -> None:
    """dtypes, dense last dims, head_dim, and whole groups of query heads."""
    checks.has_dtype(name, "q", q, checks.FLOATS)
    checks.is_dense(name, "q", q)
    head_dim = q.shape[-1]
    if not 1 <= head_dim <= ops.MAX_HEAD_DIM:
        raise checks.ShapeError(f"{name}: head_dim must lie in [1, {ops.MAX_HEAD_DIM}], got {head_dim}")
    for argument, cache in caches.items():
        checks.has_dtype(name, argument, cache, (q.dtype,))
        checks.is_dense(name, argument, cache)
        _check_groups(name, q, argument, cache)


def _check_groups(name: str, q: Tensor, argument: str, cache: Tensor) -> None:
    heads, kv_heads = q.shape[-2], cache.shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        raise checks.ShapeError(f"{name}: q's heads must be a multiple of {argument}'s {kv_heads} heads, got {heads}")


def _check_block_ids(name: str, block_ids: Tensor | None, q: Tensor, num_keys: int) -> None:
    if block_ids is not None:
        checks.has_shape(name, "block_ids", block_ids, (q.shape[0], num_keys))
        checks.has_dtype(name, "block_ids", block_ids, checks.INTEGERS)


def _check_block_table(name: str, block_table: Tensor | None, batch: int) -> None:
    if block_table is not None:
        checks.has_shape(name, "block_table", block_table, (batch, "pages of a request"))
        checks.has_dtype(name, "block_table", block_table, checks.INTEGERS)


def _check_training_arguments(
    name: str, dropout_p: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool
) -> None:
    checks.neutral(name, "dropout_p", dropout_p, 0.0, "dropout belongs to training")
    checks.neutral(name, "alibi_slopes", alibi_slopes, None, "Gemma has no ALiBi")
    checks.neutral(
        name, "return_attn_probs", return_attn_probs, False, "probabilities are never formed; see return_lse"
    )
    checks.is_flag(name, "deterministic", deterministic)


def _score_arguments(
    name: str, q: Tensor, softmax_scale: float | None, softcap: float, causal: bool, window_size: tuple[int, int]
) -> tuple[float, float, int, int]:
    """scale, softcap, left, right, with causal folded into right."""
    hint = "; FlashAttention-2's fourth argument, dropout_p, is a keyword here" if name == "flash_attn_func" else ""
    if softmax_scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        scale = checks.positive_number(name, "softmax_scale", softmax_scale, hint)
    cap = checks.real_number(name, "softcap", softcap)
    cap = 0.0 if cap == 0 else checks.positive_number(name, "softcap", cap)
    checks.is_flag(name, "causal", causal)
    left, right = checks.window(name, window_size)
    return scale, cap, left, 0 if causal else right


def _lengths(name: str, cache_seqlens: int | Tensor | None, capacity: int, q: Tensor, new_rows: int) -> Tensor:
    """(B,) integers on q's device."""
    batch = q.shape[0]
    if isinstance(cache_seqlens, Tensor):
        checks.has_shape(name, "cache_seqlens", cache_seqlens, (batch,))
        checks.has_dtype(name, "cache_seqlens", cache_seqlens, checks.INTEGERS)
        checks.same_device(name, q=q, cache_seqlens=cache_seqlens)
        return cache_seqlens
    length = capacity if cache_seqlens is None else checks.whole_number(name, "cache_seqlens", cache_seqlens)
    if length + new_rows > capacity:
        raise ValueError(f"{name}: cache_seqlens must be at most {capacity - new_rows}, got {length}")
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _check_rotary(name: str, cos: Tensor, sin: Tensor, q: Tensor, capacity: int, cache_leftpad: Tensor | None) -> None:
    checks.has_shape(name, "rotary_cos", cos, ("positions", "rotary_dim / 2"))
    checks.has_shape(name, "rotary_sin", sin, tuple(cos.shape))
    for argument, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.has_dtype(name, argument, tensor, (q.dtype, torch.float32))
    if cos.shape[0] < capacity:
        raise checks.ShapeError(
            f"{name}: rotary_cos must have a row for each of the cache's {capacity} positions, got {cos.shape[0]}"
        )
    if 2 * cos.shape[1] > q.shape[-1]:
        raise checks.ShapeError(f"{name}: rotary_dim must be at most head_dim {q.shape[-1]}, got {2 * cos.shape[1]}")
    if cache_leftpad is not None:
        raise ValueError(f"{name}: cache_leftpad must be None with rotary_cos: positions would be ambiguous")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) with its first rotary_dim columns rotated by position (B, S) or (B, 1)."""
    rotary_dim = 2 * cos.shape[1]
    position = position.clamp(0, cos.shape[0] - 1)  # what lies outside is refused by the op, which sees the lengths
    sums = torch.promote_types(x.dtype, torch.float32)
    turn_cos, turn_sin = cos[position].unsqueeze(2).to(sums), sin[position].unsqueeze(2).to(sums)  # (B, S, 1, R/2)
    turned = x[..., :rotary_dim].to(sums)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    rotated = (first * turn_cos - second * turn_sin, second * turn_cos + first * turn_sin)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((joined.to(x.dtype), x[..., rotary_dim:]), dim=-1)
