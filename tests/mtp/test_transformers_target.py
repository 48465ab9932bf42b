"""transformers' Gemma 4 models as targets: their own greedy text, with drafts, in ragged batches, whatever the variant."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import small_models
import torch
from known_drafts import known_drafts, known_places
from small_models import random_ids
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemma4_kernels import QuantizedWeight, mtp, replace_linear
from gemma4_kernels.integrations import transformers_target
from gemma4_kernels.integrations.transformers_target import TransformersTarget
from gemma4_kernels.reference import ReferenceModel
from gemma4_kernels.reference import generate as reference_generate

WINDOW = small_models.WINDOW
NEW = 8
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2, 3 * WINDOW)


@pytest.fixture(scope="module")
def pair():
    return small_models.mtp_pair()


def variant(**overrides):
    """A model of the older family in small: `gemma4_text`, where E2B, E4B and 26B-A4B live."""
    settings = {
        "vocab_size": small_models.VOCAB, "vocab_size_per_layer_input": small_models.VOCAB, "hidden_size": 64,
        "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "global_head_dim": 64, "sliding_window": WINDOW, "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0, "eos_token_id": None,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    return small_models._ready(Gemma4ForCausalLM(Gemma4TextConfig(**{**settings, **overrides})), seed=3)


VARIANTS = {
    "per-layer embeddings and shared keys and values": {
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 3, "use_double_wide_mlp": True
    },
    "experts and K equal to V": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
}  # fmt: skip


def own_text(model, prompt):
    """What transformers' generate writes, without the prompt."""
    return model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()


def teller(texts, wrong_every):
    """A drafter that knows the texts and errs now and then."""

    def draft(context):
        known = known_drafts(context, texts, behind=5)
        return torch.where(known_places(context) % wrong_every == 0, known % 7 + 1, known)

    return draft


def prompts(*lengths):
    return [random_ids(length, seed=length).tolist() for length in lengths]


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_greedy_text_is_that_of_transformers(pair, num_drafts):
    model, assistant = pair
    asked = prompts(*LENGTHS)
    expected = [own_text(model, prompt) for prompt in asked]
    texts = [prompt + new for prompt, new in zip(asked, expected, strict=True)]
    for drafter in (assistant, teller(texts, 3), teller(texts, 1000), None):
        got = mtp.generate(model, drafter, asked, max_new_tokens=NEW, num_drafts=num_drafts, adaptive=False)
        assert got.tokens == expected


def test_padding_on_any_side_is_left_out(pair):
    model, assistant = pair
    asked = prompts(9, 4, WINDOW + 3)
    expected = mtp.generate(model, None, asked, max_new_tokens=NEW).tokens
    longest = max(map(len, asked))
    for left in (True, False):
        ids, mask = torch.full((3, longest + 2), 7), torch.zeros(3, longest + 2)
        for b, prompt in enumerate(asked):
            place = slice(longest + 2 - len(prompt), None) if left else slice(0, len(prompt))
            ids[b, place], mask[b, place] = torch.tensor(prompt), 1
        got = mtp.generate(model, assistant, ids, attention_mask=mask, max_new_tokens=NEW)
        assert got.tokens == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_other_members_of_the_family(name):
    model = variant(**VARIANTS[name])
    asked = prompts(*LENGTHS)
    expected = [own_text(model, prompt) for prompt in asked]
    texts = [prompt + new for prompt, new in zip(asked, expected, strict=True)]
    got = mtp.generate(model, teller(texts, 4), asked, max_new_tokens=NEW, num_drafts=3)
    assert got.tokens == expected
    assert got.statistics.target_passes < len(asked) * (NEW - 1)


@pytest.mark.parametrize("values_only", [True, False])
def test_a_pass_over_drafts_gives_the_logits_of_a_pass_over_everything(pair, values_only):
    model, _ = pair
    target = TransformersTarget(model, values_only=values_only)
    lengths = [WINDOW + 4, 3]
    text = random_ids(2, 60, seed=4)
    read = target.prefill(text[:, : max(lengths)], lengths, max_positions=80, tentative_rows=4, inputs={})
    for turn in range(8):
        for b, length in enumerate(lengths):
            whole = model(text[b : b + 1, :length]).logits[0, -read.logits.shape[1] :]
            capped = target.softcap * torch.tanh(read.logits[b] / target.softcap)
            small_models.assert_same_logits(capped, whole)
        committed = [length - (read.logits.shape[1] if turn else 0) for length in lengths]
        if turn:
            kept = torch.tensor([turn % 4 + 1, 1])
            target.commit(kept)
            committed = [length + int(n) for length, n in zip(committed, kept, strict=True)]
        rows = torch.stack([text[b, length : length + 4] for b, length in enumerate(committed)])
        read = target.step(rows)
        lengths = [length + 4 for length in committed]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_values_of_8_bits_keep_drafts_without_loss(pair, kind):
    model, assistant = pair
    asked = prompts(*LENGTHS)
    plain = mtp.generate(TransformersTarget(model, values_dtype=kind), None, asked, max_new_tokens=NEW).tokens
    texts = [prompt + new for prompt, new in zip(asked, plain, strict=True)]
    for drafter in (assistant, teller(texts, 3)):
        target = TransformersTarget(model, values_dtype=kind)
        assert mtp.generate(target, drafter, asked, max_new_tokens=NEW, num_drafts=3).tokens == plain
    with pytest.raises(ValueError, match="values_dtype must be None without values_only"):
        TransformersTarget(model, values_only=False, values_dtype=kind)


