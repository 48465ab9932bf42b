"""Generation: transformers' text when greedy, and the same text with drafts as without, whatever the drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import IMAGE_TOKEN, PATCH_VALUES, VOCAB, WINDOW, randn, random_ids
from torch import Tensor

from gemma4_kernels.reference import (
    GREEDY,
    DraftContext,
    ReferenceDrafter,
    ReferenceModel,
    SamplingFilters,
    drafts_of,
    generate,
    speculative_generate,
)
from gemma4_kernels.reference.masks import BLOCK_RULES

SAMPLED = SamplingFilters(temperature=1.0, top_k=64, top_p=0.95)
NEW = 24


@pytest.fixture(scope="module")
def model(hf_mtp: tuple[Any, Any]) -> ReferenceModel:
    """The drafter's target in float64."""
    return ReferenceModel.from_transformers(hf_mtp[0], dtype=torch.float64)


@pytest.fixture(scope="module")
def wide_drafter(hf_mtp: tuple[Any, Any]) -> ReferenceDrafter:
    return ReferenceDrafter.from_transformers(hf_mtp[1], dtype=torch.float64)


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return random_ids(1, WINDOW - 2)


@pytest.fixture(scope="module")
def greedy_text(model: ReferenceModel, prompt: Tensor) -> Tensor:
    return generate(model, prompt, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def sampled_text(model: ReferenceModel, prompt: Tensor) -> Tensor:
    return generate(model, prompt, max_new_tokens=NEW, filters=SAMPLED, seed=11)


def drafts_from(text: Tensor, wrong: str) -> Any:
    """A drafter that knows the text, and errs never, always, or at every fifth token."""

    def draft(context: DraftContext) -> Tensor:
        start = len(context.tokens)
        index = torch.arange(start, min(start + context.num_drafts, text.shape[1]))
        errs = {"never": index < 0, "always": index >= 0, "sometimes": index % 5 == 3}[wrong]
        return torch.where(errs, (text[0, index] + 1) % VOCAB, text[0, index])

    return draft


def test_greedy_text_is_that_of_transformers(hf_text: Any, text: ReferenceModel) -> None:
    ids = random_ids(1, WINDOW - 4)
    theirs = hf_text.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(text, ids, max_new_tokens=NEW), theirs)
    assert len(theirs[0, -NEW:].unique()) > 5


@pytest.mark.parametrize(("cache", "block_rule"), [("static", "window"), ("dynamic", "forward")])
def test_greedy_answer_to_an_image_is_that_of_transformers(
    hf_multimodal: Any, multimodal: ReferenceModel, cache: str, block_rule: Any
) -> None:
    # transformers prepares the model's own masks for a static cache only; its default is the generic ones.
    ids, inputs = prompt_with_an_image(WINDOW + 12, slice(6, WINDOW + 8))
    theirs = hf_multimodal.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation=cache, **inputs
    )
    ours = {rule: generate(multimodal, ids, max_new_tokens=12, block_rule=rule, **inputs) for rule in BLOCK_RULES}
    assert torch.equal(ours[block_rule], theirs)
    assert not torch.equal(ours["window"], ours["forward"])


