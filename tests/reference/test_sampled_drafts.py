"""The second writing of the noise, and verification by each method in float64."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels.reference import GREEDY, KeyedNoise, Sampler, SamplingFilters, draft_by_sampling, verify_request
from gemma4_kernels.reference import noise as written_again
from gemma4_kernels.reference import verify_drafts as reference_verify_drafts
from gemma4_kernels.reference.noise import python_philox
from gemma4_kernels.verification import noise

KEYS = [(0, 0), (7, 3), (-1, 2**32 - 1), (2**63 - 1, 2**40 + 5), (-(2**63), 2**32), (-(2**62) + 12345, 2**33 + 7)]
PLAIN = SamplingFilters()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampler(filters=PLAIN, seed=5, position=11, vocab_size=9):
    return Sampler(filters, KeyedNoise(seed, position, vocab_size))


# Random123's known answers for philox4x32-10: counter, key, result.
@pytest.mark.parametrize(("counter", "key", "result"), [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])  # fmt: skip
def test_philox_gives_the_published_answers(counter, key, result):
    assert python_philox(counter, key) == result


@pytest.mark.parametrize(("seed", "position"), KEYS)
@pytest.mark.parametrize("stream", range(4))
def test_words_are_those_of_the_kernels_bit_for_bit(seed, position, stream):
    mine = KeyedNoise(seed, position, 5003)
    for row in (0, 4):
        arguments = (torch.tensor([seed]), torch.tensor([position + row]))
        assert torch.equal(mine.words(row, stream), noise.words_of_all(*arguments, 5003, stream)[0])
        some = torch.tensor([[5002, 0, 1, 2, 3, 4, 77]])
        assert torch.equal(mine.words(row, stream)[some[0]], noise.words_of(*arguments, some, stream)[0])


@pytest.mark.parametrize(("seed", "position"), KEYS)
def test_words_are_those_of_whole_numbers_in_python(seed, position):
    words = KeyedNoise(seed, position, 42).words(3, noise.DRAFT).tolist()
    for token in range(42):
        counter = (token // 4, (position + 3) % 2**32, noise.DRAFT, (position + 3) // 2**32)
        assert words[token] == python_philox(counter, (seed % 2**32, seed % 2**64 // 2**32))[token % 4]


@pytest.mark.parametrize(("seed", "position"), KEYS)
def test_what_is_made_of_words_differs_by_fp32_roundings(seed, position):
    mine = KeyedNoise(seed, position, 20000)
    words = mine.words(2, noise.RESIDUAL)
    assert float((mine.exponential(2) / noise.exponential(words) - 1).abs().max()) < 4e-7
    assert float((mine.gumbel(2, noise.RESIDUAL) - noise.gumbel(words)).abs().max()) < 2e-6
    zero = torch.zeros(1, 1, dtype=torch.int64)
    word = noise.words_of(torch.tensor([seed]), torch.tensor([position + 2]), zero, noise.ACCEPTANCE)
    assert mine.uniform(2) == float(noise.uniform(word))


def test_streams_have_the_same_numbers():
    for name in ("TARGET", "ACCEPTANCE", "RESIDUAL", "DRAFT"):
        assert getattr(written_again, name) == getattr(noise, name)


@pytest.mark.parametrize("filters", [PLAIN, SamplingFilters(0.7, 5, 0.9, 0.02), GREEDY], ids=str)
def test_match_is_the_batched_reference(filters):
    for seed in range(60):
        logits, vocab_size = 2 * randn(4, 12, seed=seed), 12
        one = sampler(filters, seed, vocab_size=vocab_size)
        drafts = [one.sample(logits[0], 0), one.sample(logits[1], 1), seed % 12]
        count = seed % 4
        expected = reference_verify_drafts(
            logits[None], torch.tensor([drafts]), torch.tensor([count]), filters=filters,
            noise=torch.stack([one.noise.gumbel(row) for row in range(4)])[None], eos_token_ids={3},
        )  # fmt: skip
        tokens, accepted = verify_request(logits, drafts[:count], one, eos_token_ids={3})
        assert expected.tokens[0].tolist() == tokens + [-1] * (4 - len(tokens))
        assert int(expected.num_accepted) == accepted


@pytest.mark.parametrize("method", ["rejection", "block"])
@pytest.mark.parametrize("filters", [PLAIN, SamplingFilters(0.8, 3)], ids=str)
def test_the_first_token_has_the_targets_distribution(method, filters):
    """Frequencies of 1000 requests, within five standard deviations."""
    logits, draft_logits, trials = 1.5 * randn(3, 5), 1.5 * randn(2, 5, seed=1), 1000
    counts = torch.zeros(5)
    for seed in range(trials):
        one = sampler(filters, seed, vocab_size=5)
        tokens, _ = verify_request(
            logits, draft_by_sampling(draft_logits, one), one, method=method, draft_logits=draft_logits
        )
        counts[tokens[0]] += 1
    p = one.scores(logits[0]).softmax(-1)
    assert bool(((counts - trials * p).abs() <= 5 * (trials * p * (1 - p)).sqrt()).all())


def accepted_by_hand(p, q, drafts, u):
    """Algorithm 2 of the paper for two drafts, with its formulas written out."""
    p1 = min(p[0][drafts[0]] / q[0][drafts[0]], 1)
    p2 = min(p1 * p[1][drafts[1]] / q[1][drafts[1]], 1)
    mass = sum(max(p1 * a - b, 0) for a, b in zip(p[1], q[1], strict=True))
    length = 0
    if u[0] <= mass / (mass + 1 - p1):
        length = 1
    if u[1] <= p2:
        length = 2
    return length


def test_blocks_are_those_of_the_paper():
    lengths = set()
    for seed in range(300):
        logits, draft_logits = randn(3, 4, seed=seed), randn(2, 4, seed=seed + 1000)
        one = sampler(seed=seed, vocab_size=4)
        drafts = draft_by_sampling(draft_logits, one)
        _, accepted = verify_request(logits, drafts, one, method="block", draft_logits=draft_logits)
        p, q = logits.softmax(-1).tolist(), draft_logits.softmax(-1).tolist()
        assert accepted == accepted_by_hand(p, q, drafts, [one.noise.uniform(0), one.noise.uniform(1)])
        lengths.add((accepted, one.noise.uniform(1) > 0.5))
    assert len(lengths) == 6


def test_rejection_keeps_a_draft_by_the_ratio_of_its_probabilities():
    for seed in range(100):
        logits, draft_logits = randn(2, 4, seed=seed), randn(1, 4, seed=seed + 1000)
        one = sampler(seed=seed, vocab_size=4)
        (draft,) = draft_by_sampling(draft_logits, one)
        tokens, accepted = verify_request(logits, [draft], one, method="rejection", draft_logits=draft_logits)
        p, q = logits[0].softmax(-1), draft_logits[0].softmax(-1)
        assert accepted == int(one.noise.uniform(0) < float(p[draft] / q[draft]))
        if not accepted:
            assert p[tokens[0]] > q[tokens[0]]


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_drafter_that_agrees_is_accepted(method):
    for seed in range(30):
        logits, one = randn(4, 6, seed=seed), sampler(seed=seed, vocab_size=6)
        drafts = draft_by_sampling(logits[:3], one)
        assert verify_request(logits, drafts, one, method=method, draft_logits=logits[:3])[1] == 3


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_greedy_drafts_and_ends_of_text(method):
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4]), 9).double()
    for drafts, eos, expected in [
        ([1, 2, 3], (), ([1, 2, 3, 4], 3)), ([1, 5, 3], (), ([1, 2], 1)), ([], (), ([1], 0)),
        ([1, 2, 3], (2,), ([1, 2], 2)), ([1, 5], (2,), ([1, 2], 1)),
    ]:  # fmt: skip
        assert verify_request(logits, drafts, sampler(GREEDY), method=method, eos_token_ids=eos) == expected


def test_margins_say_how_close_a_decision_was():
    logits = torch.tensor([[0.0, 0.0, -50.0]], dtype=torch.float64)
    one = sampler(vocab_size=3)
    gumbel = one.noise.gumbel(0)
    one.sample(logits[0], 0)
    assert one.margins == [pytest.approx(float((gumbel[0] - gumbel[1]).abs()))]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="logits: expected more than 2 rows"):
        verify_request(randn(2, 9), [0, 0], sampler())
    with pytest.raises(ValueError, match="method: expected one of"):
        verify_request(randn(2, 9), [0], sampler(), method="hope")
    with pytest.raises(ValueError, match="cap: expected"):
        Sampler(PLAIN, KeyedNoise(0, 0, 9), cap=-1.0)