@pytest.mark.parametrize("chunk", [1, 5, WINDOW - 1, WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("name", [None, *VARIANTS])
def test_prompts_read_in_chunks_are_read_the_same(pair, chunk, name):
    model = pair[0] if name is None else variant(**VARIANTS[name])
    asked = prompts(*LENGTHS)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in asked], batch_first=True)
    options = {"max_positions": 60, "tentative_rows": 3, "inputs": {}}
    whole, chunked = (TransformersTarget(model, prefill_chunk=size) for size in (1000, chunk))
    with torch.no_grad():
        for one, other in zip(
            whole.prefill(tokens, list(LENGTHS), **options),
            chunked.prefill(tokens, list(LENGTHS), **options),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for seed in range(3):
            new = random_ids(len(asked), 3, seed=seed)
            one, other = whole.step(new), chunked.step(new)
            torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)
            for target in (whole, chunked):
                target.commit(torch.tensor([1, 3, 2, 1, 3]))


def test_images_follow_the_models_own_rule():
    """A block of an image looks both ways on sliding layers, within the window: "window" in the reference."""
    model = small_models.multimodal_model()
    ids = random_ids(1, WINDOW + 14, seed=6)
    is_image = torch.zeros(ids.shape, dtype=torch.bool)
    is_image[:, WINDOW - 3 : WINDOW + 5] = True
    ids[is_image] = small_models.IMAGE_TOKEN
    inputs = {
        "mm_token_type_ids": is_image.long(),
        "pixel_values": small_models.randn(1, 8, small_models.PATCH_VALUES, seed=6),
        "image_position_ids": torch.stack((torch.arange(8) % 4, torch.arange(8) // 4), dim=-1)[None],
    }
    oracle = ReferenceModel.from_transformers(model, torch.float64)
    expected = reference_generate(oracle, ids, max_new_tokens=NEW, **inputs)[0, ids.shape[1] :].tolist()
    texts = [ids[0].tolist() + expected]
    for padding in (0, 3):
        moved = {"mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (padding, 0))}
        got = mtp.generate(
            model, teller(texts, 3), torch.nn.functional.pad(ids, (padding, 0), value=9),
            attention_mask=torch.nn.functional.pad(torch.ones_like(ids), (padding, 0)), max_new_tokens=NEW, num_drafts=2,
            **{**inputs, **moved},
        )  # fmt: skip
        assert got.tokens[0] == expected
    blind = mtp.generate(model, None, ids, max_new_tokens=NEW, **{**inputs, "mm_token_type_ids": is_image.long() * 0})
    assert blind.tokens[0] != expected  # the case does tell whether blocks are seen


def test_blocks_are_those_of_images_and_videos():
    target = TransformersTarget(small_models.multimodal_model())
    for types, blocks in (
        ([0, 1, 1, 2, 2, 0, 3, 3, 0, 1], [-1, 0, 0, 0, 0, -1, -1, -1, -1, 1]),
        ([3, 1, 1, 3, 2], [-1, 0, 0, -1, 1]),
    ):
        assert target._block_ids(torch.tensor([types])).tolist() == [blocks]


def test_blocks_are_seen_on_sliding_layers_only(monkeypatch):
    seen, real = [], transformers_target.flash_attn_func

    def spy(*args, **kwargs):
        seen.append((kwargs["window_size"], kwargs["block_ids"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers_target, "flash_attn_func", spy)
    ids = random_ids(1, 5)
    mtp.generate(
        small_models.multimodal_model(), None, ids, max_new_tokens=1, mm_token_type_ids=torch.tensor([[0, 1, 1, 0, 0]])
    )
    assert {window for window, _ in seen} == {(-1, -1), (WINDOW - 1, 0)}
    assert all((blocks is None) == (window == (-1, -1)) for window, blocks in seen)


def test_misspelt_arguments_are_refused(pair):
    with pytest.raises(
        TypeError, match="generate: max_new_token must be an argument of generate or an input of Gemma4Unified"
    ):
        mtp.generate(pair[0], None, prompts(4), max_new_token=3)
    for name in ("attention_masks", "past_key_values", "inputs_embeds"):
        with pytest.raises(TypeError, match=f"generate: {name} must be"):
            mtp.generate(
                small_models.multimodal_model(), None, random_ids(1, 4), max_new_tokens=3, **{name: torch.ones(1)}
            )


def test_a_request_must_fit_into_a_pass(pair):
    target = TransformersTarget(pair[0], max_rows=4)
    assert mtp.generate(target, pair[1], prompts(4, 5), max_new_tokens=6, num_drafts=3).finish_reasons == ["length"] * 2
    with pytest.raises(
        ValueError, match="max_rows must be at least the 5 rows of a request, its drafts and one, got 4"
    ):
        mtp.generate(target, pair[1], prompts(4, 5), max_new_tokens=6, num_drafts=4)


def test_passes_are_no_larger_than_asked_for(pair, monkeypatch):
    target, sizes = TransformersTarget(pair[0], max_rows=6), []
    monkeypatch.setattr(
        target, "_forward", lambda tokens, *rest: sizes.append(tuple(tokens.shape)) or real(tokens, *rest)
    )
    real = TransformersTarget._forward.__get__(target)
    asked = prompts(4, 9, 2, 6)
    got = mtp.generate(target, pair[1], asked, max_new_tokens=6, num_drafts=2, adaptive=False)
    assert got.tokens == mtp.generate(pair[0], None, asked, max_new_tokens=6).tokens
    assert sizes[:4] == [(1, 4), (1, 9), (1, 2), (1, 6)]
    assert all(batch * rows <= 6 for batch, rows in sizes[4:])


def test_a_target_used_again_does_not_hold_two_caches(pair, monkeypatch):
    target, alive = TransformersTarget(pair[0]), []
    real = transformers_target.SpeculativeCache

    def spy(*args, **kwargs):
        assert target.cache is None
        alive.append(real(*args, **kwargs))
        return alive[-1]

    monkeypatch.setattr(transformers_target, "SpeculativeCache", spy)
    texts = [mtp.generate(target, pair[1], prompts(4, 9), max_new_tokens=4).tokens for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(alive) == 2


def test_quantised_layers_are_used_as_they_are(pair):
    model, _ = small_models.mtp_pair(seed=8)
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    weights = {name: QuantizedWeight.quantize(model.get_submodule(name).weight, "Q8_0") for name in names}
    replace_linear(model, weights)
    asked = prompts(5, WINDOW + 2)
    assert mtp.generate(model, None, asked, max_new_tokens=NEW).tokens == [own_text(model, prompt) for prompt in asked]


def test_bf16_text_on_quantised_layers_is_that_of_plain_decoding():
    """Bit for bit the same logits, so that not even ties are decided otherwise: alone or in a batch, with drafts or without."""
    model, _ = small_models.mtp_pair(seed=0)
    model = model.bfloat16()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    replace_linear(model, {name: QuantizedWeight.quantize(model.get_submodule(name).weight, "Q8_0") for name in names})
    target = TransformersTarget(model, max_rows=16)
    asked = prompts(*range(3, 15))
    plain = [mtp.generate(target, None, [prompt], max_new_tokens=18).tokens[0] for prompt in asked]
    for size in (1, 4, 12):
        for start in range(0, len(asked), size):
            texts = [prompt + new for prompt, new in zip(asked[start : start + size], plain[start:], strict=False)]
            got = mtp.generate(target, teller(texts, 5), asked[start : start + size], max_new_tokens=18, num_drafts=4)
            assert got.tokens == plain[start : start + size]
    # The case is one where roundings matter: larger passes round otherwise, and some text is another.
    texts = [prompt + new for prompt, new in zip(asked, plain, strict=True)]
    assert mtp.generate(model, teller(texts, 5), asked, max_new_tokens=18, num_drafts=4).tokens != plain


def test_the_model_is_left_as_it_was(pair):
    model, assistant = pair
    before = model.config._attn_implementation
    mtp.generate(model, assistant, prompts(4), max_new_tokens=3)
    assert model.config._attn_implementation == before

    def fails(context):
        raise RuntimeError("no drafts today")

    with pytest.raises(RuntimeError, match="no drafts today"):
        mtp.generate(model, fails, prompts(4), max_new_tokens=3)
    assert model.config._attn_implementation == before


def test_the_assistants_number_of_drafts_is_read(pair):
    model, assistant = pair
    assistant.generation_config.num_assistant_tokens = 6
    got = mtp.generate(model, assistant, prompts(4), max_new_tokens=12, adaptive=False)
    assert len(got.statistics.offered) == 6


def test_other_models_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(
        ValueError, match="TransformersTarget: model must be a Gemma 4 model of transformers, got Llama"
    ):
        mtp.generate(LlamaForCausalLM(config), None, [[1]])
    with pytest.raises(TypeError, match="generate: model must be a model of transformers or a Target, got str"):
        mtp.generate("gemma", None, [[1]])
