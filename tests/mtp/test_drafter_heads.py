"""Heads, sampling, dtypes, quantised weights, and that a call waits for nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from mtp_helpers import Committed, committed, in_pages, pair, values_only
from small_models import HIDDEN, VOCAB, WINDOW, assert_same_logits
from torch import Tensor, nn

from gemma4_kernels import QuantizedLinear, QuantizedWeight, replace_linear, sample_tokens, verify_drafts
from gemma4_kernels.mtp.drafter import Drafter, Drafts, DraftSampling
from gemma4_kernels.mtp.heads import CentroidHead
from gemma4_kernels.mtp.rows import LayerRows, SharedRows
from gemma4_kernels.reference import ReferenceDrafter

LENGTHS = [WINDOW + 3, 5, 2 * WINDOW]
GREEDY_LOGITS = DraftSampling(temperature=0.0)


def situation(ordered_embeddings: bool = False) -> Committed:
    return committed(pair(ordered_embeddings)[0], LENGTHS, rejected=2)


def quantised(drafter: Drafter, scheme: str = "Q8_0", skip: tuple[str, ...] = ()) -> tuple[Drafter, Drafter]:
    """A drafter with quantised weights, and a dense one with the values of the codes."""
    lean, dense = copy.deepcopy(drafter), copy.deepcopy(drafter)
    weights = {}
    for name, module in drafter.named_modules():
        if isinstance(module, nn.Linear) and name not in skip:
            weight = QuantizedWeight.quantize(module.weight.detach(), scheme)
            weights[name] = weight
            dense.get_submodule(name).weight.copy_(weight.dequantize(torch.float32))
    replace_linear(lean, weights)
    return lean, dense


def assert_same_drafts(ours: Drafts, theirs: Drafts, tolerance: float = 1e-4) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.logits is not None
    assert theirs.logits is not None
    scored = theirs.logits > -torch.inf
    assert torch.equal(ours.logits > -torch.inf, scored)
    assert_same_logits(ours.logits[scored], theirs.logits[scored], tolerance)


# Sampling -----------------------------------------------------------------------------------------------------------


FILTERS: list[dict[str, Any]] = [
    {"temperature": torch.tensor([1.5, 0.0, 0.7])},
    {"top_k": 2},
    {"top_p": torch.tensor([0.1, 0.3, 0.5])},
    {"min_p": 0.9},
    {"softcap": 0.5},
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: next(iter(filters)))
@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_sampled_drafts_are_samples_of_the_logits_returned(ordered_embeddings: bool, filters: dict[str, Any]) -> None:
    now = situation(ordered_embeddings)
    seeds = torch.tensor([3, 4, 5])
    drafter = Drafter.from_model(pair(ordered_embeddings)[1])
    filters = {"temperature": 3.0, **filters}
    drafts = drafter.draft(**now.arguments, num_drafts=4, sampling=DraftSampling(**filters, seeds=seeds))
    assert drafts.logits is not None
    assert drafts.logits.shape == (3, 4, VOCAB)
    unfiltered = []
    for step in range(4):
        # The bonus token has index `length`, so the first draft has the next.
        noise: dict[str, Any] = {"seeds": seeds, "positions": now.rows.lengths.long() + 1 + step, "stream": "draft"}
        assert torch.equal(drafts.tokens[:, step], sample_tokens(drafts.logits[:, step], **filters, **noise))
        unfiltered.append(sample_tokens(drafts.logits[:, step], temperature=3.0, **noise))
    assert not torch.equal(drafts.tokens, torch.stack(unfiltered, dim=1))


def test_a_sampled_draft_is_what_the_next_step_reads() -> None:
    target, assistant = pair()
    now = situation()
    drafts = Drafter.from_model(assistant).draft(
        **now.arguments, num_drafts=3, sampling=DraftSampling(temperature=3.0, seeds=8)
    )
    assert drafts.logits is not None
    assert not torch.equal(drafts.tokens, drafts.logits.argmax(-1))
    reference = ReferenceDrafter.from_transformers(assistant)
    for request, length in enumerate(LENGTHS):
        token, hidden = now.tokens[request].view(1, 1), now.hidden[request].view(1, 1, -1)
        this = slice(request, request + 1)
        rows = {name: (k[this, :, :length], v[this, :, :length]) for name, (k, v) in now.hf_rows.items()}
        for step in range(3):
            out = reference.step(
                torch.cat((target.model.embed_tokens(token), hidden), dim=-1),
                position_ids=torch.tensor([[length]]),
                shared_kv_states=rows,
            )
            assert_same_logits(drafts.logits[this, step], out.logits[:, 0], 1e-4)
            token, hidden = drafts.tokens[this, step : step + 1], out.hidden


def test_seeds_and_positions_decide_samples() -> None:
    now = situation()
    drafter = Drafter.from_model(pair()[1])

    def sampled(**options: Any) -> Tensor:
        sampling = DraftSampling(temperature=2.0, **options)
        return drafter.draft(**now.arguments, num_drafts=4, sampling=sampling).tokens

    first = sampled(seeds=1)
    assert torch.equal(first, sampled(seeds=1, positions=now.rows.lengths + 1))
    assert not torch.equal(first, sampled(seeds=2))
    assert not torch.equal(first, sampled(seeds=1, positions=7))
    torch.manual_seed(0)
    assert not torch.equal(sampled(), sampled())


@pytest.mark.parametrize("method", ["rejection", "block"])
@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_verification_takes_the_logits(method: str, ordered_embeddings: bool) -> None:
    now = situation(ordered_embeddings)
    sampling = DraftSampling(temperature=1.2, top_k=50, seeds=5)
    drafts = Drafter.from_model(pair(ordered_embeddings)[1]).draft(**now.arguments, num_drafts=3, sampling=sampling)
    assert drafts.logits is not None
    # A target that says what the drafter says accepts everything.
    logits = torch.cat((drafts.logits, drafts.logits[:, -1:]), dim=1)
    result = verify_drafts(
        logits, drafts.tokens, temperature=1.2, top_k=50, seeds=5, positions=now.rows.lengths + 1, method=method,
        draft_logits=drafts.logits,
    )  # fmt: skip
    assert result.num_accepted.tolist() == [3, 3, 3]
    assert not result.refused.any()


# The centroid head --------------------------------------------------------------------------------------------------


def test_tokens_outside_the_chosen_clusters_are_never_drafted() -> None:
    now = situation(True)
    sampling = DraftSampling(temperature=50.0, seeds=9)  # nearly uniform
    drafts = Drafter.from_model(pair(True)[1]).draft(**now.arguments, num_drafts=8, sampling=sampling)
    assert drafts.logits is not None
    scored = drafts.logits > -torch.inf
    assert scored.sum(-1).eq(3 * VOCAB // 20).all()  # the 3 best of 20 clusters
    assert scored.gather(-1, drafts.tokens[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_the_lowest_token_is_drafted(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = CentroidHead(16, 120, 12, 5).to(dtype)
    centroids.token_ordering.copy_(torch.randperm(120, generator=generator))
    head = nn.Linear(16, 120, bias=False, dtype=dtype)
    few = torch.randn(4, 16, generator=generator).to(dtype)
    with torch.no_grad():
        head.weight.copy_(few[torch.randint(0, 4, (120,), generator=generator)])
        hidden = torch.randn(40, 16, generator=generator).to(dtype)
        logits = centroids.logits(hidden, head)
        assert (logits == logits.amax(-1, keepdim=True)).sum(-1).min() > 1
        assert torch.equal(centroids.greedy(hidden, head), logits.argmax(-1))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_the_ordering_of_tokens_may_be_of_either_integer(dtype: str) -> None:
    now = situation(True)
    drafter = Drafter.from_model(pair(True)[1])
    expected = drafter.draft(**now.arguments, num_drafts=2)
    assert drafter.masked_embedding is not None
    drafter.masked_embedding = copy.deepcopy(drafter.masked_embedding)
    drafter.masked_embedding.token_ordering = drafter.masked_embedding.token_ordering.to(getattr(torch, dtype))
    assert torch.equal(drafter.draft(**now.arguments, num_drafts=2).tokens, expected.tokens)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_embeddings", [False, True])
@pytest.mark.parametrize("position", ["bonus", "last_committed"])
def test_float64_stays_float64(ordered_embeddings: bool, position: Any) -> None:
    target, assistant = pair(ordered_embeddings)
    now = situation(ordered_embeddings).to(torch.float64)
    reference = ReferenceDrafter.from_transformers(assistant, torch.float64)
    drafter = Drafter.from_model(reference)
    options: dict[str, Any] = {"num_drafts": 4, "position": position}
    expected = reference.draft(
        now.tokens, now.hidden, now.hf_rows, now.embed, num_committed=now.rows.lengths, **options
    )
    for rows in (now.rows, values_only(now.rows, target)):
        got = drafter.draft(now.tokens, now.hidden, rows, now.embed, sampling=GREEDY_LOGITS, **options)
        assert torch.equal(got.tokens, expected.tokens)
        assert got.logits is not None
        assert got.logits.dtype == torch.float64
        scored = got.logits > -torch.inf
        # k_norm's weight and the frequencies are fp32, as in the target.
        assert_same_logits(got.logits[scored], expected.logits[scored], 1e-12 if rows is now.rows else 1e-6)


@pytest.mark.parametrize("scalar_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_as_exact_as_transformers(scalar_dtype: torch.dtype) -> None:
    assistant = copy.deepcopy(pair()[1]).bfloat16()
    for layer in assistant.model.layers:
        layer.layer_scalar = layer.layer_scalar.to(scalar_dtype)
    now = situation().to(torch.bfloat16)
    single = DraftSampling(temperature=0.0)
    ours = Drafter.from_model(assistant).draft(**now.arguments, num_drafts=1, sampling=single).logits
    exact = ReferenceDrafter.from_transformers(assistant, torch.float64).draft(
        now.tokens, now.hidden.double(), {name: (k.double(), v.double()) for name, (k, v) in now.hf_rows.items()},
        lambda ids: now.embed(ids).double(), num_drafts=1, num_committed=now.rows.lengths,
    )  # fmt: skip
    assert ours is not None
    assert ours.dtype == torch.bfloat16
    theirs = []
    for request, length in enumerate(LENGTHS):
        this = slice(request, request + 1)
        inputs = torch.cat((now.embed(now.tokens[this]), now.hidden[this]), dim=-1)[:, None]
        rows = {name: (k[this, :, :length], v[this, :, :length]) for name, (k, v) in now.hf_rows.items()}
        out = assistant(inputs_embeds=inputs, position_ids=torch.tensor([[length]]), shared_kv_states=rows)
        theirs.append(out.logits)
    errors = [float((logits.double() - exact.logits).abs().max()) for logits in (ours, torch.cat(theirs))]
    band = float(exact.logits.abs().max()) * 2.0**-8  # one rounding of the largest logit
    assert errors[0] <= 2 * errors[1] + band


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_leaves_frequencies_alone(dtype: torch.dtype) -> None:
    assistant = pair()[1]
    rotary = assistant.model.rotary_emb
    drafter = copy.deepcopy(Drafter.from_model(assistant)).to(dtype)
    assert drafter.dtype == dtype
    for kind in ("sliding", "full"):
        held = getattr(drafter.model, f"_{kind}_frequency_bits").view(torch.float32)
        assert torch.equal(held, getattr(rotary, f"{kind}_attention_inv_freq"))


def test_a_request_drafts_the_same_in_any_batch() -> None:
    now = situation()
    drafter = Drafter.from_model(pair()[1])
    together = drafter.draft(**now.arguments, num_drafts=4, sampling=GREEDY_LOGITS)
    assert together.logits is not None
    for request in range(len(LENGTHS)):
        this = slice(request, request + 1)
        layers = (
            replace(layer, keys=layer.keys[this], values=layer.values[this])
            for layer in (now.rows.sliding, now.rows.full)
            if layer.keys is not None
        )
        alone = drafter.draft(
            now.tokens[this], now.hidden[this], SharedRows(*layers, now.rows.lengths[this]), now.embed, 4,
            sampling=GREEDY_LOGITS,
        )  # fmt: skip
        assert_same_drafts(alone, Drafts(together.tokens[this], together.logits[this]))


def test_a_batch_may_be_empty() -> None:
    now = situation()
    layers = (LayerRows(layer.values[:0], layer.values[:0]) for layer in (now.rows.sliding, now.rows.full))
    rows = SharedRows(*layers, now.rows.lengths[:0])
    drafts = Drafter.from_model(pair()[1]).draft(now.tokens[:0], now.hidden[:0], rows, now.embed, 3)
    assert drafts.tokens.shape == (0, 3)


@pytest.mark.parametrize("head", ["dense", "centroids", "quantised"])
@pytest.mark.parametrize("sampling", [None, DraftSampling(seeds=1)])
def test_a_request_of_nan_drafts_tokens_all_the_same(head: str, sampling: DraftSampling | None) -> None:
    """An embedding that is asked for token -1 brings a device down. The target will refuse the request's own NaN."""
    now = situation(head == "centroids")
    drafter = Drafter.from_model(pair(head == "centroids")[1])
    if head == "quantised":
        drafter = quantised(drafter)[0]
    fine = drafter.draft(**now.arguments, num_drafts=3, sampling=sampling)
    hidden = now.hidden.clone()
    hidden[1] = torch.nan
    tokens = drafter.draft(now.tokens, hidden, now.rows, now.embed, 3, sampling=sampling).tokens
    assert tokens.min() >= 0
    assert tokens.max() < VOCAB
    assert torch.equal(tokens[[0, 2]], fine.tokens[[0, 2]])


