"""Emitted tokens have the target's distribution, and these tests have teeth.

A toy model in which a token depends on the one before it: `target` (V + 1, V) are logits by the last token, row V at the
start. A block emits at least one token; what it does not emit, plain sampling adds, as the next round would.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from verification_statistics import REJECT_BELOW, TRIALS, chi_square_p, draft, histogram, trials

from gemma4_kernels import sample_tokens, verify_drafts
from gemma4_kernels.verification import eager, noise
from gemma4_kernels.verification.filters import Filters, survivors, usable

METHODS = ["match", "rejection", "block"]
SEEDS = torch.arange(TRIALS) * 7919 + 12345
FEW_SEEDS = SEEDS[:50_000]  # enough for a defect to show
FILTERED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}


def toy(vocab_size, seed=0):
    """A target, and a drafter (K = 2) that is mostly wrong."""
    rng = torch.Generator().manual_seed(seed)
    target = 1.2 * torch.randn(vocab_size + 1, vocab_size, generator=rng)
    return target, 1.5 * torch.randn(2, vocab_size, generator=rng) - 0.7 * target[:2]


def by_last_token(target):
    return lambda row, last: target[-1] if row == 0 else target[last]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """(R, V) fp64 after filters."""
    rows = len(logits)
    values = (temperature, top_k, 1 - top_p, 0.0, 0.0)
    filters = Filters(*(torch.full((rows,), x, dtype=torch.int64 if type(x) is int else torch.float32) for x in values))
    return survivors(logits, filters, usable(logits)).probabilities(logits.shape[1]).double()


def pair_p(result, target, **filters):
    """p value of the first two tokens, in pairs."""
    vocab_size = target.shape[1]
    first, second = result.tokens[:, 0], result.tokens[:, 1]
    more = sample_tokens(target[first], seeds=SEEDS + 1, positions=1, **filters)
    second = torch.where(second == -1, more, second)
    p = probabilities(target, **filters)
    joint = p[-1][:, None] * p[:-1]
    return chi_square_p(histogram(first * vocab_size + second, vocab_size**2), joint.flatten())


def single_p(result, target, **filters):
    return chi_square_p(histogram(result.tokens[:, 0], target.shape[1]), probabilities(target, **filters)[-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("vocab_size", "filters"), [(3, {}), (7, FILTERED), (16, {})])
def test_sampled_drafts_leave_the_targets_distribution(method, filters, vocab_size):
    target, drafter = toy(vocab_size)
    drafts = draft(drafter, SEEDS, **filters)
    result = trials(by_last_token(target), drafter, drafts, SEEDS, method, **filters)
    assert float(result.num_accepted.double().mean()) < 1.2  # rejections are common
    assert single_p(result, target, **filters) > 1e-3
    assert pair_p(result, target, **filters) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_argmax_drafts_leave_the_targets_distribution(method):
    target, drafter = toy(6)
    drafts = drafter.argmax(-1).expand(TRIALS, -1)
    result = trials(by_last_token(target), None, drafts, SEEDS, method, told=False)
    assert single_p(result, target) > 1e-3
    assert pair_p(result, target) > 1e-3


@pytest.mark.parametrize(("method", "count"), [("match", 1500), ("rejection", 400), ("block", 400)])
def test_heavy_tokens_and_the_tail_of_a_vocabulary_like_gemmas(method, count):
    """A few tokens with a third of the mass, far apart; the others in bins of equal mass, from common to rare."""
    vocab_size, heavy = 262144, torch.tensor([7, 70_000, 262_143])
    rng = torch.Generator().manual_seed(0)
    target, drafter = torch.randn(2, vocab_size, generator=rng)
    target[heavy] = torch.tensor([11.5, 11.0, 10.5])
    drafter[torch.tensor([7, 70_000, 5])] = torch.tensor([11.0, 12.0, 12.0])  # one where the target has next to nothing
    emitted = []
    for first in range(0, count, 100):
        seeds = torch.arange(first, min(first + 100, count))
        rows = drafter.expand(len(seeds), vocab_size)
        drafts = sample_tokens(rows, seeds=seeds, positions=0, stream="draft")[:, None]
        logits = target.expand(len(seeds), 2, vocab_size)
        told = None if method == "match" else rows[:, None]
        result = verify_drafts(logits, drafts, seeds=seeds, positions=0, method=method, draft_logits=told)
        emitted.append(result.tokens[:, 0])
    p = target.double().softmax(-1)
    rank = p.clone().index_fill(0, heavy, 0).argsort(descending=True)
    bin_of = torch.empty(vocab_size, dtype=torch.int64)
    bin_of[rank] = (p[rank].cumsum(0) / p[rank].sum() * 8).long().clamp(max=7)
    bin_of[heavy] = 8 + torch.arange(3)
    mass = torch.zeros(11, dtype=torch.float64).index_add(0, bin_of, p)
    assert chi_square_p(histogram(bin_of[torch.cat(emitted)], 11), mass) > 1e-3


def test_plain_samples_have_the_softmax():
    target, _ = toy(16)
    sampled = sample_tokens(target[-1].expand(TRIALS, -1), seeds=SEEDS, positions=3)
    assert chi_square_p(histogram(sampled, 16), probabilities(target)[-1]) > 1e-3


def test_neighbouring_positions_and_seeds_are_independent():
    target, _ = toy(5)
    logits = target[-1].expand(TRIALS, -1)
    joint = torch.outer(probabilities(target)[-1], probabilities(target)[-1]).flatten()
    first = sample_tokens(logits, seeds=torch.arange(TRIALS), positions=0)
    for seeds, positions in ((torch.arange(TRIALS), 1), (torch.arange(TRIALS) + TRIALS, 0)):
        second = sample_tokens(logits, seeds=seeds, positions=positions)
        assert chi_square_p(histogram(first * 5 + second, 25), joint) > 1e-3
    one_seed = sample_tokens(logits, seeds=1, positions=torch.arange(TRIALS))
    assert chi_square_p(histogram(one_seed[:-1] * 5 + one_seed[1:], 25), joint) > 1e-3


# Teeth: what a defect does to the p value ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_teeth_a_drafter_with_the_noise_of_the_residual(method, monkeypatch):
    target, drafter = toy(7)
    monkeypatch.setattr(noise, "RESIDUAL", noise.DRAFT)
    result = trials(by_last_token(target), drafter, draft(drafter, FEW_SEEDS), FEW_SEEDS, method)
    assert single_p(result, target) < REJECT_BELOW


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_teeth_softmax_q_for_argmax_drafts(method):
    target, drafter = toy(7)
    drafts = drafter.argmax(-1).expand(len(FEW_SEEDS), -1)
    result = trials(by_last_token(target), drafter, drafts, FEW_SEEDS, method)
    assert single_p(result, target) < REJECT_BELOW


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_teeth_the_target_instead_of_the_residual(method, monkeypatch):
    target, drafter = toy(7)
    residual = eager.Chunk.sample_residual
    monkeypatch.setattr(eager.Chunk, "sample_residual", lambda self, mass, p, row: residual(self, p, p, row))
    result = trials(by_last_token(target), drafter, draft(drafter, FEW_SEEDS), FEW_SEEDS, method)
    assert single_p(result, target) < REJECT_BELOW


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_teeth_a_drafter_that_is_not_renormalised(method, monkeypatch):
    """q as it was before filters that left 40 percent of it."""
    target, drafter = toy(7)
    q = 0.4 * probabilities(drafter).float()
    monkeypatch.setattr(eager.Chunk, "drafter", lambda self, row: q[row].expand(len(self.logits), -1))
    result = trials(by_last_token(target), drafter, draft(drafter, FEW_SEEDS), FEW_SEEDS, method)
    assert single_p(result, target) < REJECT_BELOW


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_teeth_u_is_0(method, monkeypatch):
    target, drafter = toy(7)
    monkeypatch.setattr(noise, "uniform", lambda words: torch.zeros_like(words, dtype=torch.float32))
    result = trials(by_last_token(target), drafter, draft(drafter, FEW_SEEDS), FEW_SEEDS, method)
    assert single_p(result, target) < REJECT_BELOW


def test_teeth_match_with_the_noise_of_the_next_row(monkeypatch):
    """One noise for all rows: each token alone is right, pairs are not."""
    target, drafter = toy(7)
    words = noise.words_of_all
    monkeypatch.setattr(noise, "words_of_all", lambda seeds, positions, *rest: words(seeds, positions * 0, *rest))
    drafts = draft(drafter, SEEDS + 99)
    result = trials(by_last_token(target), drafter, drafts, SEEDS, "match")
    assert single_p(result, target) > 1e-3
    assert pair_p(result, target) < REJECT_BELOW


# How many are accepted ------------------------------------------------------------------------------------------------


def expected_accepted(p, q, method, argmax=False):
    """Of targets p (K + 1, V) and drafters q (K, V) that do not look at the drafts: mean and variance."""
    k, vocab_size = q.shape
    mean = square = 0.0
    for path in itertools.product(range(vocab_size), repeat=k):
        chance = float(torch.stack([q[i, path[i]] for i in range(k)]).prod())
        if chance == 0:
            continue
        if method == "block":
            joint, keeps = [1.0], []
            for i in range(k):
                joint.append(min(1.0, joint[-1] * float(p[i, path[i]] / q[i, path[i]])))
            for i in range(1, k + 1):
                mass = float((joint[i] * p[i] - q[i]).clamp(min=0).sum()) if i < k else 0.0
                keeps.append(joint[k] if i == k else mass / (mass + 1 - joint[i]) if mass + 1 - joint[i] > 0 else 1.0)
            left = 1.0
            for i in range(k, 0, -1):
                mean, square = mean + chance * left * keeps[i - 1] * i, square + chance * left * keeps[i - 1] * i * i
                left *= 1 - keeps[i - 1]
        else:
            all_so_far = 1.0
            for i in range(1, k + 1):
                all_so_far *= min(1.0, float(p[i - 1, path[i - 1]] / q[i - 1, path[i - 1]]))
                mean, square = mean + chance * all_so_far, square + chance * all_so_far * (2 * i - 1)
    return mean, square - mean**2


def accepted(vocab_size, method, argmax):
    target, drafter = toy(vocab_size, seed=1)
    p = probabilities(target[:3])
    q = torch.nn.functional.one_hot(drafter.argmax(-1), vocab_size).double() if argmax else probabilities(drafter)
    drafts = drafter.argmax(-1).expand(TRIALS, -1) if argmax else draft(drafter, SEEDS)
    got = trials(lambda row, last: target[row], drafter, drafts, SEEDS, method, told=not argmax)
    return float(got.num_accepted.double().mean()), *expected_accepted(p, q, method)


@pytest.mark.parametrize("method", ["rejection", "block"])
@pytest.mark.parametrize(("vocab_size", "argmax"), [(3, False), (8, False), (8, True)])
def test_as_many_drafts_are_accepted_as_theory_says(method, vocab_size, argmax):
    mean, expected, variance = accepted(vocab_size, method, argmax)
    assert abs(mean - expected) < 5 * (variance / TRIALS) ** 0.5


@pytest.mark.parametrize("vocab_size", [8])
def test_match_accepts_argmax_drafts_as_often_as_rejection(vocab_size):
    mean, expected, variance = accepted(vocab_size, "match", True)
    assert abs(mean - expected) < 5 * (variance / TRIALS) ** 0.5


def test_blocks_accept_more_than_rejection():
    target, drafter = toy(8, seed=1)
    p, q = probabilities(target[:3]), probabilities(drafter)
    assert expected_accepted(p, q, "block")[0] > expected_accepted(p, q, "rejection")[0] + 0.01


def test_match_depends_on_the_seed_and_not_on_the_drafts():
    target, drafter = toy(7)
    seeds = SEEDS[:2000]
    texts = []
    for k in (0, 2):
        drafts = draft(drafter, seeds)[:, :k]
        logits = torch.stack([target[-1].expand(2000, -1), *(target[drafts[:, i]] for i in range(k))], dim=1)
        texts.append(verify_drafts(logits, drafts, seeds=seeds, positions=0).tokens[:, 0])
    assert torch.equal(*texts)
