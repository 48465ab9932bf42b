"""transformers: the attention implementation "gemma4_kernels", for Gemma 4, its drafter, and Gemma 3.

    from gemma4_kernels.integrations.transformers import register
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register())

transformers asks twice: once per forward for a mask, once per layer for attention. No mask of queries x keys is built;
what the mask function returns is one number a key, shaped (B, channels, 1, Skv), because models slice and flip masks on the
way to the layers:

    None            nothing but causality and the window, which attention knows
    int32           channel 0: block id of each key, -1 for none, -2 for padding (block_ids of `flash_attn_func`)
                    channel 1, with caches that have room beyond their last row: 1 for rows in use
    int16           the same, where blocks are free of the window: so a forward of transformers 5.23 masks images; masks
                    that generate() prepares ahead, for static caches, keep them inside it
    bool            with one query row: the keys it sees, window and all (the drafter, and masks that users make)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from gemma4_kernels.attention.api import flash_attn_func, flash_attn_with_kvcache

NAME = "gemma4_kernels"
_PADDING = -2


def register() -> str:
    """Make `attn_implementation="gemma4_kernels"` known to transformers. Returns that name; calling twice is harmless."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer's attention.

    Args:
        query: (B, Hq, Sq, D). key, value: (B, Hkv, Skv, D).
        attention_mask: what `mask` returned; or a user's 4-D mask with one query row.
    Returns: (B, Sq, Hq, D) and None for the weights, which are never formed.
    Raises: ValueError for dropout, for what only other attention functions know, and for a dense 4-D mask of several
        query rows.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME}: {name} must be None, it is not supported, got {type(kwargs[name]).__name__}")
    if dropout:
        raise ValueError(
            f"{NAME}: dropout must be 0, got {dropout}: these kernels are for inference; call model.eval()"
        )
    if kwargs.get("output_attentions"):
        warnings.warn(f"{NAME}: attention weights are never formed, output_attentions returns none", stacklevel=2)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, S, H, D)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = (-1, -1)
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)  # transformers counts the token itself
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0}
    if attention_mask is None:
        return _tensor(flash_attn_func(q, k, v, causal=causal, window_size=window, **options)), None
    attention_mask = attention_mask[..., : k.shape[1]]
    if attention_mask.shape[2] != 1 or attention_mask.dtype not in (torch.int32, torch.int16):
        visible = _visible_keys(attention_mask, q.shape[1])
        block_ids = torch.where(visible, -1, _PADDING).to(torch.int32)
        return _tensor(flash_attn_func(q, k, v, block_ids=block_ids.expand(q.shape[0], -1), **options)), None
    options |= {"causal": causal, "window_size": window, "window_limits_blocks": attention_mask.dtype == torch.int32}
    block_ids = attention_mask[:, 0, 0].to(torch.int32)  # (B, Skv)
    if not causal:
        block_ids = block_ids.clamp(max=-1)  # a model that looks both ways, as embedding models do, has no blocks
    if attention_mask.shape[1] == 1:
        return _tensor(flash_attn_func(q, k, v, block_ids=block_ids, **options)), None
    in_use = attention_mask[:, 1, 0].sum(dim=-1, dtype=torch.int32)  # (B,)
    return _tensor(flash_attn_with_kvcache(q, k, v, cache_seqlens=in_use, block_ids=block_ids, **options)), None


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None, attention_mask: Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """The mask of one kind of layers for one forward, in the form that `attention` takes.

    Args:
        q_length, kv_length: rows and keys; q_offset, kv_offset: the tokens of the first of each. q_offset is a tensor with
            static caches.
        mask_function: (batch, head, query token, key token) -> bool, transformers' rule without padding.
        attention_mask: (B, tokens) bool, False for padding; may end early.
        local_size: the window, where the rule is plain or `window or block`; None where an overlay holds it.
        allow_is_causal_skip: True: the rule is plain causality with or without a window.
    """
    token = torch.arange(kv_length, device=device) + kv_offset  # (Skv,)
    present = _without_padding(attention_mask, token)  # (B, Skv) bool or None
    bidirectional = "allow_is_bidirectional_skip" in kwargs  # given by the makers of bidirectional masks only
    if bidirectional and q_length == 1:
        return _row(batch_size, q_offset, token, mask_function, present, local_size)
    if bidirectional and (local_size is not None or q_length != kv_length):
        raise ValueError(
            f"{NAME}: a bidirectional mask of several rows must be without a window and square, got {q_length} rows, "
            f"{kv_length} keys and a window of {local_size}"
        )
    # What looks both ways (a vision tower) has no cache and no order that blocks could change.
    has_room = not bidirectional and (isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length)
    # With one query row there is nothing ahead of it that a block could show.
    has_overlay = not bidirectional and not allow_is_causal_skip and q_length > 1
    block_ids = None
    if has_overlay and mask_function is not None:
        block_ids = _blocks(batch_size, token, mask_function)  # (B, Skv)
    if block_ids is None and present is None and not has_room:
        return None
    free_of_window = block_ids is not None and local_size is not None
    codes = torch.full((batch_size, kv_length), -1, device=device) if block_ids is None else block_ids
    if present is not None:
        codes = codes.masked_fill(~present, _PADDING)
    channels = [codes]
    if has_room:
        channels.append((token < q_offset + q_length).expand(batch_size, -1).to(codes.dtype))
    stacked = torch.stack(channels, dim=1).to(torch.int16 if free_of_window else torch.int32)  # (B, channels, Skv)
    return stacked[:, :, None]  # (B, channels, 1, Skv)