def test_the_epsilon_of_norms_is_that_of_the_configuration() -> None:
    assistant = copy.deepcopy(pair()[1])
    assistant.config.text_config.rms_norm_eps = 0.3
    for module in assistant.modules():
        if hasattr(module, "eps"):
            module.eps = 0.3
    now = situation()
    expected = ReferenceDrafter.from_transformers(assistant).draft(
        now.tokens, now.hidden, now.hf_rows, now.embed, num_drafts=2, num_committed=now.rows.lengths
    )
    drafts = Drafter.from_model(assistant).draft(**now.arguments, num_drafts=2, sampling=GREEDY_LOGITS)
    assert_same_drafts(drafts, Drafts(expected.tokens, expected.logits))


# Quantised weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Q4_0", "W4A16", "Q8_0"])
@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_quantised_weights_draft_what_their_values_draft(scheme: str, ordered_embeddings: bool) -> None:
    now = situation(ordered_embeddings)
    lean, dense = quantised(Drafter.from_model(pair(ordered_embeddings)[1]), scheme)
    assert not [name for name, module in lean.named_modules() if isinstance(module, nn.Linear)]
    expected = dense.draft(**now.arguments, num_drafts=4, sampling=GREEDY_LOGITS)
    assert_same_drafts(lean.draft(**now.arguments, num_drafts=4, sampling=GREEDY_LOGITS), expected)
    assert torch.equal(lean.draft(**now.arguments, num_drafts=4).tokens, expected.tokens)


