"""Filters as transformers applies them, sampling, and what a verification accepts and emits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import randn
from torch import Tensor
from transformers import GenerationConfig

from gemma4_kernels.reference import (
    GREEDY,
    RECOMMENDED,
    SamplingFilters,
    filter_logits,
    gumbel_noise,
    sample_tokens,
    verify_drafts,
)

FILTERS = [
    SamplingFilters(temperature=0.7),
    SamplingFilters(top_k=1),
    SamplingFilters(top_k=5),
    SamplingFilters(top_k=1000),
    SamplingFilters(top_p=0.8),
    SamplingFilters(top_p=1e-9),
    SamplingFilters(top_p=0.0),
    SamplingFilters(min_p=0.1),
    SamplingFilters(min_p=1.0),
    SamplingFilters(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
    SamplingFilters(temperature=0.3, top_k=7, top_p=0.5, min_p=0.3),
    RECOMMENDED,
]


def warpers(hf_model: Any, filters: SamplingFilters) -> Any:
    """The processors that transformers' generate() would build, in its order."""
    config = GenerationConfig(
        do_sample=True,
        temperature=filters.temperature,
        top_k=filters.top_k,
        top_p=filters.top_p,
        min_p=filters.min_p,
    )
    return hf_model._get_logits_processor(config)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_filters_have_the_bits_of_transformers(hf_text: Any, filters: SamplingFilters, ties: bool) -> None:
    logits = 3 * randn(20, 100)
    if ties:
        logits = logits.round()
    theirs = warpers(hf_text, filters)(torch.zeros(20, 1, dtype=torch.long), logits)
    assert torch.equal(filter_logits(logits, filters), theirs)


def test_filters_keep_float64_and_widen_the_rest() -> None:
    assert filter_logits(randn(2, 9, dtype=torch.float64), RECOMMENDED).dtype == torch.float64
    assert filter_logits(randn(2, 9, dtype=torch.bfloat16), RECOMMENDED).dtype == torch.float32


def test_filters_take_any_leading_shape() -> None:
    logits, filters = randn(2, 3, 50), SamplingFilters(top_k=9, top_p=0.7, min_p=0.1)
    assert torch.equal(filter_logits(logits, filters), filter_logits(logits.view(6, 50), filters).view(2, 3, 50))


def test_greedy_has_no_filtered_distribution() -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        filter_logits(randn(1, 5), GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
    ],
)
def test_impossible_filters_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        SamplingFilters(**settings)


def test_noise_depends_on_seed_and_position_only() -> None:
    assert torch.equal(gumbel_noise(3, 7, 50), gumbel_noise(3, 7, 50))
    for other in ((3, 8), (4, 7), (37, 0)):
        assert not torch.equal(gumbel_noise(3, 7, 50), gumbel_noise(*other, 50))


def test_samples_have_the_filtered_distribution() -> None:
    logits, filters = 1.5 * randn(12), SamplingFilters(temperature=1.3, top_k=8, min_p=0.02)
    draws = 4000
    noise = torch.stack([gumbel_noise(0, position, 12) for position in range(draws)])
    samples = sample_tokens(logits.expand(draws, 12), filters, noise)
    frequency = torch.bincount(samples, minlength=12) / draws
    probability = filter_logits(logits, filters).softmax(-1)
    assert (frequency[probability == 0] == 0).all()
    # 4000 draws over 8 tokens: a total variation of 0.02 is expected, 0.04 is out of reach.
    assert float((frequency - probability).abs().sum() / 2) < 0.04


def test_sampling_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise: expected the logits' shape \(2, 5\), got None"):
        sample_tokens(randn(2, 5), RECOMMENDED)


