"""Drafts never change the text: speculative generation of a batch gives what plain decoding gives, token for token."""

from __future__ import annotations

import functools

import pytest
import small_reference
import torch
from known_drafts import known_drafts

from gemma4_kernels import mtp
from gemma4_kernels.reference import GREEDY
from gemma4_kernels.reference import generate as reference_generate
from gemma4_kernels.verification import noise

NEW = 10
PROMPTS = small_reference.prompts(200)
BATCHES = (1, 2, 7)
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 8},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
]


@functools.cache
def target(dtype=torch.float64):
    return small_reference.target(dtype=dtype)


@functools.cache
def own_drafter(dtype=torch.float64):
    return small_reference.drafter(dtype=dtype)


@functools.cache
def plain_texts(dtype):
    """Decoded one by one. float32 takes as long and adds only its roundings: fewer of them."""
    prompts = PROMPTS if dtype == torch.float64 else PROMPTS[:40]
    return [mtp.generate(target(dtype), None, [prompt], max_new_tokens=NEW).tokens[0] for prompt in prompts]


def oracle(texts, quality):
    """A drafter that knows the texts, answers included, and tells them as well as it likes."""
    rng = torch.Generator().manual_seed(5)

    def draft(context):
        right = known_drafts(context, texts)
        spoilt = torch.rand(right.shape, generator=rng) >= quality
        return torch.where(spoilt, (right + 1) % small_reference.VOCAB, right)

    return draft


def last_wrong(texts, drafts):
    """An adversary: all right but one, so that as much as possible has to be taken back."""

    def draft(context):
        right = oracle(texts, 1.0)(context)
        right[:, min(drafts, context.num_drafts) - 1] += 1
        return right % small_reference.VOCAB

    return draft


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_drafts", range(1, 9))
def test_greedy_text_is_that_of_plain_decoding(num_drafts, dtype):
    plain = plain_texts(dtype)
    step = BATCHES[num_drafts % 3]
    for turn, start in enumerate(range(0, len(plain), step)):
        prompts = PROMPTS[start : min(start + step, len(plain))]
        texts = [prompt + new for prompt, new in zip(prompts, plain[start:], strict=False)]
        drafters = (
            own_drafter(dtype), oracle(texts, 1.0), oracle(texts, 0.0), oracle(texts, 0.7), last_wrong(texts, num_drafts)
        )  # fmt: skip
        got = mtp.generate(
            target(dtype),
            drafters[turn % 5],
            prompts,
            max_new_tokens=NEW,
            num_drafts=num_drafts,
            adaptive=turn % 2 == 0,
        )
        assert got.tokens == plain[start : start + step]
        assert got.finish_reasons == ["length"] * len(prompts)