@pytest.mark.parametrize("left", ["model.layers.1.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head"])
def test_a_part_of_the_layers_may_stay_dense(left: str) -> None:
    now = situation()
    lean, dense = quantised(Drafter.from_model(pair()[1]), skip=(left,))
    assert isinstance(lean.get_submodule(left), nn.Linear)
    expected = dense.draft(**now.arguments, num_drafts=2, sampling=GREEDY_LOGITS)
    assert_same_drafts(lean.draft(**now.arguments, num_drafts=2, sampling=GREEDY_LOGITS), expected)


def test_greedy_drafts_from_a_quantised_head_store_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = situation()
    lean = quantised(Drafter.from_model(pair()[1]))[0]
    expected = lean.draft(**now.arguments, num_drafts=3, sampling=GREEDY_LOGITS).tokens
    forward = QuantizedLinear.forward

    def but_not_the_head(module: QuantizedLinear, x: Tensor) -> Tensor:
        assert module is not lean.lm_head
        return forward(module, x)

    monkeypatch.setattr(QuantizedLinear, "forward", but_not_the_head)
    assert torch.equal(lean.draft(**now.arguments, num_drafts=3).tokens, expected)


def test_the_feed_forward_layer_of_quantised_weights_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = situation()
    lean = quantised(Drafter.from_model(pair()[1]))[0]
    expected = lean.draft(**now.arguments, num_drafts=1).tokens
    fused = [getattr(layer.mlp, name) for layer in lean.model.layers for name in ("gate_proj", "up_proj")]
    forward = QuantizedLinear.forward

    def but_not_apart(module: QuantizedLinear, x: Tensor) -> Tensor:
        assert module not in fused
        return forward(module, x)

    monkeypatch.setattr(QuantizedLinear, "forward", but_not_apart)
    assert torch.equal(lean.draft(**now.arguments, num_drafts=1).tokens, expected)


