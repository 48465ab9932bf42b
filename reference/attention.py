"""Attention with the whole score matrix in sight.

    q  (B, Sq, Hq, D)      k, v  (B, Sk, Hkv, D)      scores  (B, Hq, Sq, Sk)

`attention` takes any mask, `flash_attention` speaks FlashAttention-2's language (and Gemma's image blocks), and
`plain_attention` is the same computation as a user of plain PyTorch would run it at the tensors' own dtype: a kernel
may be at most twice as far from `flash_attention` in float64 as `plain_attention` is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemma4_kernels.reference.layers import compute_dtype
from gemma4_kernels.reference.layers import softcap as apply_softcap
from gemma4_kernels.reference.masks import BlockRule
from gemma4_kernels.reference.masks import visible as visible_keys

HIDDEN_KEY = -2
"""Block id of a key that nobody may see: padding."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visible: Tensor | None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(q k^T * scale) + bias) v over the visible keys.

    Args:
        q: (B, Sq, Hq, D). k, v: (B, Sk, Hkv, D), Hq a multiple of Hkv; query head h reads KV head h // (Hq / Hkv).
        visible: (B or 1, Sq, Sk) or (B or 1, Hq or 1, Sq, Sk) bool, True = visible; None: everything.
        bias: added to the scores, shape as `visible`.
        softcap: 0 for none; otherwise scores become cap * tanh(scores / cap) before the mask.
        dtype: of the result; None: q's. The computation is float64 if this is float64, otherwise float32.
    Returns: out (B, Sq, Hq, D); lse (B, Hq, Sq), the log of the sum of exponentials, in the computation's dtype.
        A row that sees no key has out = 0 and lse = -inf.
    """
    _check_qkv(q, k, v)
    dtype = dtype or q.dtype
    wide = compute_dtype(dtype)
    queries = q.to(wide).transpose(1, 2)  # (B, Hq, Sq, D)
    keys = _repeat_heads(k.to(wide), q.shape[2])  # (B, Hq, Sk, D)
    values = _repeat_heads(v.to(wide), q.shape[2])  # (B, Hq, Sk, D)

    scores = apply_softcap(queries @ keys.transpose(2, 3) * scale, softcap)  # (B, Hq, Sq, Sk)
    if bias is not None:
        scores = scores + _per_head(bias).to(wide)
    if visible is not None:
        scores = scores.masked_fill(~_per_head(visible), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # (B, Hq, Sq)
    # The softmax of a row without visible keys is NaN; such a row has lse = -inf and gets zeros.
    weights = torch.softmax(scores, dim=-1).masked_fill(lse[..., None] == -math.inf, 0.0)  # (B, Hq, Sq, Sk)
    out = (weights @ values).transpose(1, 2)  # (B, Sq, Hq, D)
    return out.to(dtype), lse


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_ids: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_rule: BlockRule = "window",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2's function, computed the obvious way.

    Query i of Sq is the token at index L - Sq + i of its row, L = key_lengths[b] or Sk ("bottom-right"). It sees key j
    if j < L, `j <= i + right OR same block`, and `j >= i - left`; causal means right = 0.

    Args:
        q: (B, Sq, Hq, D). k, v: (B, Sk, Hkv, D). Floating point, one device.
        softmax_scale: None means D**-0.5 as in FlashAttention. Gemma's own is 1.0.
        window_size: neighbours to the (left, right), -1 for no bound; Gemma's window of 1024 is (1023, 0).
        softcap: 0 for none.
        block_ids: (B, Sk) integers: equal non-negative ids see each other both ways inside the left bound; -1: no
            block; -2: a key that nobody may see.
        key_lengths: (B,) integers, the keys in use.
        block_rule: "forward" frees blocks of the left bound too, see `masks.visible`.
        dtype: of `out`; float64 computes in float64, everything else in float32.
    Returns: out (B, Sq, Hq, D) in `dtype`; lse (B, Hq, Sq). Rows that see nothing: zeros and -inf.
    Raises: ValueError, TypeError naming the argument.
    """
    scale, mask = _flash_arguments(
        q, k, v, softmax_scale, causal, window_size, softcap, block_ids, key_lengths, block_rule
    )
    return attention(q, k, v, scale=scale, visible=mask, softcap=softcap, dtype=dtype)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_ids: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_rule: BlockRule = "window",
) -> tuple[Tensor, Tensor]:
    """`flash_attention` at the tensors' own dtype, rounded where transformers' eager attention rounds.

    Both products run at the input dtype and the probabilities are rounded to it between them; only the softmax is
    float32. Arguments as in `flash_attention`.

    Returns: out (B, Sq, Hq, D) in q's dtype; lse (B, Hq, Sq) of the rounded scores, float32 (float64 for float64).
    """
    scale, mask = _flash_arguments(
        q, k, v, softmax_scale, causal, window_size, softcap, block_ids, key_lengths, block_rule
    )
    return eager_attention(q, k, v, scale=scale, visible=mask, softcap=softcap)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, visible: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`attention` with every step at the inputs' dtype except the softmax; arguments and results as there."""
    queries = q.transpose(1, 2)  # (B, Hq, Sq, D)
    keys = _repeat_heads(k, q.shape[2])  # (B, Hq, Sk, D)
    values = _repeat_heads(v, q.shape[2])  # (B, Hq, Sk, D)
    scores = apply_softcap(torch.matmul(queries, keys.transpose(2, 3)) * scale, softcap)  # (B, Hq, Sq, Sk)
    scores = scores.masked_fill(~_per_head(visible), -math.inf).to(compute_dtype(q.dtype))
    lse = torch.logsumexp(scores, dim=-1)  # (B, Hq, Sq)
    weights = torch.softmax(scores, dim=-1).masked_fill(lse[..., None] == -math.inf, 0.0).to(q.dtype)
    return torch.matmul(weights, values).transpose(1, 2), lse


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, Hkv, D) -> (B, Hq, S, D): every KV head once for each query head of its group."""
    return x.transpose(1, 2).repeat_interleave(num_heads // x.shape[2], dim=1)


def _per_head(mask: Tensor) -> Tensor:
    """(B, Sq, Sk) -> (B, 1, Sq, Sk); a mask that has heads already stays as it is."""
    return mask[:, None] if mask.ndim == 3 else mask


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected (batch, tokens, heads, head_dim), got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k: expected batch {q.shape[0]} and head_dim {q.shape[3]} as in q, got batch {k.shape[0]} and head_dim"
            f" {k.shape[3]}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q: expected a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")


def _flash_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_ids: Tensor | None,
    key_lengths: Tensor | None,
    block_rule: BlockRule,
) -> tuple[float, Tensor]:
    """Check FlashAttention-2's arguments; the scale and the visibility matrix they describe."""
    _check_qkv(q, k, v)
    batch, num_keys = k.shape[:2]
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size: expected (left, right), each at least -1, got {window_size}")
    if softcap < 0:
        raise ValueError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    if block_ids is not None:
        _check_integers("block_ids", block_ids, (batch, num_keys))
    check_key_lengths(key_lengths, batch, num_keys)
    mask = visible_keys(
        q.shape[1],
        num_keys,
        causal=causal,
        window_size=window_size,
        block_ids=block_ids,
        key_lengths=key_lengths,
        key_visible=None if block_ids is None else block_ids != HIDDEN_KEY,
        block_rule=block_rule,
        device=q.device,
    )
    return q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale, mask


def check_key_lengths(key_lengths: Tensor | None, batch: int, num_keys: int) -> None:
    """Raise unless key_lengths is None or (B,) integers from 0 to num_keys."""
    if key_lengths is None:
        return
    _check_integers("key_lengths", key_lengths, (batch,))
    if batch and (int(key_lengths.min()) < 0 or int(key_lengths.max()) > num_keys):
        raise ValueError(f"key_lengths: expected 0 to {num_keys}, the number of keys, got {key_lengths.tolist()}")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
