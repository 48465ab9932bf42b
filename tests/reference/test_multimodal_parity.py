"""Images, video and audio: transformers' logits under both of its rules for image blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_models import (
    AUDIO_FRAME,
    AUDIO_TOKEN,
    HIDDEN,
    IMAGE_TOKEN,
    PATCH_VALUES,
    POSITIONS,
    VIDEO_TOKEN,
    VOCAB,
    WINDOW,
    assert_different_logits,
    assert_same_logits,
    multimodal_model,
    randn,
    random_ids,
)
from torch import Tensor
from transformers import DynamicCache

from gemma4_kernels.reference import ReferenceCache, ReferenceConfig, ReferenceModel

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
PLACEHOLDER = {IMAGE: IMAGE_TOKEN, VIDEO: VIDEO_TOKEN, AUDIO: AUDIO_TOKEN}


def prompt(*runs: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Ids and token types of runs of (type, tokens)."""
    types = torch.cat([torch.full((length,), kind) for kind, length in runs])[None]
    ids = random_ids(1, types.shape[1], seed=seed)
    for kind, token in PLACEHOLDER.items():
        ids[types == kind] = token
    return {"input_ids": ids, "mm_token_type_ids": types}


def patches(lengths: list[int], names: tuple[str, str], seed: int = 0) -> dict[str, Tensor]:
    """Images of those many patches, padded to a common number, with random places in the grid."""
    most = max(lengths) + 1
    positions = torch.randint(0, POSITIONS, (len(lengths), most, 2), generator=torch.Generator().manual_seed(seed))
    for image, length in enumerate(lengths):
        positions[image, length:] = -1
    return {names[0]: randn(len(lengths), most, PATCH_VALUES, seed=seed), names[1]: positions}


def images(*lengths: int) -> dict[str, Tensor]:
    return patches(list(lengths), ("pixel_values", "image_position_ids"))


PROMPTS = {
    "a short image": (prompt((TEXT, 3), (IMAGE, 5), (TEXT, 4)), images(5)),
    "an image across the edge of the window": (prompt((TEXT, WINDOW - 3), (IMAGE, 8), (TEXT, 9)), images(8)),
    "an image longer than the window": (prompt((TEXT, 4), (IMAGE, WINDOW + 7), (TEXT, 5)), images(WINDOW + 7)),
    "two images": (prompt((IMAGE, 4), (TEXT, 2), (IMAGE, 6), (TEXT, 3)), images(4, 6)),
}


def generation_masks(hf_model: Any, batch: dict[str, Tensor], cache: Any = None) -> dict[str, Tensor]:
    """The masks that transformers' generate() hands to the model."""
    masks: dict[str, Tensor] = hf_model.create_masks_for_generate(
        hf_model.config,
        inputs_embeds=torch.zeros(*batch["input_ids"].shape, HIDDEN),
        attention_mask=None,
        past_key_values=cache,
        position_ids=None,
        mm_token_type_ids=batch["mm_token_type_ids"],
    )
    return masks


@pytest.mark.parametrize("name", PROMPTS)
def test_images_under_the_rule_of_a_bare_forward(hf_multimodal: Any, multimodal: ReferenceModel, name: str) -> None:
    batch, features = PROMPTS[name]
    assert_same_logits(multimodal.logits(**batch, **features), hf_multimodal(**batch, **features).logits)


@pytest.mark.parametrize("name", PROMPTS)
def test_images_under_the_rule_of_generation(hf_multimodal: Any, multimodal: ReferenceModel, name: str) -> None:
    batch, features = PROMPTS[name]
    masks = generation_masks(hf_multimodal, batch)
    theirs = hf_multimodal(batch["input_ids"], attention_mask=masks, **features).logits
    ours = multimodal.logits(**batch, **features, block_rule="window")
    assert_same_logits(ours, theirs)
    visible = {layer_type: mask == 0 for layer_type, mask in masks.items()}
    assert_same_logits(multimodal.logits(batch["input_ids"], attention_mask=visible, **features), theirs)
    assert_different_logits(ours, multimodal.logits(**batch, **features, block_rule="forward"))