# Nothing waits for the device ---------------------------------------------------------------------------------------


def variants(now: Committed, ordered_embeddings: bool) -> dict[str, SharedRows]:
    lean = values_only(now.rows, pair(ordered_embeddings)[0])
    return {
        "dense": now.rows,
        "pages of values": replace(lean, sliding=in_pages(now.rows.sliding, 4), full=in_pages(lean.full, 4)),
    }


CALLS = pytest.mark.parametrize(
    ("weights", "cache", "sampling"),
    [
        ("dense", "dense", None),
        ("dense", "pages of values", DraftSampling(temperature=1.1, top_k=20, seeds=3)),
        ("quantised", "pages of values", None),
        ("quantised", "dense", DraftSampling(temperature=0.7, top_p=0.8, seeds=3)),
        ("centroids", "dense", None),
        ("centroids", "pages of values", DraftSampling(seeds=3)),
        ("quantised centroids", "dense", None),
    ],
)


def made(weights: str) -> Drafter:
    drafter = Drafter.from_model(pair("centroids" in weights)[1])
    return quantised(drafter)[0] if "quantised" in weights else drafter


@CALLS
def test_a_call_compiles_as_one_graph(weights: str, cache: str, sampling: DraftSampling | None) -> None:
    now = situation("centroids" in weights)
    rows = variants(now, "centroids" in weights)[cache]
    drafter = made(weights)
    options: dict[str, Any] = {"position": "last_committed", "sliding_rows": WINDOW, "sampling": sampling}
    expected = drafter.draft(now.tokens, now.hidden, rows, now.embed, 2, **options)
    torch.compiler.reset()
    compiled = torch.compile(drafter.draft, fullgraph=True, backend="eager")
    got = compiled(now.tokens, now.hidden, rows, now.embed, 2, **options)
    assert torch.equal(got.tokens, expected.tokens)
    assert (got.logits is None) == (sampling is None)
    if got.logits is not None:
        assert torch.equal(got.logits, expected.logits)


