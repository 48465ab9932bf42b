"""transformers with our attention: the logits and the text of its own eager attention."""

from __future__ import annotations

import pytest
import small_models as small
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, StaticCache

from gemma4_kernels.integrations import transformers as integration

NAME = integration.register()
WINDOW = small.WINDOW


@pytest.fixture(scope="module")
def text():
    return small.text_model()


@pytest.fixture(scope="module")
def multimodal():
    return small.multimodal_model()


@pytest.fixture(scope="module")
def gemma3():
    config = Gemma3TextConfig(
        vocab_size=small.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=WINDOW, query_pre_attn_scalar=256, eos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


def both(model, call):
    """call(model) with our attention and with eager's."""
    model.set_attn_implementation(NAME)
    ours = call(model)
    model.set_attn_implementation("eager")
    return ours, call(model)


def assert_same(model, keep=slice(None), **inputs):
    ours, theirs = both(model, lambda m: m(**inputs).logits)
    small.assert_same_logits(ours[keep], theirs[keep])


def left_padded(rows: int, length: int, seed: int = 0):
    ids = small.random_ids(rows, length, seed=seed)
    attention_mask = torch.ones_like(ids)
    for row in range(rows):
        attention_mask[row, : row * length // (rows + 1)] = 0
    return ids, attention_mask


def image_inputs(*spans: tuple[int, int], length: int, padded: int = 0):
    """Text with images as blocks of placeholder tokens."""
    ids = small.random_ids(1, length)
    token_type = torch.zeros_like(ids)
    for start, stop in spans:
        ids[:, start:stop], token_type[:, start:stop] = small.IMAGE_TOKEN, 1
    patches = int(token_type.sum())
    positions = torch.stack((torch.arange(patches) % small.POSITIONS, torch.arange(patches) // small.POSITIONS), dim=-1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": token_type,
        "pixel_values": small.randn(1, patches, small.PATCH_VALUES),
        "image_position_ids": positions[None],
        "attention_mask": torch.cat((torch.zeros(1, padded), torch.ones(1, length - padded)), dim=1).long(),
    }


SPANS = [((3, 9),), ((8, 20),), ((2, 6), (6, 9)), ((5, 5 + 2 * WINDOW),), ((0, 30),)]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 50])
def test_text(text, length):
    assert_same(text, input_ids=small.random_ids(2, length))


def test_left_padded_batch(text):
    ids, attention_mask = left_padded(3, 40)
    assert_same(text, attention_mask.bool(), input_ids=ids, attention_mask=attention_mask)


def test_right_padded_batch(text):
    ids, attention_mask = left_padded(3, 40)
    attention_mask = attention_mask.flip(1)
    assert_same(text, attention_mask.bool(), input_ids=ids, attention_mask=attention_mask)


def test_holes_in_the_padding_mask(text):
    ids = small.random_ids(2, 40)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 10:13] = attention_mask[1, 30:39] = 0
    assert_same(text, attention_mask.bool(), input_ids=ids, attention_mask=attention_mask)


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("padded", [0, 2])
def test_images_as_a_bare_forward_masks_them(multimodal, spans, padded):
    inputs = image_inputs(*spans, length=40, padded=padded if spans[0][0] else 0)
    assert_same(multimodal, inputs["attention_mask"].bool(), **inputs)


@pytest.mark.parametrize("spans", SPANS)
def test_images_as_generate_masks_them(multimodal, spans):
    inputs = image_inputs(*spans, length=40)

    def call(model):
        embeds = model.get_input_embeddings()(torch.zeros(1, 40, dtype=torch.int64))
        masks = model.create_masks_for_generate(
            model.config, embeds, inputs["attention_mask"], None, None, mm_token_type_ids=inputs["mm_token_type_ids"]
        )
        return model(**{**inputs, "attention_mask": masks}).logits

    ours, theirs = both(multimodal, call)
    small.assert_same_logits(ours, theirs)


