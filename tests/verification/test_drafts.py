"""What a verification emits: the reference's tokens, ends of text, budgets, refusals, and the identity of a seed."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import sample_tokens, verify_drafts
from gemma4_kernels.reference import GREEDY, SamplingFilters
from gemma4_kernels.reference import verify_drafts as reference_verify_drafts
from gemma4_kernels.verification import eager, noise
from gemma4_kernels.verification.filters import PIECE

METHODS = ["match", "rejection", "block"]
FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"softcap": 4.0, "top_k": 64, "top_p": 0.95},
    {"temperature": 0.0},
]


def randn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drafts_like(samples, seed=0):
    """(B, K) from samples (B, K + 1): mostly right."""
    rng = torch.Generator().manual_seed(seed)
    wrong = torch.rand(samples[:, :-1].shape, generator=rng) < 0.3
    return torch.where(wrong, samples[:, :-1] + 1, samples[:, :-1])


def all_samples(logits, seeds, positions, **filters):
    rows = [
        sample_tokens(logits[:, row], seeds=seeds, positions=positions + row, **filters)
        for row in range(logits.shape[1])
    ]
    return torch.stack(rows, dim=1)


def wanting(*tokens, vocab_size=10):
    """(1, rows, V): the argmax of each row is the token given."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), vocab_size).float()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_are_those_of_the_reference_with_the_same_noise(filters):
    logits, vocab_size = randn(40, 4, 30), 30
    seeds, positions = torch.arange(40), torch.arange(40) * 3
    words = [noise.words_of_all(seeds, positions + row, vocab_size, noise.TARGET) for row in range(4)]
    gumbel = torch.stack([noise.gumbel(row) for row in words], dim=1)
    drafts = drafts_like(all_samples(logits, seeds, positions, **filters)) % vocab_size
    lengths = torch.arange(40) % 4
    softcap = filters.get("softcap", 0.0)
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = reference_verify_drafts(
        capped, drafts, lengths, filters=SamplingFilters(**{k: v for k, v in filters.items() if k != "softcap"}),
        noise=gumbel, eos_token_ids={3, 17},
    )  # fmt: skip
    got = verify_drafts(
        logits, drafts, lengths, seeds=seeds, positions=positions, eos_token_ids=(3, 17), **filters
    )  # fmt: skip
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.num_accepted, expected.num_accepted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_greedy_is_the_references(dtype):
    logits = randn(20, 5, 33).to(dtype)
    drafts = drafts_like(logits.argmax(-1)) % 33
    expected = reference_verify_drafts(logits, drafts, filters=GREEDY)
    for method in METHODS:
        got = verify_drafts(logits, drafts, temperature=0.0, method=method)
        assert torch.equal(got.tokens, expected.tokens)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 50, 5003])
def test_a_seed_gives_the_tokens_of_sampling_one_by_one(filters, vocab_size):
    logits, seeds, positions = randn(3, 5, vocab_size), torch.tensor([7, -5, 2**60]), torch.tensor([0, 9, 2**33])
    samples = all_samples(logits, seeds, positions, **filters)
    for drafts in (samples[:, :-1], drafts_like(samples) % vocab_size):
        for k in range(5):
            got = verify_drafts(logits[:, : k + 1], drafts[:, :k], seeds=seeds, positions=positions, **filters)
            for b in range(3):
                count = int(got.num_emitted[b])
                assert count == int((samples[b, :k] == drafts[b, :k]).long().cumprod(0).sum()) + 1
                assert torch.equal(got.tokens[b, :count], samples[b, :count])


@pytest.mark.parametrize("kind", ["gaussian", "ties", "flat", "peaked", "sparse", "fp64"])
@pytest.mark.parametrize("vocab_size", [2048, 5003, 2 * PIECE + 37])
@pytest.mark.parametrize("filters", [{}, {"temperature": 1.7}, {"softcap": 3.0, "temperature": 0.5}], ids=str)
def test_noise_for_the_tokens_that_can_win_finds_the_same_winner(kind, vocab_size, filters, monkeypatch):
    logits = randn(12, vocab_size)
    logits = {
        "gaussian": logits, "ties": logits.round(), "flat": 0 * logits, "peaked": logits.abs() * 6,
        "sparse": logits.masked_fill(logits < 4, -torch.inf), "fp64": logits.double(),
    }[kind]  # fmt: skip
    fast = sample_tokens(logits, seeds=torch.arange(12), positions=5, **filters)
    monkeypatch.setattr(eager, "is_large_row", lambda logits: False)
    assert torch.equal(fast, sample_tokens(logits, seeds=torch.arange(12), positions=5, **filters))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab_size", [37, 4099])