@CALLS
def test_a_call_reads_no_value(weights: str, cache: str, sampling: DraftSampling | None) -> None:
    """Tensors of the meta device have none: reading one raises."""
    now = situation("centroids" in weights)
    rows = variants(now, "centroids" in weights)[cache]

    def layer(old: LayerRows) -> LayerRows:
        return LayerRows(*(None if x is None else x.to("meta") for x in vars(old).values()))

    drafter = copy.deepcopy(made(weights)).to("meta")
    rows = SharedRows(layer(rows.sliding), layer(rows.full), rows.lengths.to("meta"))
    drafts = drafter.draft(
        now.tokens.to("meta"), now.hidden.to("meta"), rows, lambda ids: torch.empty(len(ids), HIDDEN, device="meta"), 3,
        sampling=sampling,
    )  # fmt: skip
    assert drafts.tokens.is_meta
    assert drafts.tokens.shape == (len(LENGTHS), 3)
    assert drafts.tokens.dtype == torch.int64
    assert drafts.logits is None if sampling is None else drafts.logits.shape == (len(LENGTHS), 3, VOCAB)


def test_no_gradient_is_kept() -> None:
    now = situation()
    drafter = copy.deepcopy(Drafter.from_model(pair()[1])).requires_grad_(True)
    drafts = drafter.draft(**now.arguments, num_drafts=2, sampling=GREEDY_LOGITS)
    assert drafts.logits is not None
    assert not drafts.logits.requires_grad


# Bad input ----------------------------------------------------------------------------------------------------------