@pytest.mark.parametrize("chunks", [(40,), (7, 20, 13), (1, 1, 38), (WINDOW, WINDOW, 16)])
def test_chunked_prefill_and_decode(text, chunks):
    ids, attention_mask = left_padded(2, 52)

    def call(model):
        cache, logits, start = DynamicCache(config=model.config), [], 0
        for size in (*chunks, *[1] * 8, 4):
            stop = start + size
            logits.append(
                model(ids[:, start:stop], attention_mask=attention_mask[:, :stop], past_key_values=cache).logits
            )
            start = stop
        return torch.cat(logits, dim=1)

    ours, theirs = both(text, call)
    keep = attention_mask.bool()
    small.assert_same_logits(ours[keep], theirs[keep])


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("model", ["text", "gemma3"])
def test_generate_writes_the_same_text(request, model, cache):
    ids, attention_mask = left_padded(2, 30)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    ours, theirs = both(
        request.getfixturevalue(model), lambda m: m.generate(ids, attention_mask=attention_mask, **options)
    )
    assert torch.equal(ours, theirs)


def test_generate_about_an_image_writes_the_same_text(multimodal):
    inputs = image_inputs((5, 5 + 2 * WINDOW), length=40)
    ours, theirs = both(multimodal, lambda m: m.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=0))
    assert torch.equal(ours, theirs)