def test_chunked_prompt_with_an_image_under_the_rule_of_generation(
    hf_multimodal: Any, multimodal: ReferenceModel
) -> None:
    batch, features = PROMPTS["an image across the edge of the window"]
    ids, types = batch["input_ids"], batch["mm_token_type_ids"]
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_multimodal.config)
    edges = [0, 6, 20, 23, ids.shape[1]]  # the image is whole, in the second chunk
    for start, stop in itertools.pairwise(edges):
        chunk = {"input_ids": ids[:, start:stop], "mm_token_type_ids": types[:, :stop]}
        soft = features if start == 6 else {}
        masks = generation_masks(hf_multimodal, chunk, theirs)
        hf_logits = hf_multimodal(
            chunk["input_ids"], attention_mask=masks, past_key_values=theirs, use_cache=True, **soft
        ).logits
        assert_same_logits(multimodal.logits(**chunk, past_key_values=ours, block_rule="window", **soft), hf_logits)
    assert masks["sliding_attention"].shape[-1] < ids.shape[1]


def test_masks_over_the_newest_keys_only(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    ids = random_ids(1, WINDOW + 9)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_multimodal.config)
    multimodal.logits(ids[:, :-3], past_key_values=ours)
    hf_multimodal(ids[:, :-3], past_key_values=theirs, use_cache=True)
    batch = {"input_ids": ids[:, -3:], "mm_token_type_ids": torch.zeros_like(ids)}
    masks = generation_masks(hf_multimodal, batch, theirs)
    assert masks["sliding_attention"].shape[-1] == WINDOW - 1 + 3
    assert_same_logits(
        multimodal.logits(ids[:, -3:], attention_mask=masks, past_key_values=ours),
        hf_multimodal(ids[:, -3:], attention_mask=masks, past_key_values=theirs, use_cache=True).logits,
    )


def test_token_types_of_a_chunk_count_from_the_start_of_the_sequence(
    hf_multimodal: Any, multimodal: ReferenceModel
) -> None:
    ids = random_ids(1, WINDOW)
    types = torch.zeros(1, WINDOW, dtype=torch.long)
    types[:, 4:9] = IMAGE
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_multimodal.config)
    for start, stop, seen in ((0, 3, WINDOW), (3, 10, 10), (10, WINDOW, 7)):
        inputs = {"input_ids": ids[:, start:stop], "mm_token_type_ids": types[:, :seen]}
        assert_same_logits(
            multimodal.logits(**inputs, past_key_values=ours),
            hf_multimodal(**inputs, past_key_values=theirs, use_cache=True).logits,
        )