def logits_that_want(*tokens: int, vocab_size: int = 10) -> Tensor:
    """(1, rows, V): the argmax of each row is the token given."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), vocab_size).float()


@pytest.mark.parametrize(
    ("drafts", "emitted", "accepted"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 9], [1, 2, 3, -1], 2),
        ([1, 9, 3], [1, 2, -1, -1], 1),  # a match after a mismatch does not count
        ([9, 2, 3], [1, -1, -1, -1], 0),
    ],
)
def test_greedy_keeps_the_longest_matching_prefix_and_adds_one_token(
    drafts: list[int], emitted: list[int], accepted: int
) -> None:
    result = verify_drafts(logits_that_want(1, 2, 3, 4), torch.tensor([drafts]))
    assert result.tokens.tolist() == [emitted]
    assert result.num_accepted.tolist() == [accepted]


def test_requests_may_have_fewer_drafts() -> None:
    logits = logits_that_want(1, 2, 3, 4).expand(3, -1, -1)
    drafts = torch.tensor([[1, 2, 3]] * 3)
    result = verify_drafts(logits, drafts, torch.tensor([0, 1, 3]))
    assert result.tokens.tolist() == [[1, -1, -1, -1], [1, 2, -1, -1], [1, 2, 3, 4]]
    assert result.num_accepted.tolist() == [0, 1, 3]


def test_nothing_is_emitted_after_the_end_of_text() -> None:
    logits = logits_that_want(1, 2, 3, 4).expand(2, -1, -1)
    result = verify_drafts(logits, torch.tensor([[1, 2, 3], [1, 9, 3]]), eos_token_ids={2})
    assert result.tokens.tolist() == [[1, 2, -1, -1], [1, 2, -1, -1]]
    assert result.num_accepted.tolist() == [2, 1]


def test_without_drafts_it_is_sampling() -> None:
    logits, noise = randn(5, 1, 50), randn(5, 1, 50, seed=1)
    result = verify_drafts(logits, torch.zeros(5, 0, dtype=torch.long), filters=RECOMMENDED, noise=noise)
    assert torch.equal(result.tokens, sample_tokens(logits, RECOMMENDED, noise))


def test_every_emitted_token_is_a_sample_of_the_target() -> None:
    logits, noise = randn(50, 4, 6), randn(50, 4, 6, seed=1)
    drafts = torch.randint(0, 6, (50, 3), generator=torch.Generator().manual_seed(2))
    result = verify_drafts(logits, drafts, filters=SamplingFilters(), noise=noise)
    samples = sample_tokens(logits, SamplingFilters(), noise)
    for row in range(50):
        matches = (samples[row, :3] == drafts[row]).tolist()
        accepted = [*matches, False].index(False)
        assert int(result.num_accepted[row]) == accepted
        assert result.tokens[row, : accepted + 1].tolist() == samples[row, : accepted + 1].tolist()
        assert (result.tokens[row, accepted + 1 :] == -1).all()


def test_a_point_draft_is_accepted_as_often_as_ratio_rejection_would() -> None:
    # With a draft that is certain of its token, ratio rejection accepts with the target's probability of it.
    logits, draws = randn(1, 2, 5), 4000
    noise = torch.stack([torch.stack([gumbel_noise(s, 0, 5), gumbel_noise(s, 1, 5)]) for s in range(draws)])
    drafts = torch.full((draws, 1), 2)
    result = verify_drafts(logits.expand(draws, 2, 5), drafts, filters=SamplingFilters(), noise=noise)
    assert float(result.num_accepted.double().mean()) == pytest.approx(float(logits[0, 0].softmax(-1)[2]), abs=0.03)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(4, 10)}, ValueError, "logits: expected"),
        ({"draft_tokens": torch.zeros(1, 4, dtype=torch.long)}, ValueError, r"draft_tokens: expected \(1, 3\)"),
        ({"draft_tokens": torch.zeros(1, 3)}, TypeError, "draft_tokens: expected integers"),
        ({"num_drafts": torch.tensor([4])}, ValueError, "num_drafts: expected 1 numbers from 0 to 3"),
        ({"filters": RECOMMENDED}, ValueError, "noise: expected"),
    ],
)
def test_bad_verification_input_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"logits": torch.zeros(1, 4, 10), "draft_tokens": torch.zeros(1, 3, dtype=torch.long), **changes}
    with pytest.raises(error, match=message):
        verify_drafts(**arguments)