def test_tokens_do_not_depend_on_the_batch(method, vocab_size, monkeypatch):
    logits, draft_logits = randn(8, 4, vocab_size), randn(8, 3, vocab_size)
    drafts = draft_logits.argmax(-1)
    each = {
        "temperature": torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0, 1.0, 0.0, 0.5]), "top_k": torch.tensor([0, 9] * 4),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.99, 1, 1, 1, 0.8]), "min_p": torch.tensor([0, 0, 0.1, 0, 0, 0.2, 0, 0]),
        "softcap": torch.tensor([0.0, 30, 0, 3, 0, 0, 1, 0]), "seeds": torch.arange(8) - 3, "positions": torch.arange(8),
        "num_drafts": torch.tensor([3, 2, 1, 0, 3, 3, 3, 2]),
    }  # fmt: skip
    if method != "match":
        each["draft_logits"] = draft_logits

    def run(which):
        return verify_drafts(logits[which], drafts[which], method=method, **{n: x[which] for n, x in each.items()})

    whole = run(torch.arange(8))
    order = torch.tensor([5, 2, 7, 0, 6, 1, 3, 4])
    for got in run(order), *(run(torch.tensor([b])) for b in range(8)):
        which = order if len(got.tokens) == 8 else torch.tensor([0])
        if len(got.tokens) == 8:
            assert all(torch.equal(a, b[which]) for a, b in zip(got, whole, strict=True))
    for b in range(8):
        assert all(torch.equal(a[0], c[b]) for a, c in zip(run(torch.tensor([b])), whole, strict=True))
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 3 * vocab_size)
    assert all(torch.equal(a, c) for a, c in zip(run(torch.arange(8)), whole, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_distribution_that_agrees_accepts_everything(method):
    logits = randn(50, 4, 11)
    drafts = all_samples(logits[:, :3], torch.arange(50), torch.zeros(50, dtype=torch.long))
    draft_logits = None if method == "match" else logits[:, :3]
    got = verify_drafts(
        logits, drafts, method=method, draft_logits=draft_logits, seeds=torch.arange(50), positions=0
    )  # fmt: skip
    assert got.num_accepted.tolist() == [3] * 50


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_emitted_after_the_end_of_text(method):
    logits = wanting(1, 2, 3, 4).expand(4, -1, -1)
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [1, 2, 3], [9, 9, 9]])
    got = verify_drafts(logits, drafts, temperature=0.0, method=method, eos_token_ids=(2, 4))
    assert got.tokens.tolist() == [[1, 2, -1, -1], [1, 2, -1, -1], [1, 2, -1, -1], [1, -1, -1, -1]]
    assert got.num_accepted.tolist() == [2, 1, 2, 0]
    assert got.next_token.tolist() == [2, 2, 2, 1]
    assert got.num_emitted.tolist() == [2, 2, 2, 1]
    assert got.hidden_row.tolist() == [1, 1, 1, 0]
    assert got.finished.tolist() == [True, True, True, False]


def test_an_end_of_text_in_the_first_and_in_the_last_row():
    logits = wanting(1, 2, 3, 4)
    for token, emitted in ((1, [1, -1, -1, -1]), (4, [1, 2, 3, 4])):
        got = verify_drafts(logits, torch.tensor([[1, 2, 3]]), temperature=0.0, eos_token_ids=[token])
        assert got.tokens.tolist() == [emitted]
        assert got.finished.tolist() == [True]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_cuts_the_block(method):
    logits, drafts = wanting(1, 2, 3, 4).expand(6, -1, -1), torch.tensor([[1, 2, 3]] * 6)
    got = verify_drafts(
        logits, drafts, temperature=0.0, method=method, max_new_tokens=torch.arange(6), eos_token_ids=[3]
    )
    assert got.num_emitted.tolist() == [0, 1, 2, 3, 3, 3]
    assert got.num_accepted.tolist() == [0, 1, 2, 3, 3, 3]
    assert got.next_token.tolist() == [-1, 1, 2, 3, 3, 3]
    assert got.hidden_row.tolist() == [0, 0, 1, 2, 2, 2]
    assert got.finished.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "nothing"])
