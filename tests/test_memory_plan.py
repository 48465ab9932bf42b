"""The memory plan is the arithmetic that it says: by hand for a small model and for the 12B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_weights import random_weight

from gemma4_kernels import QuantizedWeight
from gemma4_kernels.linear.schemes import SCHEMES
from gemma4_kernels.memory_plan import (
    FORMS,
    GIB,
    CacheLayer,
    Model,
    Setting,
    Weight,
    longest_context,
    model_of_geometry,
    plan,
    quantized_bytes,
    total,
)
from gemma4_kernels.mtp.cache import FULL_PAGE, CachedLayer, SpeculativeCache

SMALL = Model(
    "small", (Weight("a", "Q4_0", (4, 64), 144), Weight("n", "F32", (64,), 256)),
    (CacheLayer("sliding", 2, 8), CacheLayer("full", 1, 16, True)), window=32, num_heads=2, vocab_size=100,
    hidden_size=64, intermediate_size=128, max_context=1000,
)  # fmt: skip
SETTING = Setting(100, batch=2, chunk=20, reserve=1000, multiprocessors=4)


def lines(model: Model, setting: Setting, drafter: Model | None = None) -> dict[str, int]:
    return {f"{item.part}: {item.name}": item.nbytes for item in plan(model, setting, drafter)}


def test_a_small_model_by_hand():
    assert lines(SMALL, SETTING) == {
        "weights: F32": 256,
        "weights: Q4_0": 144,
        # 100 positions are 2 pages of 64; 2 x 128 rows of 16 numbers of 2 bytes, and a table of 2 x 2 pages.
        "cache: 1 full layers": 2 * 128 * 16 * 2 + 2 * 2 * 4,
        # 32 + 20 rows are 4 pages of 16; keys and values of 2 x 8 numbers, and a table of 2 x 7 pages.
        "cache: 1 sliding layers": 2 * 2 * 64 * 2 * 8 * 2 + 2 * 7 * 4,
        # 2 requests x 2 heads x 16 rows x (4 + 3) parts x (16 + 1) numbers.
        "workspace: attention partials": 2 * 2 * 16 * 7 * 17 * 4,
        "workspace: pieces of products": 4 * 4 * 64 * 16 * 4,
        "workspace: logits": 2 * 16 * 100 * 6,
        "workspace: rows of a pass": (4 * 64 + 2 * 2 * 16 + 2 * 16 + 3 * 128) * 2 * 16 * 2,
        "workspace: one weight in 16 bits": 4 * 64 * 2,
        "reserve: everything else": 1000,
    }


@pytest.mark.parametrize(("form", "row"), [("bf16", 32), ("fp8", 16), ("int8", 16 + 4), ("both", 64)])
def test_the_forms_of_a_full_layer_by_hand(form, row):
    found = lines(SMALL, replace(SETTING, form=form))["cache: 1 full layers"]
    assert found == 2 * 128 * row + 2 * 2 * 4 + (4 if form == "fp8" else 0)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("both", None), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn), ("int8", torch.int8)],
)
def test_caches_are_those_that_generation_allocates(form, dtype):
    norm = None if form == "both" else torch.ones(16)  # keys follow from values
    inv_freq = None if form == "both" else torch.ones(8)
    layers = {0: CachedLayer("sliding", 2, 8, 32), 1: CachedLayer("full", 1, 16, None, norm, inv_freq)}
    cache = SpeculativeCache(
        layers, batch=2, max_positions=100, tentative_rows=20, dtype=torch.bfloat16, device="cpu", values_dtype=dtype
    )
    found = lines(SMALL, replace(SETTING, form=form))
    tables = 2 * 2 * 4 + 2 * 7 * 4
    assert found["cache: 1 full layers"] + found["cache: 1 sliding layers"] - tables == cache.nbytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_a_scheme_are_those_of_its_weights(scheme):
    weight: QuantizedWeight = random_weight(scheme, (3, 512))
    scales = {name: tensor for name, tensor in weight.tensors().items() if name in ("scales", "offsets")}
    wide = sum(tensor.numel() * (tensor.itemsize - 2) for tensor in scales.values() if tensor.itemsize == 4)
    allowed = SCHEMES[scheme].scale_dtypes
    assert quantized_bytes(scheme, (3, 512), weight.group_size) == weight.nbytes - (wide if len(allowed) > 1 else 0)


def test_the_12b_in_4_bits_by_hand():
    """The project's promise: 262144 tokens on a card of 12 GiB, from a cache of values alone and not with keys."""
    mlp = 3 * 15360 * 3840
    sliding = 2 * 4096 * 3840 + 2 * 2048 * 3840 + mlp
    full = 2 * 8192 * 3840 + 512 * 3840 + mlp
    model = model_of_geometry("12B:Q4_0+Q6_K head")
    alone = lines(model, Setting(262144, multiprocessors=28))
    assert alone["weights: Q4_0"] == (40 * sliding + 8 * full) * 18 // 32
    assert alone["weights: Q6_K"] == 262144 * 3840 * 210 // 256
    assert alone["cache: 8 full layers"] == 2 * GIB + 4 * 262144 // FULL_PAGE
    both = lines(model, Setting(262144, form="both", multiprocessors=28))
    assert both["cache: 8 full layers"] == 4 * GIB + 4 * 262144 // FULL_PAGE
    assert sum(alone.values()) < 12 * GIB < sum(both.values())


def test_the_drafter_adds_its_weights_and_no_cache():
    model, drafter = model_of_geometry("12B:Q4_0"), model_of_geometry("12B-DRAFTER:Q4_0")
    with_it = lines(model, Setting(4096), drafter)
    assert {name for name in with_it if name not in lines(model, Setting(4096))} == {"drafter: Q4_0", "drafter: F32"}
    mlp = 3 * 8192 * 1024
    matrices = 3 * (2 * 4096 * 1024 + mlp) + 2 * 8192 * 1024 + mlp + 262144 * 1024 + 1024 * 7680 + 3840 * 1024
    assert with_it["drafter: Q4_0"] == matrices * 18 // 32


@pytest.mark.parametrize("form", FORMS)
def test_the_longest_context_fits_and_a_page_more_does_not(form):
    setting = replace(SETTING, form=form)
    least = total(plan(SMALL, replace(setting, context=1)))
    lengths = []
    for memory in range(least - 1, least + 160_000, 3777):
        longest = longest_context(SMALL, setting, memory)
        lengths.append(longest)
        if longest:
            assert total(plan(SMALL, replace(setting, context=longest))) <= memory
        if longest < SMALL.max_context:
            more = min(longest + FULL_PAGE, SMALL.max_context)
            assert total(plan(SMALL, replace(setting, context=more))) > memory
    assert lengths[0] == 0
    assert lengths[-1] == SMALL.max_context
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_what_no_model_can_have_is_refused():
    keyed = replace(SMALL, layers=(CacheLayer("sliding", 2, 8), CacheLayer("full", 1, 16)))
    for model, wrong, said in (
        (SMALL, {"context": 1001}, "at most 1000"), (SMALL, {"context": 0}, "context"), (SMALL, {"batch": 0}, "batch"),
        (SMALL, {"form": "int4"}, "cache must be one of"), (SMALL, {"reserve": -1}, "reserve"),
        (keyed, {"form": "bf16"}, "their own values"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=said):
            plan(model, replace(SETTING, **wrong))
    for text in ("12B:Q9", "12B:Q4_0+Q6_K", "12B:", "12B:Q4_0 head", "7B:Q4_0"):
        with pytest.raises(ValueError, match="plan: "):
            model_of_geometry(text)
