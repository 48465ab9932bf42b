"""Which key a query may see: causal order, sliding window, image blocks, padding.

Masks are whole boolean matrices (B, Sq, Sk), True = visible. Queries are the last Sq positions of the sequence
("bottom-right" alignment), so one rule serves prefill, chunks of a prefill and decode.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gemma4_kernels.geometry import LayerKind

BlockRule = Literal["window", "forward"]
BLOCK_RULES: tuple[BlockRule, ...] = ("window", "forward")

NO_BLOCK = -1
"""Block id of a token that belongs to no image: it matches nothing, not even another -1."""


def block_ids_from_token_types(token_types: Tensor) -> Tensor:
    """Number the images: each run of image (1) or video (2) tokens is one block, all other tokens have -1.

    Two images that touch are one block, as they are for transformers.

    Args:
        token_types: (B, S) integers, `mm_token_type_ids` of the processor: 0 text, 1 image, 2 video, 3 audio.
    Returns: (B, S) int32, 0, 1, 2 ... within a row.
    Raises: ValueError if the shape is not (B, S); TypeError if the dtype is not an integer.
    """
    if token_types.ndim != 2:
        raise ValueError(f"token_types: expected (batch, tokens), got shape {tuple(token_types.shape)}")
    if token_types.is_floating_point() or token_types.is_complex():
        raise TypeError(f"token_types: expected integers, got {token_types.dtype}")
    is_vision = (token_types == 1) | (token_types == 2)
    starts = is_vision.clone()
    starts[:, 1:] &= ~is_vision[:, :-1]
    block_ids = starts.cumsum(dim=1) - 1
    return torch.where(is_vision, block_ids, NO_BLOCK).to(torch.int32)


def visible(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_ids: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_visible: Tensor | None = None,
    block_rule: BlockRule = "window",
    device: torch.device | str | None = None,
) -> Tensor:
    """The visibility matrix of one attention call.

    With L the row's number of keys, query i of Sq is the token at index L - Sq + i. It sees key j if j < L and

        block_rule "window"     (j <= i + right OR same block) AND j >= i - left
        block_rule "forward"    (j <= i + right AND j >= i - left) OR same block

    where -1 in `window_size` lifts a bound and causal means right = 0.

    Args:
        window_size: neighbours to the (left, right); Gemma's window of 1024 counts the token itself: (1023, 0).
        block_ids: (B, Sk) integers; equal non-negative ids are one block, negative ids match nothing.
        key_lengths: (B,) keys in use in each row; None: all Sk.
        key_visible: (B, Sk) bool; False hides a key from everybody, whatever the rest says (padding).
    Returns: (B, Sq, Sk) bool; B is 1 if nothing depends on the row.
    """
    left, right = window_size
    if causal:
        right = 0
    for tensor in (block_ids, key_lengths, key_visible):
        if tensor is not None:
            device = tensor.device
    keys = torch.arange(num_keys, device=device)[None, None, :]  # (1, 1, Sk)
    lengths = torch.full((1,), num_keys, device=device) if key_lengths is None else key_lengths.long()
    queries = (
        lengths[:, None, None] - num_queries + torch.arange(num_queries, device=device)[None, :, None]
    )  # (B, Sq, 1)

    not_future = keys <= queries + right if right >= 0 else torch.ones_like(keys <= queries)  # (B, Sq, Sk)
    in_window = keys >= queries - left if left >= 0 else torch.ones_like(not_future)  # (B, Sq, Sk)
    same_block = torch.zeros_like(not_future)
    if block_ids is not None:
        # A query in front of the first key (fewer keys than queries) belongs to no block.
        index = queries[..., 0].expand(block_ids.shape[0], -1)  # (B, Sq)
        query_blocks = block_ids.long().gather(1, index.clamp(min=0))
        query_blocks = torch.where(index >= 0, query_blocks, NO_BLOCK)
        same_block = (query_blocks[:, :, None] == block_ids[:, None, :]) & (query_blocks[:, :, None] >= 0)

    if block_rule == "window":
        mask = (not_future | same_block) & in_window
    else:
        mask = (not_future & in_window) | same_block
    mask = mask & (keys < lengths[:, None, None])
    if key_visible is not None:
        mask = mask & key_visible[:, None, :]
    return mask


def layer_visible(
    kind: LayerKind,
    num_queries: int,
    num_keys: int,
    *,
    window: int,
    block_ids: Tensor | None = None,
    key_visible: Tensor | None = None,
    block_rule: BlockRule = "window",
    device: torch.device | str | None = None,
) -> Tensor:
    """The visibility matrix of a Gemma 4 layer.

    There are two rules for image blocks, because transformers 5.23 has two:

    * "window" is the model's own (`create_masks_for_vision_model` there): a full layer is plainly causal, without
      exception for images; a sliding layer sees `(causal OR same block) AND inside the window`, the window being a
      bound on the left only. transformers has it where generation prepares its masks ahead, with a static cache.
    * "forward" is what the library's generic masks make of it: a full layer sees `causal OR same block`, a sliding one
      `(causal AND inside the window) OR same block`. A bare `forward(mm_token_type_ids=...)` has it, and so has
      `generate()` with its default, dynamic cache.

    The two differ from the first image on.

    Args:
        window: keys a token of a sliding layer sees, itself included.
        block_ids, key_visible: (B, Sk) as in `visible`.
    Returns: (B, Sq, Sk) bool; B is 1 if nothing depends on the row.
    """
    if kind == "full" and block_rule == "window":
        block_ids = None
    return visible(
        num_queries,
        num_keys,
        causal=True,
        window_size=(-1, -1) if kind == "full" else (window - 1, 0),
        block_ids=block_ids,
        key_visible=key_visible,
        block_rule=block_rule,
        device=device,
    )