def _without_padding(attention_mask: Tensor | None, token: Tensor) -> Tensor | None:
    """(B, Skv) bool: the keys that are no padding; None if that is all of them, as far as the host can tell."""
    if attention_mask is None:
        return None
    attention_mask = attention_mask.to(device=token.device, dtype=torch.bool)
    known = attention_mask.shape[1]
    present = attention_mask[:, token.clamp(max=known - 1)] & (token < known)
    # What lies beyond the mask's end is padding or a row that a static cache has not filled yet: unseen either way.
    return None if present.device.type == "cpu" and not _tracing() and bool(present.all()) else present


def _blocks(batch_size: int, token: Tensor, mask_function: Callable[..., Tensor]) -> Tensor | None:
    """(B, Skv) block ids, -1 for none; None if there is no block, as far as the host can tell.

    The rule is a closed function. But causality never shows a token its right neighbour, and every window does show it
    its left one: so the neighbours that see each other both ways are those of one block.
    """
    batch = torch.arange(batch_size, device=token.device)[:, None]  # (B, 1)
    head = torch.zeros((), dtype=torch.int64, device=token.device)
    left, right = token[None, :-1], token[None, 1:]  # (1, Skv - 1)
    joined = mask_function(batch, head, left, right).expand(batch_size, -1)  # (B, Skv - 1)
    in_sequence = mask_function(batch, head, right, left).all()
    message = (
        f"{NAME}: several sequences packed into one row (position_ids that restart) are not supported; "
        "use one row each, with padding on the left"
    )
    if _tracing():
        torch._assert_async(in_sequence, message)
    elif not bool(in_sequence):
        raise ValueError(message)
    elif token.device.type == "cpu" and not bool(joined.any()):
        return None
    edge = joined.new_zeros((batch_size, 1))
    after = torch.cat((edge, joined), dim=1)  # (B, Skv): joined to the token before
    before = torch.cat((joined, edge), dim=1)  # (B, Skv): joined to the token after
    number = (~after).cumsum(dim=1) - 1
    return torch.where(after | before, number, -1)


def _row(
    batch_size: int, q_offset: int | Tensor, token: Tensor, mask_function: Callable[..., Tensor] | None,
    present: Tensor | None, local_size: int | None,
) -> Tensor | None:  # fmt: skip
    """(B, 1, 1, Skv) bool for one query row under a bidirectional rule; None if it sees every key."""
    if present is None and (local_size is None or token.shape[0] <= local_size):
        return None
    visible = torch.ones((batch_size, token.shape[0]), dtype=torch.bool, device=token.device)
    if mask_function is not None:
        batch = torch.arange(batch_size, device=token.device)[:, None]
        head = torch.zeros((), dtype=torch.int64, device=token.device)
        query = torch.zeros_like(token[:1]) + q_offset  # (1,)
        visible = visible & mask_function(batch, head, query, token[None])
    if present is not None:
        visible = visible & present
    return visible[:, None, None]


def _visible_keys(attention_mask: Tensor, q_length: int) -> Tensor:
    """(B or 1, Skv) bool of a 4-D mask, bool or additive, with one query row."""
    if q_length != 1 or attention_mask.shape[1] != 1:
        raise ValueError(
            f"{NAME}: a dense mask of shape {tuple(attention_mask.shape)} is not supported with {q_length} query rows; pass "
            "the 2-D padding mask, or let the model build the mask"
        )
    row = attention_mask[:, 0, 0]
    if row.is_floating_point():
        return row >= 0  # an additive mask holds 0 or a large negative number
    return row.bool()


def _tracing() -> bool:
    """True where reading a value would break a graph or a capture."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)  # without return_lse
    return result