def with_layer(name: str, **changes: Any) -> Any:
    return lambda rows: {"rows": replace(rows, **{name: replace(getattr(rows, name), **changes)})}


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda _: {"num_drafts": 0}, ValueError, "Drafter.draft: num_drafts must be at least 1, got 0"),
    (lambda _: {"num_drafts": 1.5}, TypeError, "num_drafts must be a whole number"),
    (lambda _: {"position": "next"}, ValueError, "position must be one of bonus, last_committed, got 'next'"),
    (lambda _: {"tokens": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"tokens must have shape \(B\)"),
    (lambda _: {"tokens": torch.zeros(3)}, TypeError, "tokens must be int32 or int64"),
    (lambda _: {"hidden": torch.zeros(3, 8)}, ValueError, r"hidden must have shape \(3, 64\), got \(3, 8\)"),
    (lambda _: {"hidden": torch.zeros(3, HIDDEN).half()}, TypeError, "hidden must be float32, got float16"),
    (lambda _: {"sampling": {"top_k": 3}}, TypeError, "sampling must be a DraftSampling or None, got dict"),
    (
        lambda _: {"sampling": DraftSampling(seeds=1, positions=torch.tensor([4]))}, ValueError,
        r"sampling.positions must have shape \(3\), got \(1\)",
    ),
    (
        lambda _: {"sampling": DraftSampling(seeds=1, positions=torch.ones(3))}, TypeError,
        "sampling.positions must be int32 or int64, got float32",
    ),
    (lambda _: {"sampling": DraftSampling(seeds=1, positions=-1)}, ValueError, "sampling.positions must be at least 0"),
    (lambda _: {"sliding_rows": 0}, ValueError, "sliding_rows must be at least 1, got 0"),
    (lambda _: {"sliding_rows": WINDOW + 2}, ValueError, r"sliding_rows must be at most window \+ 1 = 13, got 14"),
    (lambda _: {"rows": {}}, TypeError, "rows must be a SharedRows, got dict"),
    (lambda _: {"embed": lambda ids: torch.zeros(len(ids), 8)}, ValueError, r"embed's result must have shape \(3, 64\)"),
    (lambda _: {"embed": lambda ids: torch.zeros(3, HIDDEN).double()}, TypeError, "embed's result must be float32"),
    (lambda _: {"embed": lambda ids: [0.0]}, TypeError, "embed's result must be a tensor, got list"),
    (lambda rows: {"rows": replace(rows, lengths=rows.lengths[:2])}, ValueError, r"rows.lengths must have shape \(3\)"),
    (lambda rows: {"rows": replace(rows, lengths=rows.lengths.float())}, TypeError, "rows.lengths must be int32 or"),
    (lambda rows: {"rows": replace(rows, lengths=rows.lengths.to("meta"))}, ValueError, "lengths must be on cpu"),
    (with_layer("sliding", keys=None), TypeError, "rows.sliding.keys must be a tensor, got None: only full layers"),
    (with_layer("full", keys=None), TypeError, "rows.full.k_norm_weight must be given where rows.full.keys is None"),
    (
        with_layer("full", keys=None, k_norm_weight=torch.ones(512), inv_freq=torch.ones(512)), ValueError,
        r"rows.full.inv_freq must have shape \(256\), got \(512\)",
    ),
    (
        with_layer("full", values=torch.zeros(3, 40, 1, 256)), ValueError,
        r"rows.full.values must have shape \(3, S, 1, 512\), got \(3, 40, 1, 256\)",
    ),
    (with_layer("sliding", values=torch.zeros(2, 40, 8, 256)), ValueError, r"rows.sliding.values must have shape \(3, S,"),
    (with_layer("sliding", keys=torch.zeros(3, 1, 8, 256)), ValueError, "rows.sliding.keys must have shape"),
    (with_layer("full", values=torch.zeros(3, 26, 1, 512).half()), TypeError, "rows.full.values must be float32, got"),
    (
        with_layer("full", block_table=torch.zeros(2, 4, dtype=torch.int32)), ValueError,
        r"rows.full.block_table must have shape \(3, pages of a request\), got \(2, 4\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_refused_by_name_before_anything_is_computed(
    change: Any, error: type[Exception], message: str
) -> None:
    now = situation()
    drafter = copy.deepcopy(Drafter.from_model(pair()[1]))
    drafter.pre_projection.register_forward_pre_hook(lambda *_: pytest.fail("a step has begun"))
    with pytest.raises(error, match=message):
        drafter.draft(**{**now.arguments, "num_drafts": 2, **change(now.rows)})


def test_lengths_beyond_the_rows_are_refused() -> None:
    now = situation()
    rows = replace(now.rows, lengths=now.rows.lengths + 1000)
    with pytest.raises(ValueError, match="cache_seqlens must lie in"):
        Drafter.from_model(pair()[1]).draft(now.tokens, now.hidden, rows, now.embed, 1)