@pytest.mark.parametrize("vocab_size", [10, 3000])
def test_a_row_without_a_distribution_is_refused_and_no_other_request_notices(method, bad, vocab_size):
    logits = randn(5, 4, vocab_size)
    drafts, lengths = logits.argmax(-1)[:, :3], torch.tensor([3, 3, 3, 1, 3])
    arguments = {"num_drafts": lengths, "method": method, "seeds": 3, "positions": 8}
    expected = verify_drafts(logits, drafts, **arguments)
    for b, row in ((0, 0), (2, 3), (3, 2)):  # of request 3, a row behind its drafts
        if bad == "nothing":
            logits[b, row] = -torch.inf
        else:
            logits[b, row, 7] = bad
    for temperature in (1.0, torch.tensor([0.0, 1, 1, 1, 1])):
        got = verify_drafts(logits, drafts, temperature=temperature, **arguments)
        assert got.refused.tolist() == [True, False, True, False, False]
        assert got.tokens[[0, 2]].tolist() == [[-1] * 4] * 2
        assert got.num_emitted[[0, 2]].tolist() == [0, 0]
        assert got.next_token[[0, 2]].tolist() == [-1, -1]
        assert torch.equal(got.tokens[[1, 3, 4]], expected.tokens[[1, 3, 4]])
    assert sample_tokens(logits[:, 0], seeds=1, positions=0)[0] == -1


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_drafter_without_a_distribution_is_refused(method):
    logits, draft_logits = randn(2, 3, 9), randn(2, 2, 9)
    draft_logits[1, 1, 4] = torch.nan
    got = verify_drafts(logits, torch.zeros(2, 2, dtype=torch.long), method=method, draft_logits=draft_logits)
    assert got.refused.tolist() == [False, True]


def test_the_lowest_of_equal_tokens_wins():
    logits = torch.zeros(1, 2, 9)
    logits[..., [4, 6, 8]] = 1.0
    assert verify_drafts(logits, torch.tensor([[4]]), temperature=0.0).tokens.tolist() == [[4, 4]]


@pytest.mark.parametrize("method", METHODS)
def test_strides_and_dtypes_of_views(method):
    wide = randn(4, 7, 130).bfloat16()
    logits = wide[:, 1:5, 11:112]
    drafts = logits.argmax(-1)[:, :3].int()
    arguments = {"method": method, "seeds": torch.arange(4).int(), "positions": 2, "top_k": torch.tensor([3] * 4).int()}
    got = verify_drafts(logits, drafts, **arguments)
    assert torch.equal(got.tokens, verify_drafts(logits.float().contiguous(), drafts.long(), **arguments).tokens)
    assert torch.equal(got.tokens, verify_drafts(logits.double(), drafts, **arguments).tokens)


def test_default_seeds_come_from_torchs_generator():
    logits = torch.zeros(200, 1000)
    torch.manual_seed(5)
    first, second = sample_tokens(logits), sample_tokens(logits)
    torch.manual_seed(5)
    assert torch.equal(sample_tokens(logits), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    sample_tokens(logits, temperature=0.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_no_requests_and_no_drafts(method):
    assert verify_drafts(torch.zeros(0, 3, 5), torch.zeros(0, 2, dtype=torch.long), method=method).tokens.shape == (
        0,
        3,
    )
    logits = randn(6, 1, 40)
    none = torch.zeros(6, 0, dtype=torch.long)
    got = verify_drafts(logits, none, method=method, seeds=9, positions=4)
    assert torch.equal(got.next_token, sample_tokens(logits[:, 0], seeds=9, positions=4))


def test_a_tiny_temperature_is_no_nan():
    logits = randn(4, 50)
    logits[:, 3] = 3e38
    assert sample_tokens(logits, temperature=1e-30, seeds=0, positions=0).tolist() != [-1] * 4
