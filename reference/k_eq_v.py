"""Attention of a full layer whose keys are a function of its values, written both ways.

A full layer of Gemma 4 has no v_proj. With u the output of k_proj for a token,

    value = u / rms(u)                        v_norm has no weight
    key   = rope(w * u / rms(u), position)    k_norm has the weight w

so key = rope(w * value, position): a cache of the values alone is enough. `k_eq_v_attention` rebuilds the keys and then
attends as usual. `k_eq_v_from_values_alone` never forms them: on the dims whose frequency is 0 the rotation is the
identity and w can move to the query, so that only the rotated dims need work per key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemma4_kernels.reference.attention import attention, check_key_lengths, eager_attention
from gemma4_kernels.reference.layers import apply_rope, compute_dtype, rotation
from gemma4_kernels.reference.masks import visible as visible_keys


def keys_from_values(values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """rope(w * value, position), rounded where the model rounds: after the norm, and each term of the rotation.

    Args:
        values: (B, S, Hkv, D), what v_norm produced.
        k_norm_weight: (D,). inv_freq: (D / 2,), zeros for the pairs that do not turn.
        positions: (S,) or (B, S) integers.
    Returns: keys (B, S, Hkv, D) in values' dtype. Weight and angles are applied in float32, or in float64 for float64.
    """
    _check_weights(values, k_norm_weight, inv_freq)
    num_tokens = values.shape[1]
    if positions.ndim not in (1, 2) or positions.shape[-1] != num_tokens:
        raise ValueError(f"positions: expected ({num_tokens},) or (batch, {num_tokens}), got {tuple(positions.shape)}")
    wide = compute_dtype(values.dtype)
    normed = (values.to(wide) * k_norm_weight.to(wide)).to(values.dtype)  # (B, S, Hkv, D)
    cos, sin = rotation(positions, inv_freq, values.dtype)  # (S, D) or (B, S, D)
    return apply_rope(normed, cos, sin)


def k_eq_v_attention(
    q: Tensor,
    values: Tensor,
    k_norm_weight: Tensor,
    inv_freq: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Causal attention from a cache of values: rebuild the keys, then attend.

    Args:
        q: (B, Sq, Hq, D), normed and rotated; query i of Sq has position L - Sq + i, L = key_lengths[b] or S.
        values: (B, S, Hkv, D), what v_norm produced; row j is position j.
        k_norm_weight: (D,). inv_freq: (D / 2,) with its zeros.
        key_lengths: (B,) integers, the rows in use.
        dtype: of `out`; float64 computes in float64 (keys and angles too), everything else in float32.
    Returns: out (B, Sq, Hq, D) in `dtype`; lse (B, Hq, Sq). Rows that see nothing: zeros and -inf.
    Raises: ValueError, TypeError naming the argument.
    """
    _check_arguments(q, values, k_norm_weight, inv_freq, key_lengths)
    wide = values.to(compute_dtype(dtype))
    keys = keys_from_values(wide, k_norm_weight, inv_freq, torch.arange(values.shape[1], device=values.device))
    mask = _causal(q, values, key_lengths)
    return attention(q, keys, wide, scale=softmax_scale, visible=mask, dtype=dtype)


def k_eq_v_from_values_alone(
    q: Tensor,
    values: Tensor,
    k_norm_weight: Tensor,
    inv_freq: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`k_eq_v_attention` without keys; the identity that the fused kernel uses. Same arguments, same results.

        score(q, j) = sum over dims that do not turn of (q w) value[j]
                    + sum over dims that turn of q rope(w value[j], j)

    A dim turns if the frequency of its pair (i, i + D / 2) is not 0, wherever those pairs lie.
    """
    _check_arguments(q, values, k_norm_weight, inv_freq, key_lengths)
    wide = compute_dtype(dtype)
    group = q.shape[2] // values.shape[2]
    queries = q.to(wide)  # (B, Sq, Hq, D)
    shared = values.to(wide).repeat_interleave(group, dim=2)  # (B, S, Hq, D), keys and values at once
    weight = k_norm_weight.to(wide)

    turning_pairs = inv_freq != 0  # (D / 2,)
    turns = torch.cat((turning_pairs, turning_pairs))  # (D,)
    still_scores = torch.einsum("bqhd,bkhd->bhqk", (queries * weight)[..., ~turns], shared[..., ~turns])

    # The turning dims keep their order, so that halves still pair up: a small RoPE of its own.
    cos, sin = rotation(torch.arange(values.shape[1], device=values.device), inv_freq[turning_pairs], wide)
    turned_keys = apply_rope((shared * weight)[..., turns], cos, sin)  # (B, S, Hq, number of turning dims)
    turning_scores = torch.einsum("bqhd,bkhd->bhqk", queries[..., turns], turned_keys)

    scores = (still_scores + turning_scores) * softmax_scale  # (B, Hq, Sq, S)
    scores = scores.masked_fill(~_causal(q, values, key_lengths)[:, None], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # (B, Hq, Sq)
    weights = torch.softmax(scores, dim=-1).masked_fill(lse[..., None] == -math.inf, 0.0)  # (B, Hq, Sq, S)
    return torch.einsum("bhqk,bkhd->bqhd", weights, shared).to(dtype), lse


def plain_k_eq_v_attention(
    q: Tensor,
    values: Tensor,
    k_norm_weight: Tensor,
    inv_freq: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`k_eq_v_attention` at the tensors' own dtype, rounded where transformers rounds (angles are float32).

    Returns: out (B, Sq, Hq, D) in q's dtype; lse (B, Hq, Sq) of the rounded scores.
    """
    _check_arguments(q, values, k_norm_weight, inv_freq, key_lengths)
    keys = keys_from_values(values, k_norm_weight, inv_freq, torch.arange(values.shape[1], device=values.device))
    return eager_attention(q, keys, values, scale=softmax_scale, visible=_causal(q, values, key_lengths))


def _causal(q: Tensor, values: Tensor, key_lengths: Tensor | None) -> Tensor:
    """(B or 1, Sq, S): causal, bottom-right."""
    return visible_keys(q.shape[1], values.shape[1], causal=True, key_lengths=key_lengths, device=q.device)


def _check_weights(values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor) -> None:
    if values.ndim != 4:
        raise ValueError(f"values: expected (batch, tokens, KV heads, head_dim), got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"values: expected a floating dtype, got {values.dtype}")
    head_dim = values.shape[3]
    for name, tensor, size in (("k_norm_weight", k_norm_weight, head_dim), ("inv_freq", inv_freq, head_dim // 2)):
        if tuple(tensor.shape) != (size,):
            raise ValueError(f"{name}: expected shape ({size},) for head_dim {head_dim}, got {tuple(tensor.shape)}")


def _check_arguments(
    q: Tensor, values: Tensor, k_norm_weight: Tensor, inv_freq: Tensor, key_lengths: Tensor | None
) -> None:
    _check_weights(values, k_norm_weight, inv_freq)
    if q.ndim != 4 or q.shape[0] != values.shape[0] or q.shape[3] != values.shape[3]:
        raise ValueError(
            f"q: expected ({values.shape[0]}, tokens, heads, {values.shape[3]}) to go with values, got {tuple(q.shape)}"
        )
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")
    if values.shape[2] == 0 or q.shape[2] % values.shape[2]:
        raise ValueError(f"q: expected a multiple of the {values.shape[2]} heads of values, got {q.shape[2]}")
    check_key_lengths(key_lengths, values.shape[0], values.shape[1])