def prompt_with_an_image(length: int, image: slice) -> tuple[Tensor, dict[str, Tensor]]:
    ids = random_ids(1, length)
    ids[:, image] = IMAGE_TOKEN
    patches = image.stop - image.start
    return ids, {
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": randn(1, patches, PATCH_VALUES),
        "image_position_ids": torch.stack((torch.arange(patches), torch.arange(patches) // 3), dim=-1)[None],
    }


def test_sampling_follows_the_seed(model: ReferenceModel, prompt: Tensor, sampled_text: Tensor) -> None:
    again = generate(model, prompt, max_new_tokens=NEW, filters=SAMPLED, seed=11)
    other = generate(model, prompt, max_new_tokens=NEW, filters=SAMPLED, seed=12)
    assert torch.equal(again, sampled_text)
    assert not torch.equal(other, sampled_text)


@pytest.mark.parametrize("wrong", ["never", "always", "sometimes"])
@pytest.mark.parametrize("num_drafts", [1, 4])
@pytest.mark.parametrize("sampled", [False, True])
def test_speculative_text_is_the_plain_text(
    model: ReferenceModel,
    prompt: Tensor,
    greedy_text: Tensor,
    sampled_text: Tensor,
    wrong: str,
    num_drafts: int,
    sampled: bool,
) -> None:
    plain = sampled_text if sampled else greedy_text
    result = speculative_generate(
        model,
        drafts_from(plain, wrong),
        prompt,
        num_drafts=num_drafts,
        max_new_tokens=NEW,
        filters=SAMPLED if sampled else GREEDY,
        seed=11,
    )
    assert torch.equal(result.tokens, plain)
    offered, accepted = (sum(column) for column in zip(*result.rounds, strict=True))
    assert accepted == {"never": offered, "always": 0}.get(wrong, accepted)
    assert 1 + accepted + len(result.rounds) == NEW


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("position", ["bonus", "last_committed"])
def test_the_mtp_drafter_does_not_change_the_text(
    model: ReferenceModel,
    wide_drafter: ReferenceDrafter,
    prompt: Tensor,
    greedy_text: Tensor,
    sampled_text: Tensor,
    sampled: bool,
    position: Any,
) -> None:
    result = speculative_generate(
        model,
        drafts_of(wide_drafter, model, position=position),
        prompt,
        num_drafts=3,
        max_new_tokens=NEW,
        filters=SAMPLED if sampled else GREEDY,
        seed=11,
        values_only=True,
    )
    assert torch.equal(result.tokens, sampled_text if sampled else greedy_text)


def test_a_drafter_may_be_given_as_it_is(
    model: ReferenceModel, wide_drafter: ReferenceDrafter, prompt: Tensor, greedy_text: Tensor
) -> None:
    result = speculative_generate(model, wide_drafter, prompt, num_drafts=2, max_new_tokens=5)
    assert torch.equal(result.tokens, greedy_text[:, : prompt.shape[1] + 5])


def test_a_drafter_sees_committed_tokens_and_nothing_of_rejected_ones(
    model: ReferenceModel, prompt: Tensor, greedy_text: Tensor
) -> None:
    guess = drafts_from(greedy_text, "sometimes")
    calls = 0

    def draft(context: DraftContext) -> Tensor:
        nonlocal calls
        calls += 1
        fresh = model(context.tokens[None, :-1])
        torch.testing.assert_close(context.hidden, fresh.hidden[0, -1], rtol=1e-9, atol=1e-9)
        for name, keys_values in fresh.shared_kv_states.items():
            for seen, expected in zip(context.shared_kv_states[name], keys_values, strict=True):
                torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
        drafts: Tensor = guess(context)
        return drafts

    result = speculative_generate(model, draft, prompt, num_drafts=3, max_new_tokens=NEW)
    assert torch.equal(result.tokens, greedy_text)
    assert any(0 < accepted < offered for offered, accepted in result.rounds)
    assert calls >= 5


@pytest.mark.parametrize("index", [0, 1, 6, 7, 8, 9])
def test_both_end_at_the_same_end_of_text(
    model: ReferenceModel, prompt: Tensor, sampled_text: Tensor, index: int
) -> None:
    eos = {int(sampled_text[0, prompt.shape[1] + index])}
    plain = generate(model, prompt, max_new_tokens=NEW, filters=SAMPLED, seed=11, eos_token_ids=eos)
    result = speculative_generate(
        model,
        drafts_from(sampled_text, "never"),
        prompt,
        num_drafts=4,
        max_new_tokens=NEW,
        filters=SAMPLED,
        seed=11,
        eos_token_ids=eos,
    )
    assert torch.equal(result.tokens, plain)
    assert int(plain[0, -1]) in eos
    assert plain.shape[1] <= prompt.shape[1] + index + 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_never_more_tokens_than_asked_for(
    model: ReferenceModel, prompt: Tensor, greedy_text: Tensor, max_new_tokens: int
) -> None:
    result = speculative_generate(
        model, drafts_from(greedy_text, "never"), prompt, num_drafts=4, max_new_tokens=max_new_tokens
    )
    assert torch.equal(result.tokens, greedy_text[:, : prompt.shape[1] + max_new_tokens])


def test_an_answer_to_an_image_is_the_same_with_drafts(hf_multimodal: Any) -> None:
    model = ReferenceModel.from_transformers(hf_multimodal, dtype=torch.float64)
    ids, inputs = prompt_with_an_image(14, slice(4, 9))
    plain = generate(model, ids, max_new_tokens=10, **inputs)
    result = speculative_generate(
        model, drafts_from(plain, "sometimes"), ids, num_drafts=3, max_new_tokens=10, **inputs
    )
    assert torch.equal(result.tokens, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, r"input_ids: expected \(1, prompt\)"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"num_drafts": 0}, "num_drafts: expected at least 1"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask: expected None"),
        ({"drafter": lambda context: torch.ones(3, dtype=torch.long)}, "drafter: expected up to 2 tokens"),
    ],
)
def test_bad_generation_arguments_are_refused_by_name(
    model: ReferenceModel, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "drafter": lambda context: context.tokens[:0],
        "input_ids": random_ids(1, 4),
        "num_drafts": 2,
        "max_new_tokens": 5,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        speculative_generate(model, **arguments)