def test_a_batch_of_prompts_with_images(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    first, second = prompt((TEXT, 5), (IMAGE, 9), (TEXT, 6)), prompt((IMAGE, 3), (TEXT, 13), (IMAGE, 4), seed=1)
    batch = {name: torch.cat((first[name], second[name])) for name in first}
    features = images(9, 3, 4)
    assert_same_logits(multimodal.logits(**batch, **features), hf_multimodal(**batch, **features).logits)


def test_left_padded_prompt_with_an_image(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    batch = prompt((TEXT, 8), (IMAGE, 6), (TEXT, 6))
    mask = (torch.arange(20) >= 4).long()[None]
    inputs = {**batch, **images(6), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert_same_logits(multimodal.logits(**inputs)[:, 4:], hf_multimodal(**inputs).logits[:, 4:])


def test_video(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    batch = prompt((TEXT, 2), (VIDEO, 6), (TEXT, 1), (VIDEO, 7), (TEXT, 3), (IMAGE, 4), (TEXT, 2))
    features = {
        **patches([6, 4, 3], ("pixel_values_videos", "video_position_ids"), seed=1),
        "num_frames_per_video": torch.tensor([2, 1]),
        **images(4),
    }
    assert_same_logits(multimodal.logits(**batch, **features), hf_multimodal(**batch, **features).logits)


def test_audio(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    batch = prompt((TEXT, 3), (AUDIO, 7), (TEXT, 4))
    features = {
        "input_features": randn(2, 5, AUDIO_FRAME),
        "input_features_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool),
    }
    ours = multimodal.logits(**batch, **features)
    assert_same_logits(ours, hf_multimodal(**batch, **features).logits)
    assert_different_logits(ours, multimodal.logits(**batch))


def test_embeddings_of_placeholders_are_replaced_too(hf_multimodal: Any, multimodal: ReferenceModel) -> None:
    batch, features = PROMPTS["a short image"]
    embeds = multimodal.embed(batch["input_ids"])
    inputs = {"inputs_embeds": embeds, "mm_token_type_ids": batch["mm_token_type_ids"], **features}
    assert_same_logits(multimodal.logits(**inputs), hf_multimodal(**inputs).logits)


def test_placeholders_may_lie_outside_the_vocabulary() -> None:
    hf_model = multimodal_model()
    hf_model.config.image_token_id = VOCAB + 5
    model = ReferenceModel.from_transformers(hf_model)
    batch, features = PROMPTS["a short image"]
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, VOCAB + 5)
    assert_same_logits(model.logits(ids, **features), hf_model(ids, **features).logits)


def test_a_patch_with_one_known_coordinate_gets_that_half_of_its_position(
    hf_multimodal: Any, multimodal: ReferenceModel
) -> None:
    features = images(5)
    features["image_position_ids"][0, 2, 0] = -1
    batch = prompt((TEXT, 3), (IMAGE, 4), (TEXT, 2))
    hf_model: Any = hf_multimodal.model
    theirs = hf_model.embed_vision(features["pixel_values"], features["image_position_ids"]).pooler_output
    ours = multimodal.model.embed_vision(features["pixel_values"], features["image_position_ids"])  # type: ignore[union-attr,operator]
    assert_same_logits(ours, theirs)
    # transformers' stripping keeps a patch only if both coordinates are known.
    assert_same_logits(multimodal.logits(**batch, **features), hf_multimodal(**batch, **features).logits)


def test_token_types_do_nothing_without_image_blocks() -> None:
    hf_model = multimodal_model(use_bidirectional_attention=None)
    model = ReferenceModel.from_transformers(hf_model)
    batch, features = PROMPTS["a short image"]
    ours = model.logits(**batch, **features)
    assert_same_logits(ours, hf_model(**batch, **features).logits)
    assert_same_logits(ours, model.logits(batch["input_ids"], **features))


def test_multimodal_checkpoint_loads_strictly_both_ways(hf_multimodal: Any) -> None:
    model = ReferenceModel(ReferenceConfig.from_transformers(hf_multimodal.config))
    model.load_state_dict(hf_multimodal.state_dict(), strict=True)
    other = multimodal_model(seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    batch, features = PROMPTS["two images"]
    assert_same_logits(model.logits(**batch, **features), other(**batch, **features).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (images(6), "pixel_values: expected one soft token for each of the 5 tokens 390, got 6"),
        ({"image_position_ids": None}, "image_position_ids: expected"),
        ({"pixel_values": torch.zeros(1, 6, 7)}, "pixel_values: expected"),
        (
            patches([2], ("pixel_values_videos", "video_position_ids")),
            "num_frames_per_video: expected a sum of 1 frames, got None",
        ),
        ({"input_features": torch.zeros(1, 2, AUDIO_FRAME)}, r"input_features_mask: expected \(1, 2\), got None"),
        ({"mm_token_type_ids": torch.zeros(2, 12, dtype=torch.long)}, "mm_token_type_ids: expected 1 rows"),
        ({"position_ids": torch.arange(12)[None] // 2}, "position_ids: .* packed"),
    ],
)
def test_bad_multimodal_input_is_refused_by_name(
    multimodal: ReferenceModel, changes: dict[str, Any], message: str
) -> None:
    batch, features = PROMPTS["a short image"]
    with pytest.raises(ValueError, match=message):
        multimodal.logits(**{**batch, **features, **changes})