def test_plain_decoding_is_the_references():
    for prompt, expected in zip(PROMPTS[:20], plain_texts(torch.float64), strict=False):
        text = reference_generate(target(), torch.tensor([prompt]), max_new_tokens=NEW, filters=GREEDY)
        assert text[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_sampled_text_is_that_of_plain_decoding_with_the_same_seed(filters, num_drafts):
    prompts, seeds = PROMPTS[:8], torch.arange(8) * 7 - 20
    options = {"max_new_tokens": NEW, **filters}
    plain = [
        mtp.generate(target(), None, [prompt], seeds=seed[None], **options).tokens[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    texts = [prompt + new for prompt, new in zip(prompts, plain, strict=True)]
    for drafter in (own_drafter(), oracle(texts, 0.8), oracle(texts, 0.0)):
        got = mtp.generate(target(), drafter, prompts, seeds=seeds, num_drafts=num_drafts, **options)
        assert got.tokens == plain
    assert plain != [mtp.generate(target(), None, [p], seeds=99, **options).tokens[0] for p in prompts]


@pytest.mark.parametrize("filters", [{}, FILTERS[-1]], ids=str)
def test_a_text_does_not_depend_on_the_batch(filters):
    prompts, seeds = PROMPTS[:9], torch.arange(9)
    options = {"max_new_tokens": NEW, "num_drafts": 3, **filters}
    whole = mtp.generate(target(), own_drafter(), prompts, seeds=seeds, **options).tokens
    order = [4, 8, 0, 3, 7, 1, 2, 6, 5]
    moved = mtp.generate(target(), own_drafter(), [prompts[i] for i in order], seeds=seeds[order], **options).tokens
    assert moved == [whole[i] for i in order]
    for part in (slice(0, 2), slice(2, 9)):
        assert mtp.generate(target(), own_drafter(), prompts[part], seeds=seeds[part], **options).tokens == whole[part]


def test_requests_of_one_batch_may_have_filters_of_their_own():
    prompts = PROMPTS[:4]
    temperature, top_k = torch.tensor([0.0, 1.0, 0.0, 0.8]), torch.tensor([0, 5, 9, 0])
    together = mtp.generate(
        target(),
        own_drafter(),
        prompts,
        max_new_tokens=NEW,
        num_drafts=3,
        temperature=temperature,
        top_k=top_k,
        seeds=3,
    )
    for b, prompt in enumerate(prompts):
        alone = mtp.generate(
            target(),
            None,
            [prompt],
            max_new_tokens=NEW,
            temperature=float(temperature[b]),
            top_k=int(top_k[b]),
            seeds=3 + b,
        )
        assert alone.tokens[0] == together.tokens[b]


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_sampled_drafts_leave_the_distribution_of_two_tokens_as_it_is(method):
    """Chi-square of the second and third token together, which come out of one verification of sampled drafts."""
    vocab, trials, batch = 5, 2000, 250
    model = small_reference.target(3, vocab_size=vocab)
    drafter = small_reference.drafter(4, vocab_size=vocab)
    prompt = [1, 3, 2]
    filters = {"temperature": 2.0, "top_k": 4}
    expected = torch.zeros(vocab, vocab, dtype=torch.float64)
    for first, p in enumerate(_probabilities(model, prompt, **filters)):
        for second, q in enumerate(_probabilities(model, [*prompt, first], **filters)):
            expected[second] += p * q * _probabilities(model, [*prompt, first, second], **filters)
    got = torch.zeros(vocab * vocab, dtype=torch.float64)
    for start in range(0, trials, batch):
        made = mtp.generate(
            model, drafter, [prompt] * batch, max_new_tokens=4, num_drafts=2, adaptive=False, method=method, seeds=start,
            **filters,
        )  # fmt: skip
        pairs = torch.tensor([tokens[1] * vocab + tokens[2] for tokens in made.tokens])
        got += torch.bincount(pairs, minlength=vocab * vocab)
    assert 0.05 < made.statistics.acceptance < 0.95
    possible = expected.flatten() > 0
    assert not got[~possible].any()
    counts = trials * expected.flatten()[possible]
    chi_square = float(((got[possible] - counts) ** 2 / counts).sum())
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def _probabilities(model, prompt, *, temperature, top_k):
    logits = model.logits(torch.tensor([prompt]))[0, -1] / temperature
    return torch.where(logits >= logits.topk(top_k).values[-1], logits, -torch.inf).softmax(-1)


def test_the_noise_of_a_token_belongs_to_its_place_in_the_text():
    prompt, seeds = PROMPTS[3], torch.tensor([11])
    got = mtp.generate(target(), None, [prompt], max_new_tokens=3, temperature=1.0, seeds=seeds).tokens[0]
    text = list(prompt)
    for token in got:
        logits = target().logits(torch.tensor([text]))[0, -1].float()
        words = noise.words_of_all(seeds, torch.tensor([len(text)]), small_reference.VOCAB, noise.TARGET)
        assert int((logits + noise.gumbel(words)[0]).argmax()) == token
        text.append(token)
