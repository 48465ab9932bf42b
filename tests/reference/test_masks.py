"""Visibility matrices against loops over every query and key, and against transformers' own masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_models import HIDDEN, WINDOW
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma4_unified.modeling_gemma4_unified import get_block_sequence_ids_for_mask

from gemma4_kernels.reference import block_ids_from_token_types, layer_visible, visible

TYPES = torch.tensor(
    [
        [0, 1, 1, 0, 2, 2, 2, 1, 0, 3, 3, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1],
    ]
)


def test_block_ids_are_those_of_transformers() -> None:
    ours = block_ids_from_token_types(TYPES)
    assert ours.dtype == torch.int32
    assert torch.equal(ours.long(), get_block_sequence_ids_for_mask(TYPES, device=torch.device("cpu")))


def test_touching_images_are_one_block_and_audio_is_none() -> None:
    assert block_ids_from_token_types(TYPES)[0].tolist() == [-1, 0, 0, -1, 1, 1, 1, 1, -1, -1, -1, -1]


def test_bad_token_types_are_refused() -> None:
    with pytest.raises(ValueError, match="token_types: expected"):
        block_ids_from_token_types(TYPES[0])
    with pytest.raises(TypeError, match="token_types: expected integers"):
        block_ids_from_token_types(TYPES.float())


def by_hand(
    num_queries: int,
    num_keys: int,
    causal: bool,
    window_size: tuple[int, int],
    block_ids: Tensor,
    key_lengths: Tensor,
    key_visible: Tensor,
    block_rule: str,
) -> Tensor:
    batch = len(block_ids)
    result = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    left, right = window_size
    for b, i, j in itertools.product(range(batch), range(num_queries), range(num_keys)):
        length = int(key_lengths[b])
        query = length - num_queries + i
        behind_right_bound = (not causal or j <= query) and (right < 0 or j <= query + right)
        if causal:
            behind_right_bound = j <= query
        inside_left_bound = left < 0 or j >= query - left
        same_block = query >= 0 and int(block_ids[b, query]) == int(block_ids[b, j]) >= 0
        if block_rule == "window":
            seen = (behind_right_bound or same_block) and inside_left_bound
        else:
            seen = (behind_right_bound and inside_left_bound) or same_block
        result[b, i, j] = seen and j < length and bool(key_visible[b, j])
    return result


@pytest.mark.parametrize("num_queries", [1, 4, 12])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (3, 0), (0, 0), (2, 1), (-1, 2), (20, -1)])
@pytest.mark.parametrize("block_rule", ["window", "forward"])
def test_visible_is_what_its_rule_says(
    num_queries: int, causal: bool, window_size: tuple[int, int], block_rule: Any
) -> None:
    block_ids = block_ids_from_token_types(TYPES)
    key_lengths = torch.tensor([12, 9, 2, 0])
    key_visible = torch.arange(12) >= torch.tensor([[0], [4], [0], [0]])
    ours = visible(
        num_queries,
        12,
        causal=causal,
        window_size=window_size,
        block_ids=block_ids,
        key_lengths=key_lengths,
        key_visible=key_visible,
        block_rule=block_rule,
    )
    expected = by_hand(num_queries, 12, causal, window_size, block_ids, key_lengths, key_visible, block_rule)
    assert torch.equal(ours, expected)


def test_blocks_with_negative_ids_match_nothing() -> None:
    ids = torch.tensor([[-1, -1, -2, -2]], dtype=torch.int32)
    assert torch.equal(visible(4, 4, causal=True, block_ids=ids)[0], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("padding", [0, 3])
def test_layer_masks_are_those_of_a_bare_forward(hf_multimodal: Any, padding: int) -> None:
    length = TYPES.shape[1]
    long_types = TYPES.repeat(1, 2)  # (4, 24): past the window
    key_visible = (torch.arange(2 * length) >= padding).expand(4, -1)
    theirs = create_masks_for_generate(
        hf_multimodal.config,
        inputs_embeds=torch.zeros(4, 2 * length, HIDDEN),
        attention_mask=key_visible.long(),
        past_key_values=None,
        block_sequence_ids=get_block_sequence_ids_for_mask(long_types, device=torch.device("cpu")),
    )
    assert_layer_masks(theirs, long_types, key_visible, "forward")


@pytest.mark.parametrize("padding", [0, 3])
def test_layer_masks_are_those_of_generation(hf_multimodal: Any, padding: int) -> None:
    long_types = TYPES.repeat(1, 2)
    key_visible = (torch.arange(24) >= padding).expand(4, -1)
    theirs = hf_multimodal.create_masks_for_generate(
        hf_multimodal.config,
        inputs_embeds=torch.zeros(4, 24, HIDDEN),
        attention_mask=key_visible.long(),
        past_key_values=None,
        position_ids=None,
        mm_token_type_ids=long_types,
    )
    assert_layer_masks(theirs, long_types, key_visible, "window")


def assert_layer_masks(theirs: dict[str, Tensor], types: Tensor, key_visible: Tensor, block_rule: Any) -> None:
    block_ids = block_ids_from_token_types(types)
    for kind, layer_type in (("full", "full_attention"), ("sliding", "sliding_attention")):
        ours = layer_visible(
            kind,  # type: ignore[arg-type]
            24,
            24,
            window=WINDOW,
            block_ids=block_ids,
            key_visible=key_visible,
            block_rule=block_rule,
        )
        assert torch.equal(ours, theirs[layer_type][:, 0] == 0), kind
