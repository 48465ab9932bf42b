"""The filters keep the tokens that transformers' warpers keep, and give them their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process

from gemma4_kernels.verification import filters as module
from gemma4_kernels.verification.filters import Filters, survivors, usable

SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100000},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"top_p": 0.0},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.3, "top_k": 7, "top_p": 0.5, "min_p": 0.3},
    {"top_k": 64, "top_p": 0.95},
]


def made(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, softcap=0.0) -> Filters:
    values = (temperature, top_k, 1 - top_p, min_p, softcap)
    return Filters(*(torch.full((rows,), x, dtype=torch.int64 if type(x) is int else torch.float32) for x in values))


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    scores = logits_process.TemperatureLogitsWarper(float(temperature))(None, logits.float())
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = logits_process.MinPLogitsWarper(min_p)(None, scores)
    return scores


def ours(logits, **settings):
    """(R, V) bool who survives, and probabilities."""
    left = survivors(logits, made(len(logits), **settings), usable(logits))
    alive = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, left.ids, left.alive)
    return alive, left.probabilities(logits.shape[-1])


def assert_as_transformers(logits, settings):
    theirs = warped(logits, **settings)
    alive, probabilities = ours(logits, **settings)
    expected = theirs.double().softmax(-1)
    if not torch.equal(alive, theirs > -torch.inf):
        # Their sort is not stable: which of the tokens that tie at top-p's threshold stay is chance. How many is not.
        assert settings.get("top_p", 1) < 1
        kept = logits.float().masked_fill(~alive, -torch.inf).sort(-1).values
        assert torch.equal(kept, logits.float().masked_fill(theirs == -torch.inf, -torch.inf).sort(-1).values)
        probabilities, expected = probabilities.sort(-1).values, expected.sort(-1).values
    assert float((probabilities - expected).abs().max()) < 1e-6


def one_finite(rows, vocab_size):
    logits = torch.full((rows, vocab_size), -torch.inf)
    logits[torch.arange(rows), torch.arange(rows) * 7 % vocab_size] = 3.0
    return logits


def shapes_of_logits():
    rng = torch.Generator().manual_seed(0)
    random = 3 * torch.randn(20, 101, generator=rng)
    yield "random", random
    yield "ties", random.round()
    yield "bf16", random.bfloat16()
    yield "all equal", torch.full((4, 64), 1.25)
    yield "one finite", one_finite(5, 33)
    yield "many -inf", random.masked_fill(torch.rand(20, 101, generator=rng) < 0.9, -torch.inf)
    yield "far apart", random * 1000
    yield "one token", random[:, :1]
    yield "two levels", torch.where(torch.rand(9, 80, generator=rng) < 0.1, 2.0, -1.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("name", "logits"), list(shapes_of_logits()), ids=lambda x: x if isinstance(x, str) else "")
def test_support_and_probabilities_are_those_of_transformers(name, logits, settings):
    assert_as_transformers(logits, settings)


@pytest.mark.parametrize("keep", range(1, 8))
def test_top_p_at_a_boundary_that_binary_holds(keep):
    """Eight equal tokens, top_p a multiple of 1/8: the threshold is met exactly, and the ones with the lowest ids go."""
    alive, _ = ours(torch.zeros(1, 8), top_p=keep / 8)
    assert alive[0].tolist() == [False] * (8 - keep) + [True] * keep
    assert_as_transformers(torch.zeros(1, 8), {"top_p": keep / 8})


@pytest.mark.parametrize("keep", range(1, 10))
def test_top_p_at_a_boundary_that_binary_does_not_hold(keep):
    """Of ten equal tokens, top_p 0.3 keeps three. Sums in fp32, as in transformers, keep one more for some tenths."""
    alive, _ = ours(torch.zeros(1, 10), top_p=keep / 10)
    assert int(alive.sum()) == keep
    assert int((warped(torch.zeros(1, 10), top_p=keep / 10) > -torch.inf).sum()) in (keep, keep + 1)


def test_all_that_tie_with_the_kth_stay():
    alive, _ = ours(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 2.0]]), top_k=2)
    assert alive[0].tolist() == [True, False, True, True, False, True]


OUR_OWN = [
    {"min_p": 1e-40},
    {"softcap": 2.0, "temperature": 0.8, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "softcap": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS + OUR_OWN, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "ties", "flat", "peaked"])
@pytest.mark.parametrize("vocab_size", [5000, 2 * module.PIECE + 37])
def test_candidates_change_nothing(settings, kind, vocab_size, monkeypatch):
    """On a CPU, rows of large vocabularies are cut down to candidates first. The result has the same bits."""
    logits = 2 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1))
    logits = {"gaussian": logits, "ties": logits.round(), "flat": logits / 1000, "peaked": logits.abs() * 5}[kind]
    assert_same(ours(logits, **settings), lambda: ours(logits, **settings), monkeypatch)


def assert_same(fast, slow, monkeypatch):
    monkeypatch.setattr(module, "_LARGE_VOCABULARY", math.inf)
    for a, b in zip(fast, slow(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{"top_k": 64, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_a_vocabulary_like_gemmas(settings):
    logits = 2.5 * torch.randn(1, 262144, generator=torch.Generator().manual_seed(3))
    theirs = warped(logits, **settings)
    alive, probabilities = ours(logits, **settings)
    # fp32 sums of a quarter of a million terms are off by more than a token at the threshold weighs.
    assert int((alive ^ (theirs > -torch.inf)).sum()) <= (0 if "top_p" not in settings or "top_k" in settings else 200)
    assert float((probabilities - theirs.double().softmax(-1)).abs().max()) < 1e-6


def test_greedy_keeps_the_first_maximum():
    alive, probabilities = ours(torch.tensor([[1.0, 5.0, 5.0, 2.0]]), temperature=0.0, top_k=2, top_p=0.1)
    assert alive[0].tolist() == [False, True, False, False]
    assert probabilities[0].tolist() == [0, 1, 0, 0]


def test_softcap_comes_before_all():
    logits = 40 * torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    capped = 30 * torch.tanh(logits / 30)
    _, probabilities = ours(logits, softcap=30.0, temperature=0.8)
    assert float((probabilities - (capped.double() / 0.8).softmax(-1)).abs().max()) < 1e-5