def test_static_cache_with_room(text):
    ids = small.random_ids(2, 30)

    def call(model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = [model(ids[:, :20], past_key_values=cache).logits, model(ids[:, 20:21], past_key_values=cache).logits]
        return torch.cat(logits, dim=1)

    ours, theirs = both(text, call)
    small.assert_same_logits(ours, theirs)


@pytest.mark.parametrize("length", [5, WINDOW, 30])
def test_the_drafter_reads_the_targets_cache(length):
    target, drafter = small.mtp_pair()
    ids = small.random_ids(1, length)
    output = target(ids, return_shared_kv_states=True, output_hidden_states=True)
    embedded = target.get_input_embeddings()(ids[:, -1:])
    inputs = {
        "inputs_embeds": torch.cat((embedded, output.hidden_states[-1][:, -1:]), dim=-1),
        "position_ids": torch.tensor([[length - 1]]),
        "shared_kv_states": dict(output.shared_kv_states),
    }
    for attention_mask in (None, torch.ones_like(ids), (torch.arange(length)[None] >= 2).long()):
        ours, theirs = both(drafter, lambda m, mask=attention_mask: m(**inputs, attention_mask=mask).logits)
        small.assert_same_logits(ours, theirs)


@pytest.mark.parametrize("length", [8, 40])
def test_assisted_generate_writes_the_same_text(length):
    target, drafter = small.mtp_pair()
    drafter.generation_config.num_assistant_tokens = 4
    ids = small.random_ids(1, length)
    texts = []
    for implementation in (NAME, "eager"):
        target.set_attn_implementation(implementation)
        drafter.set_attn_implementation(implementation)
        texts.append(target.generate(ids, assistant_model=drafter, max_new_tokens=20, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_images_of_different_layouts_in_one_batch(multimodal):
    """The left row starts later and holds one long image, the other two short ones."""
    first, second = image_inputs((8, 32), length=40, padded=5), image_inputs((3, 9), (20, 38), length=40)
    inputs = {name: torch.cat((first[name], second[name])) for name in first}
    assert_same(multimodal, inputs["attention_mask"].bool(), **inputs)


def test_audio(multimodal):
    ids = small.random_ids(1, 30)
    ids[:, 4:20] = small.AUDIO_TOKEN
    token_type = torch.where(ids == small.AUDIO_TOKEN, 3, 0)
    features = {
        "input_features": small.randn(1, 16, small.AUDIO_FRAME),
        "input_features_mask": torch.ones(1, 16, dtype=torch.bool),
    }
    assert_same(multimodal, input_ids=ids, mm_token_type_ids=token_type, **features)


@pytest.mark.parametrize("chunks", [(20, 1, 1), (7, 9, 4, 1), (WINDOW, WINDOW, 3)])
def test_static_cache_filled_in_chunks(text, chunks):
    ids, attention_mask = left_padded(2, sum(chunks))

    def call(model):
        cache, logits, start = StaticCache(config=model.config, max_cache_len=64), [], 0
        for size in chunks:
            stop = start + size
            output = model(ids[:, start:stop], attention_mask=attention_mask[:, :stop], past_key_values=cache)
            logits.append(output.logits)
            start = stop
        return torch.cat(logits, dim=1)

    ours, theirs = both(text, call)
    keep = attention_mask.bool()
    small.assert_same_logits(ours[keep], theirs[keep])


def test_a_compiled_model_gives_the_same_logits(text):
    text.set_attn_implementation(NAME)
    ids, attention_mask = left_padded(2, 30)
    expected = text(ids, attention_mask=attention_mask).logits
    compiled = torch.compile(text, fullgraph=True, dynamic=True, backend="aot_eager")
    small.assert_same_logits(compiled(ids, attention_mask=attention_mask).logits, expected)


def test_packed_rows_are_refused_in_a_compiled_model_too(text):
    text.set_attn_implementation(NAME)
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    position_ids = torch.cat((torch.arange(10), torch.arange(14)))[None]
    with pytest.raises(RuntimeError, match="packed into one row"):
        compiled(small.random_ids(1, 24), position_ids=position_ids, use_cache=False)


def test_a_tower_that_looks_both_ways():
    """As vision towers ask: every row sees every key that is no padding."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 16, generator=rng) for _ in range(3))
    present = torch.ones(2, 9, dtype=torch.bool)
    present[0, 6:] = False
    tower = torch.nn.Module()
    tower.is_causal = False
    for padding in (None, present):
        made = integration.mask(
            2, 9, 9, attention_mask=padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=True
        )
        out, _ = integration.attention(tower, q, k, v, made, scaling=0.3)
        visible = None if padding is None else padding[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3)
        torch.testing.assert_close(out, expected.transpose(1, 2))


def test_gemma3(gemma3):
    ids, attention_mask = left_padded(2, 50)
    assert_same(gemma3, attention_mask.bool(), input_ids=ids, attention_mask=attention_mask)


def test_gemma3_that_looks_both_ways():
    config = Gemma3TextConfig(
        vocab_size=small.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=WINDOW, use_bidirectional_attention=True,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    ids, attention_mask = left_padded(2, 50)
    assert_same(model, attention_mask.bool(), input_ids=ids, attention_mask=attention_mask, use_cache=False)


class Largest(TorchDispatchMode):
    """The largest bool tensor, and the most queries x keys that any tensor holds."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.found = max(self.found, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_no_mask_of_queries_by_keys_is_built():
    """Where eager fills a matrix of 3000 x 3000, the mask function allocates a few numbers a key."""
    length = 3000
    token = torch.arange(length)
    ids = torch.where((token > 100) & (token < 900), 0, -1)[None]

    def rule(batch, head, query, key):
        same = (ids[0][query] == ids[0][key]) & (ids[0][query] >= 0)
        return ((key <= query) | same) & (key > query - 1024)

    with Largest(length) as seen:
        made = integration.mask(
            2, length, length, mask_function=rule, attention_mask=torch.arange(length).expand(2, -1) > 7,
            allow_is_causal_skip=False, use_vmap=True,
        )  # fmt: skip
    assert made.shape == (2, 1, 1, length)
    assert seen.found < 20 * length


def test_dropout_and_dense_masks_are_refused_by_name(text):
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0.1"):
        integration.attention(torch.nn.Module(), q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match=r"a dense mask of shape \(1, 1, 3, 3\) is not supported with 3 query rows"):
        integration.attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(ValueError, match="a dense mask"):
            integration.attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 3, 3, dtype=dtype))
    with pytest.raises(ValueError, match="cu_seq_lens_q must be None, it is not supported, got Tensor"):
        integration.attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3]))
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    text.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="packed into one row"):
        text(small.random_ids(1, 7), position_ids=position_ids, use_cache=False)


def test_a_dense_mask_of_one_row_is_understood(text):
    """What users hand to a decode step."""
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 9, 16)
    visible = torch.tensor([True] * 3 + [False] * 2 + [True] * 4)[None, None, None]
    additive = torch.zeros(1, 1, 1, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=visible).transpose(1, 2)
    for mask in (visible, additive):
        out, weights = integration.attention(torch.nn.Module(), q, k, k, mask)
        torch.testing.assert_close(out, expected)
        assert weights is None
