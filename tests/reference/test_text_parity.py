"""The text model gives transformers' logits, however the tokens are fed to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import (
    HIDDEN,
    VOCAB,
    WINDOW,
    assert_different_logits,
    assert_same_logits,
    randn,
    random_ids,
    text_model,
)
from transformers import DynamicCache

from gemma4_kernels.reference import ReferenceCache, ReferenceConfig, ReferenceModel


def test_logits_of_a_text_past_the_window(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(2, 3 * WINDOW)
    assert_same_logits(text.logits(ids), hf_text(ids).logits)


def test_softcap_is_felt_by_the_comparison(hf_text: Any) -> None:
    assert float(hf_text(random_ids(2, 3 * WINDOW)).logits.abs().max()) > 10


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 7, 5])])
def test_logits_to_keep(hf_text: Any, text: ReferenceModel, logits_to_keep: int | torch.Tensor) -> None:
    ids = random_ids(2, 9)
    ours = text.logits(ids, logits_to_keep=logits_to_keep)
    assert_same_logits(ours, hf_text(ids, logits_to_keep=logits_to_keep).logits)


def test_inputs_embeds_in_place_of_ids(hf_text: Any, text: ReferenceModel) -> None:
    embeds = randn(2, 9, HIDDEN)
    assert_same_logits(text.logits(inputs_embeds=embeds), hf_text(inputs_embeds=embeds).logits)


def test_position_ids_move_the_rotation(hf_text: Any, text: ReferenceModel) -> None:
    ids, positions = random_ids(2, 9), torch.tensor([[3, 4, 9, 10, 11, 12, 13, 90, 91]])
    ours = text.logits(ids, position_ids=positions)
    assert_same_logits(ours, hf_text(ids, position_ids=positions).logits)
    assert_different_logits(ours, text.logits(ids))


def test_prefill_in_uneven_chunks(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(2, 40)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_text.config)
    for chunk in ids.split([1, 5, 17, 2, 15], dim=1):
        assert_same_logits(
            text.logits(chunk, past_key_values=ours), hf_text(chunk, past_key_values=theirs, use_cache=True).logits
        )
    assert ours.length == 40


def test_chunks_equal_one_prefill(text: ReferenceModel) -> None:
    ids, cache = random_ids(1, 40), ReferenceCache()
    chunks = [text.logits(chunk, past_key_values=cache) for chunk in ids.split([7, 1, 20, 12], dim=1)]
    assert_same_logits(torch.cat(chunks, dim=1), text.logits(ids))


def test_decode_across_the_edge_of_the_window(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(1, WINDOW + 12)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_text.config)
    for token in ids.split([WINDOW - 3, *[1] * 15], dim=1):
        assert_same_logits(
            text.logits(token, past_key_values=ours), hf_text(token, past_key_values=theirs, use_cache=True).logits
        )


def test_several_rows_at_once_as_a_verification_has_them(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(3, 30)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_text.config)
    text.logits(ids[:, :25], past_key_values=ours)
    hf_text(ids[:, :25], past_key_values=theirs, use_cache=True)
    assert_same_logits(
        text.logits(ids[:, 25:], past_key_values=ours),
        hf_text(ids[:, 25:], past_key_values=theirs, use_cache=True).logits,
    )


def test_left_padded_batch(hf_text: Any, text: ReferenceModel) -> None:
    ids, padding = random_ids(3, 24), torch.tensor([0, 5, 17])
    mask = (torch.arange(24) >= padding[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_text.config)
    real = mask[:, :20].bool()
    prefill: dict[str, Any] = {"attention_mask": mask[:, :20], "position_ids": positions[:, :20]}
    assert_same_logits(
        text.logits(ids[:, :20], past_key_values=ours, **prefill)[real],
        hf_text(ids[:, :20], past_key_values=theirs, use_cache=True, **prefill).logits[real],
    )
    decode: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, 20:]}
    assert_same_logits(
        text.logits(ids[:, 20:], past_key_values=ours, **decode),
        hf_text(ids[:, 20:], past_key_values=theirs, use_cache=True, **decode).logits,
    )


def test_padding_leaves_the_real_tokens_alone(text: ReferenceModel) -> None:
    ids = random_ids(1, 20)
    padded = torch.cat((random_ids(1, 6, seed=1), ids), dim=1)
    mask = (torch.arange(26) >= 6).long()[None]
    logits = text.logits(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert_same_logits(logits[:, 6:], text.logits(ids))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_masks_of_the_callers_own(hf_text: Any, text: ReferenceModel, additive: bool, as_dict: bool) -> None:
    ids = random_ids(2, 10)
    visible = (randn(2, 1, 10, 10) > 0) | torch.eye(10, dtype=torch.bool)
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    ours = bias if additive else visible
    kinds = ("full_attention", "sliding_attention")
    assert_same_logits(
        text.logits(ids, attention_mask=dict.fromkeys(kinds, ours) if as_dict else ours),
        hf_text(ids, attention_mask=dict.fromkeys(kinds, bias)).logits,
    )


def test_a_missing_mask_in_the_dictionary_is_plainly_causal(hf_text: Any, text: ReferenceModel) -> None:
    # transformers' sdpa path leaves the mask out where the kernel's own causal order is enough.
    ids = random_ids(1, WINDOW - 2)
    none = {"full_attention": None, "sliding_attention": None}
    assert_same_logits(text.logits(ids, attention_mask=none), hf_text(ids).logits)


@pytest.mark.parametrize("num_shared", [2, 3])
def test_layers_that_share_keys_and_values(num_shared: int) -> None:
    hf_model = text_model(
        num_kv_shared_layers=num_shared,
        use_double_wide_mlp=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
        attention_k_eq_v=False,
        num_global_key_value_heads=None,
    )
    model = ReferenceModel.from_transformers(hf_model)
    ids = random_ids(2, 30)
    assert_same_logits(model.logits(ids), hf_model(ids).logits)
    ours, theirs = ReferenceCache(), DynamicCache(config=hf_model.config)
    for chunk in ids.split([20, 6, 1, 3], dim=1):
        assert_same_logits(
            model.logits(chunk, past_key_values=ours, logits_to_keep=1),
            hf_model(chunk, past_key_values=theirs, use_cache=True, logits_to_keep=1).logits,
        )


def test_full_layers_with_values_of_their_own() -> None:
    hf_model = text_model(attention_k_eq_v=False, num_key_value_heads=4, use_bidirectional_attention=None)
    model = ReferenceModel.from_transformers(hf_model)
    ids = random_ids(2, 20)
    assert_same_logits(model.logits(ids), hf_model(ids).logits)


def test_untied_head_without_softcap() -> None:
    hf_model = text_model(tie_word_embeddings=False, final_logit_softcapping=None)
    model = ReferenceModel.from_transformers(hf_model)
    ids = random_ids(1, 20)
    assert_same_logits(model.logits(ids), hf_model(ids).logits)


def test_bf16_checkpoint_in_float64_is_close_to_transformers_in_bf16() -> None:
    hf_model = text_model().to(torch.bfloat16)
    model = ReferenceModel.from_transformers(hf_model, dtype=torch.float64)
    ids = random_ids(1, 20)
    ours = model.logits(ids)
    assert ours.dtype == torch.float64
    # bf16 keeps 8 bits; six layers lose a few percent of the largest logit.
    assert_same_logits(ours, hf_model(ids).logits.double(), tolerance=0.1)


def test_float32_is_close_to_float64(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(1, 30)
    wide = ReferenceModel.from_transformers(hf_text, dtype=torch.float64).logits(ids)
    assert_same_logits(text.logits(ids).double(), wide)


def test_checkpoint_loads_strictly_both_ways(hf_text: Any) -> None:
    model = ReferenceModel(ReferenceConfig.from_transformers(hf_text.config))
    model.load_state_dict(hf_text.state_dict(), strict=True)
    other = text_model(seed=5)
    ids = random_ids(1, 10)
    assert_different_logits(other(ids).logits, hf_text(ids).logits)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same_logits(model.logits(ids), other(ids).logits)


def test_checkpoint_without_the_tied_head_loads(hf_text: Any) -> None:
    state = {name: tensor for name, tensor in hf_text.state_dict().items() if name != "lm_head.weight"}
    model = ReferenceModel(ReferenceConfig.from_transformers(hf_text.config))
    model.load_state_dict(state, strict=True)
    ids = random_ids(1, 10)
    assert_same_logits(model.logits(ids), hf_text(ids).logits)


def test_the_copy_does_not_share_memory_with_the_original() -> None:
    hf_model = text_model()
    model, ids = ReferenceModel.from_transformers(hf_model), random_ids(1, 10)
    before = model.logits(ids)
    hf_model.model.norm.weight.zero_()
    assert torch.equal(model.logits(ids), before)


def test_shared_keys_and_values_are_those_that_transformers_captures(hf_mtp: tuple[Any, Any]) -> None:
    target = hf_mtp[0]
    ids = random_ids(2, 3 * WINDOW)
    theirs = target(ids, return_shared_kv_states=True, output_hidden_states=True)
    ours = ReferenceModel.from_transformers(target)(ids)
    assert_same_logits(ours.hidden, theirs.hidden_states[-1])
    assert set(ours.shared_kv_states) == {"sliding_attention", "full_attention"}
    for name, keys_values in ours.shared_kv_states.items():
        for mine, captured in zip(keys_values, theirs.shared_kv_states[name], strict=True):
            assert_same_logits(mine, captured)


def test_unknown_keyword_is_refused_by_name(text: ReferenceModel) -> None:
    with pytest.raises(TypeError, match="labels"):
        text.logits(random_ids(1, 4), labels=random_ids(1, 4))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "input_ids, inputs_embeds: expected exactly one"),
        ({"inputs_embeds": torch.zeros(1, 4, HIDDEN)}, "input_ids, inputs_embeds: expected exactly one"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 3)}, "inputs_embeds: expected"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "input_ids: expected"),
        ({"input_ids": torch.full((1, 4), VOCAB)}, f"input_ids: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: expected \(1, 4\)"),
        ({"attention_mask": {"full_attention": None}}, "sliding_attention'] *: missing"),
        ({"attention_mask": torch.ones(1, 1, 4, 5)}, "attention_mask.*expected"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids: expected"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}, "position_ids: .* packed"),
        ({"logits_to_keep": -1}, "logits_to_keep: expected"),
        ({"block_rule": "both"}, "block_rule: expected"),
        ({"mm_token_type_ids": torch.ones(1, 4)}, "mm_token_type_ids: expected None"),
        ({"pixel_values": torch.ones(1, 4, 48)}, "pixel_values: expected None"),
    ],
)
def test_bad_input_is_refused_by_name(text: ReferenceModel, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.logits(**{"input_ids": random_ids(1, 4), **inputs})


def test_foreign_cache_is_refused(text: ReferenceModel) -> None:
    with pytest.raises(TypeError, match="past_key_values: expected a ReferenceCache, got DynamicCache"):
        text.logits(random_ids(1, 4), past_key_values=DynamicCache())
