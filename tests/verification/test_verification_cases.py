"""Every case of the list, on every backend that can serve it here, against the reference; and what others make of it."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from case_lists import assert_cases_are_their_strings
from verification_statistics import REJECT_BELOW, chi_square_p, histogram

from gemma4_kernels.bench import running, validation, verification_baselines
from gemma4_kernels.bench import verification_inputs as drawing
from gemma4_kernels.bench.cases import parse, select
from gemma4_kernels.bench.timing import Batch
from gemma4_kernels.bench.verification_cases import METHODS, verification_bench_cases, verification_cases
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.verification import eager, filters, noise, outcome

CPU = torch.device("cpu")
VOCABULARY = GEMMA4_12B.vocab_size


@pytest.mark.parametrize("case", verification_cases(), ids=str)
def test_a_case_has_the_references_tokens(case):
    (check,) = validation.check_case(case, ["eager"], CPU)
    assert check.status == "held", check.reasons


def test_a_case_is_its_string():
    assert_cases_are_their_strings((*verification_cases(), *verification_bench_cases()))


@pytest.mark.parametrize(
    "text",
    [
        "verify_drafts(b=-1)", "verify_drafts(k=-1)", "verify_drafts(v=0)", "verify_drafts(top_p=1.5)",
        "verify_drafts(temperature=nan)", "verify_drafts(method=hope)", "verify_drafts(kind=strange)",
        "verify_drafts(mixed=2)", "verify_drafts(mixed=1,top_k=5)", "verify_drafts(dtype=fp64)",
        "verify_drafts(stream=draft)", "sample_tokens(k=1)", "sample_tokens(method=block)", "sample_tokens(eos=1)",
        "sample_tokens(stream=mine)", "verify_drafts(sq=1)", "verify_drafts(k=x)",
    ],
)  # fmt: skip
def test_a_string_that_makes_no_case(text):
    with pytest.raises(ValueError, match=r"parse|invalid literal"):
        parse(text)


def test_inputs_of_a_case_are_the_same_every_time():
    case = parse("verify_drafts(b=4,v=300,method=block,mixed=1,ragged=1,strided=1)")
    first, second = case.inputs(), case.inputs()
    assert first.keys() == second.keys() >= {"logits in more", "draft_logits in more", "seeds", "top_p"}
    assert all(torch.equal(first[n].nan_to_num(), x.nan_to_num()) for n, x in second.items() if torch.is_tensor(x))
    other = parse("verify_drafts(b=4,v=301,method=block,mixed=1,ragged=1,strided=1)").inputs()
    assert not torch.equal(first["seeds"], other["seeds"])


def test_the_lists_cover_what_a_call_can_ask_for():
    cases = verification_cases()
    for field, wanted in {
        "method": set(METHODS), "kind": set(drawing.KINDS), "dtype": {"bf16", "fp16", "fp32"}, "k": set(range(9)),
        "stream": {"target", "draft"}, "mixed": {0, 1}, "ragged": {0, 1}, "eos": {0, 1}, "strided": {0, 1}, "sure": {0, 1},
        "v": {1, 2, 63, 64, 65, 2048, 5003, VOCABULARY}, "b": {0, 1},
    }.items():  # fmt: skip
        assert {getattr(case, field) for case in cases} >= wanted, field
    for method in METHODS:
        of_method = [case for case in cases if case.method == method]
        for name, unset in {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "softcap": 0}.items():
            assert any(getattr(case, name) != unset for case in of_method), (method, name)
    timed = [case for case in verification_bench_cases() if case.op == "verify_drafts" and case.method == "match"]
    assert {(case.v, case.k, case.dtype) for case in timed} == {(VOCABULARY, 4, "bf16")}
    for b in (1, 4, 16, 64):
        assert len([case for case in timed if case.b == b]) == 5
    assert {case.b for case in select(verification_bench_cases(), "bench-quick")} == {1}


@pytest.mark.parametrize("method", METHODS)
def test_cases_end_in_every_way(method):
    """After none of the drafts, after all of them, and between."""
    counts = set()
    for case in verification_cases():
        if case.method == method and case.k == 4 and case.v < 2000:
            made = case.inputs()
            counts |= set(case.reference(made)[1].tolist())
    assert counts == set(range(5))


def test_ends_of_text_are_met():
    cut = 0
    for case in verification_cases():
        if case.eos:
            made = case.inputs()
            whole, _ = drawing.expected(case, {**made, "eos_token_ids": ()})
            cut += int((whole != case.reference(made)[0]).any(-1).sum())
    assert cut >= 6


def test_requests_of_a_large_case_repeat(monkeypatch):
    monkeypatch.setattr(drawing, "LARGE", 0)
    case = parse("verify_drafts(b=7,k=2,v=50,method=rejection)")
    made = case.inputs()
    for name in ("logits", "draft_logits", "draft_tokens", "seeds", "positions"):
        assert len(made[name]) == 7
        assert torch.equal(made[name][:3], made[name][3:6])
    assert not torch.equal(made["seeds"][0], made["seeds"][1])
    tokens, accepted = case.reference(made)
    for b in range(7):
        request = drawing.request_of(case, made, b)
        emitted, count = request.outcome(case, request.sampler())
        assert tokens[b].tolist() == emitted + [-1] * (3 - len(emitted))
        assert int(accepted[b]) == count


def test_a_decision_that_hangs_on_a_rounding_is_drawn_again():
    case = parse("verify_drafts(k=0,v=2,kind=flat)")
    request = drawing.request_of(case, case.inputs(), 0)
    assert request.is_certain(case)
    gumbel = request.sampler().noise.gumbel(0)
    even = (gumbel[1] - gumbel[0]) * torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert not drawing.replace(request, logits=even).is_certain(case)
    # The largest token alone has 0.6: whether the other one stays is a rounding.
    top_p = {**request.filters, "top_p": 0.6}
    threshold = torch.tensor([[0.0, math.log(1.5)]], dtype=torch.float64)
    found = {
        drawing.replace(request, logits=threshold, filters=top_p, seed=seed).is_certain(case) for seed in range(20)
    }
    assert found == {True, False}


def test_bytes_and_operations():
    case = parse("verify_drafts(b=3,k=4,v=100)")
    assert case.input_bytes() == 3 * 5 * 100 * 2
    assert case.bytes_moved() == case.input_bytes() + 3 * 5 * 8 + 3 * 8
    assert case.operations() == 3 * 5 * 100
    assert parse("verify_drafts(b=3,k=4,v=100,method=block)").input_bytes() == 3 * 9 * 100 * 2
    assert parse("verify_drafts(b=3,k=4,v=100,method=block,sure=1)").input_bytes() == case.input_bytes()
    assert parse("sample_tokens(b=3,v=100,dtype=fp32)").bytes_moved() == 3 * 100 * 4 + 3 * 8


# Code that is wrong is found -----------------------------------------------------------------------------------------


def changed(module, name, change):
    right = getattr(module, name)
    return module, name, lambda *arguments: change(right, *arguments)


BROKEN = {
    "softcap is left out": changed(
        filters, "survivors", lambda f, x, s, u: f(x, s._replace(softcap=0 * s.softcap), u)
    ),
    "top-k keeps one more": changed(
        filters, "survivors", lambda f, x, s, u: f(x, s._replace(top_k=s.top_k + (s.top_k > 0)), u)
    ),
    "top-p keeps less": changed(filters, "_limit", lambda f, cut, total: f(cut * 1.05, total)),
    "min-p is left out": changed(filters, "survivors", lambda f, x, s, u: f(x, s._replace(min_p=0 * s.min_p), u)),
    "temperature is squared": changed(
        filters, "survivors", lambda f, x, s, u: f(x, s._replace(temperature=s.temperature**2), u)
    ),
    "filters of the neighbour": changed(
        filters, "survivors", lambda f, x, s, u: f(x, type(s)(*(column.roll(1) for column in s)), u)
    ),
    "positions of 32 bits": changed(noise, "_words", lambda f, s, p, b, n: f(s, p % 2**32, b, n)),
    "seeds of 32 bits": changed(noise, "_words", lambda f, s, p, b, n: f(s % 2**32, p, b, n)),
    "one stream for all": changed(noise, "_words", lambda f, s, p, b, n: f(s, p, b, 0)),
    "one noise for all rows": changed(eager.Chunk, "_words", lambda f, c, ids, row, n: f(c, ids, 0, n)),
    "u is too large": changed(noise, "uniform", lambda f, words: f(words) ** 0.5),
    "the target for the residual": changed(
        eager.Chunk, "sample_residual", lambda f, c, mass, p, row: f(c, p, p, row)
    ),
    "ends of text are ignored": changed(eager, "outcome", lambda f, *rest: outcome.outcome(*rest[:4], ())),
    "num_drafts is ignored": changed(eager.Chunk, "is_draft", lambda f, c, row: f(c, row) | (row < c.drafts.shape[1])),
    "the last of equal tokens": changed(filters, "first_largest", lambda f, x, ids: -f(x, -ids)),
}  # fmt: skip


@pytest.mark.parametrize("defect", BROKEN)
def test_a_defect_is_noticed_by_a_quick_case(defect, monkeypatch):
    module, name, wrong = BROKEN[defect]
    for place in (module, eager):
        if hasattr(place, name):
            monkeypatch.setattr(place, name, wrong)
    quick = [case for case in select(verification_cases(), "quick") if case.v < 3000]
    assert not all(held(case) for case in quick), defect


def held(case):
    return validation.check_case(case, ["eager"], CPU)[0].status == "held"


# Baselines ----------------------------------------------------------------------------------------------------------

NEEDS_TRANSFORMERS = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
BASELINES = [
    pytest.param(name, marks=NEEDS_TRANSFORMERS) if name == "transformers" else name
    for name in verification_baselines.NAMES
]


@pytest.mark.parametrize("name", BASELINES)
def test_greedy_tokens_of_a_baseline_are_the_same(name):
    for text in ("verify_drafts(b=5,v=90,temperature=0.0)", "sample_tokens(b=5,v=90,temperature=0.0)"):
        case = parse(text)
        made = case.inputs()
        assert torch.equal(case.baselines(made)[name](), case.reference(made)[0])
        assert not case.result_depends_on_the_noise


def calls(trials, method, filters, sampler):
    """Arguments of one and the same request `trials` times, with drafts by `sampler`."""
    rng = torch.Generator().manual_seed(3)
    logits, draft_logits = 1.5 * torch.randn(2, 6, generator=rng), torch.randn(1, 6, generator=rng)
    drafts = torch.multinomial(sampler(draft_logits), trials, replacement=True)[:, None]  # (trials, 1)
    return {
        "logits": logits.expand(trials, -1, -1), "draft_tokens": drafts, "num_drafts": None, "method": method,
        "draft_logits": None if method == "match" else draft_logits.expand(trials, -1, -1), "softcap": 0.0,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "eos_token_ids": (), **filters,
    }  # fmt: skip


def probabilities(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    each = [torch.tensor([x]) for x in (temperature, top_k, 1 - top_p, min_p, 0.0)]
    return filters.survivors(logits, filters.Filters(*each), filters.usable(logits)).probabilities(logits.shape[-1])


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("method", ["match", "rejection"])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 4, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 0.7}], ids=str
)
def test_a_baseline_draws_from_the_targets_distribution(name, method, settings):
    torch.manual_seed(0)
    trials = 3000 if name == "transformers" else 100_000
    made = calls(trials, method, settings, lambda logits: probabilities(logits, **settings)[0])
    tokens = verification_baselines.verification(made)[name]()
    assert tokens.shape == (trials, 2)
    assert chi_square_p(histogram(tokens[:, 0], 6), probabilities(made["logits"][0, :1], **settings)[0]) > REJECT_BELOW
    both = tokens[:, 1] >= 0
    assert 0 < int(both.sum()) < trials
    assert torch.equal(tokens[both, 0], made["draft_tokens"][both, 0])
    second = probabilities(made["logits"][0, 1:], **settings)[0]
    assert chi_square_p(histogram(tokens[both, 1], 6), second) > REJECT_BELOW


@NEEDS_TRANSFORMERS
def test_mixed_filters_reach_the_baselines():
    case = parse("verify_drafts(b=7,v=64,mixed=1)")
    made = case.inputs()
    arguments = {**case.arguments(made), "softcap": 0.0}
    for name, ready in verification_baselines.verification(arguments).items():
        for _ in range(20):
            tokens = ready()
            for b in range(7):
                values = [arguments[n][b : b + 1] for n in ("temperature", "top_k", "top_p", "min_p")]
                each = filters.Filters(values[0], values[1], 1 - values[2], values[3], torch.zeros(1))
                row = arguments["logits"][b, :1]
                alive = filters.survivors(row, each, filters.usable(row)).probabilities(64)[0] > 0
                assert bool(alive[tokens[b, 0]]), (name, b)


def test_where_there_is_no_baseline_there_is_a_reason(monkeypatch):
    for text, reason in {
        "verify_drafts(b=2,v=9,softcap=3.0)": "softcap", "verify_drafts(b=2,v=9,ragged=1)": "fewer drafts",
        "verify_drafts(b=2,v=9,method=block)": "blocks", "verify_drafts(b=0)": "no requests",
        "verify_drafts(b=2,v=9,method=rejection,sure=1)": "without the drafter",
    }.items():  # fmt: skip
        case = parse(text)
        found = case.baselines(case.inputs())
        assert tuple(found) == verification_baselines.NAMES
        assert all(reason in why for why in found.values()), found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = parse("verify_drafts(b=2,v=9)")
    assert case.baselines(case.inputs())["transformers"] == "transformers is not installed"


class OneMillisecond:
    """Each call runs, and takes a millisecond by this clock."""

    def batches(self, calls):
        return [Batch(call, 1, "script") for call in calls]

    def time(self, batch):
        batch.run()
        return 0.001


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("text", ["verify_drafts(b=2,v=90,top_k=5)", "verify_drafts(b=2,v=90,temperature=0.0)"])
def test_a_case_is_timed_beside_its_baselines(text):
    """Sampled tokens of a baseline are others, and that is no fault of it."""
    settings = running.Settings(CPU, ("eager",), rounds=2, slice_seconds=1e-4, ceiling_scale=1 / 64)
    rows = running.run([parse(text)], settings, lambda _: None, OneMillisecond())
    assert {row["by"]: row["status"] for row in rows} == dict.fromkeys(("eager", "transformers", "softmax"), "held")
    assert all(row["median_us"] == 1000 for row in rows)
    drawn = {"random numbers" in (row["reason"] or "") for row in rows if row["kind"] == "baseline"}
    assert drawn == {"top_k" in text}
