"""What ends a text, what a caller sees while it grows, how many drafts are asked for, and what is refused."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import small_reference
import torch
from known_drafts import known_drafts, known_places

from gemma4_kernels import mtp
from gemma4_kernels.mtp import generation
from gemma4_kernels.mtp.draft_length import AdaptiveLength, DraftLength
from gemma4_kernels.mtp.stopping import StopStrings
from gemma4_kernels.mtp.target import Pass

PROMPTS = small_reference.prompts(5, seed=9)
NEW = 16


@functools.cache
def target():
    return small_reference.target(1)


@functools.cache
def drafter():
    return small_reference.drafter(2)


@functools.cache
def plain():
    return mtp.generate(target(), None, PROMPTS, max_new_tokens=NEW).tokens


def teller(is_right=lambda place: True):
    """Drafts what will be said, except at the places that are not right."""

    def draft(context):
        texts = [prompt + new for prompt, new in zip(PROMPTS, plain(), strict=True)]
        right = known_drafts(context, texts, behind=0)
        kept = torch.tensor([[bool(is_right(place)) for place in row] for row in known_places(context).tolist()])
        return torch.where(kept, right, (right + 1) % small_reference.VOCAB)

    return draft


class Letters:
    """A tokenizer whose token i is the letter i."""

    @staticmethod
    def decode(tokens):
        return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.mark.parametrize("which", ["none", "own", "perfect"])
def test_an_end_of_text_ends_it_wherever_it_falls_in_a_block(which):
    source = {"none": None, "own": drafter(), "perfect": teller()}[which]
    for ending in range(NEW):
        eos = (plain()[0][ending], plain()[3][ending])
        got = mtp.generate(target(), source, PROMPTS, max_new_tokens=NEW, num_drafts=5, eos_token_ids=eos)
        for tokens, text, reason in zip(got.tokens, plain(), got.finish_reasons, strict=True):
            first = next((i for i, token in enumerate(text) if token in eos), None)
            assert tokens == (text if first is None else text[: first + 1])
            assert reason == ("length" if first is None else "eos")


def test_the_models_own_end_of_text_is_the_default():
    eos = plain()[0][4]
    model = small_reference.target(1, eos_token_ids=(eos,))
    got = mtp.generate(model, None, PROMPTS[:1], max_new_tokens=NEW)
    assert got.tokens[0][-1] == eos
    assert mtp.generate(model, None, PROMPTS[:1], max_new_tokens=NEW, eos_token_ids=()).tokens == plain()[:1]


def test_one_end_of_text_and_numbers_of_other_libraries_are_taken():
    numpy = pytest.importorskip("numpy")
    got = mtp.generate(
        target(), None, [numpy.array(PROMPTS[0])], max_new_tokens=numpy.int64(NEW), eos_token_ids=plain()[0][3]
    )
    assert got.tokens[0] == plain()[0][: plain()[0].index(plain()[0][3]) + 1]


def test_every_request_has_its_own_budget():
    budgets = [1, 2, 7, 16, 5]
    for source in (None, drafter(), teller()):
        got = mtp.generate(target(), source, PROMPTS, max_new_tokens=budgets, num_drafts=4)
        assert got.tokens == [text[:budget] for text, budget in zip(plain(), budgets, strict=True)]
        assert got.finish_reasons == ["length"] * 5


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(length):
    for start in range(NEW - length):
        stop = Letters.decode(plain()[1][start : start + length])
        first = Letters.decode(plain()[1]).index(stop) + length
        for source in (None, teller()):
            got = mtp.generate(
                target(), source, PROMPTS[1:2] if source is None else PROMPTS, max_new_tokens=NEW, num_drafts=6,
                stop_strings=["\u0416", stop], tokenizer=Letters,
            )  # fmt: skip
            tokens, reason = (
                (got.tokens[-1], got.finish_reasons[-1]) if source is None else (got.tokens[1], got.finish_reasons[1])
            )
            assert tokens == plain()[1][:first]
            assert reason == ("stop" if first < NEW or reason == "stop" else "length")


def test_a_stop_string_in_the_prompt_does_not_count():
    stop = StopStrings(["ab"], tokenizer=type("T", (), {"decode": staticmethod(lambda t: "".join(map(chr, t)))}))
    assert stop.cut([], [ord("b")]) is None
    assert stop.cut([ord("a")], [ord("x"), ord("a"), ord("b"), ord("c")]) == 3
    assert stop.cut([ord("a")], [ord("b")]) == 1


def test_a_stop_string_of_bytes_is_found_behind_others():
    """A tokenizer of bytes, which makes replacement characters of them all while one character is not whole."""

    class Bytes:
        @staticmethod
        def decode(tokens):
            try:
                return bytes(tokens).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(tokens)

    for before in range(12):
        old = list(("\ua000" * before).encode())
        stop = StopStrings(["\U00010349"], Bytes)
        new = list("\U00010349".encode())
        for split in range(4):
            assert stop.cut(old, new[:split]) is None
            assert stop.cut(old + new[:split], new[split:]) == 4 - split


def test_updates_are_the_text_in_pieces_as_they_come():
    seen = [[] for _ in PROMPTS]
    ends = {}

    def listen(update):
        assert update.request not in ends
        seen[update.request].append(update.tokens)
        if update.finish_reason:
            ends[update.request] = update.finish_reason

    got = mtp.generate(target(), teller(lambda i: i % 4), PROMPTS, max_new_tokens=NEW, num_drafts=3, on_tokens=listen)
    assert [list(itertools.chain(*pieces)) for pieces in seen] == got.tokens == plain()
    assert list(ends.values()) == ["length"] * 5
    assert all(len(pieces) < NEW for pieces in seen)


def test_statistics_count_what_happened():
    got = mtp.generate(target(), teller(lambda i: False), PROMPTS, max_new_tokens=NEW, num_drafts=3, adaptive=False)
    assert (got.statistics.tokens, got.statistics.target_passes, got.statistics.rounds) == (
        5 * NEW,
        5 * (NEW - 1),
        NEW - 1,
    )
    assert got.statistics.tokens_per_pass == 1
    assert got.statistics.accepted == [0, 0, 0]
    # At its end a request asks for no more drafts than its budget has room for.
    assert got.statistics.offered == [5 * (NEW - 2), 5 * (NEW - 3), 5 * (NEW - 4)]
    perfect = mtp.generate(target(), teller(), PROMPTS, max_new_tokens=NEW + 1, num_drafts=3, adaptive=False).statistics
    assert perfect.acceptance_by_place[:1] == [1.0]
    one = mtp.generate(target(), teller(), PROMPTS, max_new_tokens=13, num_drafts=3, adaptive=False)
    assert one.statistics.tokens_per_pass == 4
    assert one.statistics.offered == one.statistics.accepted == [15, 15, 15]
    assert [each.tokens for each in one.statistics_by_request] == [13] * 5
    assert all(each.rounds == 3 for each in one.statistics_by_request)
    assert all(seconds > 0 for seconds in one.statistics.seconds.values())
    assert "65 tokens in 15 passes (4.00 a pass)" in str(one.statistics)
    nothing = mtp.generate(target(), None, PROMPTS, max_new_tokens=1).statistics
    assert math.isnan(nothing.acceptance)
    assert math.isnan(nothing.tokens_per_pass)


def test_drafts_after_a_stop_string_do_not_count_as_accepted():
    got = mtp.generate(
        target(), teller(), PROMPTS, max_new_tokens=NEW, num_drafts=5, adaptive=False,
        stop_strings=[Letters.decode(plain()[1][1:3])], tokenizer=Letters,
    )  # fmt: skip
    assert got.statistics_by_request[1].offered == [1] * 5
    assert got.statistics_by_request[1].accepted == [1, 1, 0, 0, 0]


# What a source of drafts is told and may do ---------------------------------------------------------------------------


def test_a_drafter_is_shown_the_state_behind_the_bonus_token():
    def draft(context):
        assert context.rows().lengths.tolist() == [len(text) - 1 for text in context.texts]
        for text, hidden in zip(context.texts, context.hidden, strict=True):
            torch.testing.assert_close(hidden, target().forward(torch.tensor([text[:-1]])).hidden[0, -1])
        return teller(lambda i: i % 3)(context)

    mtp.generate(target(), draft, PROMPTS, max_new_tokens=[3, 16, 7, 16, 5], num_drafts=3, adaptive=False)


def test_what_a_function_does_to_the_texts_that_it_is_shown_is_its_own_affair():
    def draft(context):
        for text in context.texts:
            text += [text[-1]] * context.num_drafts
        return torch.tensor([text[-context.num_drafts :] for text in context.texts])

    got = mtp.generate(target(), draft, PROMPTS, max_new_tokens=NEW, num_drafts=2)
    assert got.tokens == plain()
    assert got.statistics.tokens == 5 * NEW


def test_a_function_may_have_fewer_drafts_than_are_wanted():
    seen = []

    def draft(context):
        seen.append(context.wanted)
        tokens = teller()(context)
        for row, request in enumerate(context.requests):
            tokens[row, request:] = -1 - row  # request 0 has none, request 1 one, and so on
        return tokens

    budgets = [4, NEW, NEW, NEW, NEW]
    got = mtp.generate(target(), draft, PROMPTS, max_new_tokens=budgets, num_drafts=3, adaptive=False)
    assert got.tokens == [text[:budget] for text, budget in zip(plain(), budgets, strict=True)]
    assert [len(each.offered) for each in got.statistics_by_request] == [0, 1, 2, 3, 3]
    assert all(each.accepted == each.offered for each in got.statistics_by_request)
    assert seen[0] == [2, 3, 3, 3, 3]


def test_what_a_request_does_not_want_is_not_looked_at():
    def draft(context):
        tokens = teller()(context)
        for row, wanted in enumerate(context.wanted):
            tokens[row, wanted:] = 10**6
        return tokens

    got = mtp.generate(target(), draft, PROMPTS, max_new_tokens=[4, 9, 9, 2, 9], num_drafts=4, adaptive=False)
    assert got.tokens == [text[:budget] for text, budget in zip(plain(), [4, 9, 9, 2, 9], strict=True)]


def test_a_target_can_be_used_again():
    used = target().speculative_target()
    for count in (3, 2, 5):
        got = mtp.generate(used, drafter(), PROMPTS[:count], max_new_tokens=NEW, num_drafts=3)
        assert got.tokens == plain()[:count]


def test_conventions_and_filters_reach_the_drafter(monkeypatch):
    seen, real = [], mtp.Drafter.draft

    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(mtp.Drafter, "draft", spy)
    options = {"max_new_tokens": 4, "num_drafts": 2, "position": "last_committed", "sliding_rows": 5}
    mtp.generate(target(), drafter(), PROMPTS, method="rejection", temperature=0.7, top_k=9, seeds=1, **options)
    told = seen[0]
    assert (told["position"], told["sliding_rows"], told["sampling"].softcap) == ("last_committed", 5, 30.0)
    assert told["sampling"].top_k.tolist() == [9] * 5
    assert told["sampling"].seeds.tolist() == [1, 2, 3, 4, 5]
    assert told["sampling"].positions.tolist() == [len(prompt) + 1 for prompt in PROMPTS]
    mtp.generate(target(), drafter(), PROMPTS, temperature=0.7, **options)
    assert seen[-1]["sampling"] is None


def test_each_requests_own_numbers_reach_the_verification(monkeypatch):
    seen, real = [], generation.verify_drafts

    def spy(logits, drafts, num_drafts, **kwargs):
        seen.append((None if num_drafts is None else num_drafts.tolist(), kwargs["max_new_tokens"].tolist()))
        return real(logits, drafts, num_drafts, **kwargs)

    monkeypatch.setattr(generation, "verify_drafts", spy)
    mtp.generate(target(), teller(), PROMPTS, max_new_tokens=[4, 9, 9, 2, 9], num_drafts=3, adaptive=False)
    assert seen == [(None, [4, 9, 9, 2, 9]), ([2, 3, 3, 0, 3], [3, 8, 8, 1, 8]), (None, [4, 4, 4])]


# How many drafts -----------------------------------------------------------------------------------------------------


def test_poor_drafts_are_dropped_and_tried_again_ever_more_rarely():
    length = DraftLength(4, AdaptiveLength(first_pause=8, last_pause=32))
    wanted = []
    for _ in range(400):
        wanted.append(length.wanted())
        length.saw(wanted[-1], 0, 1)
    assert wanted[0] > 0
    tries = [i for i, drafts in enumerate(wanted) if drafts]
    assert all(wanted[i] == 1 for i in tries[-5:])
    gaps = [b - a for a, b in itertools.pairwise(tries[-6:])]
    assert gaps == [33] * 5
    assert sum(wanted) < 60


def test_good_drafts_come_back():
    length = DraftLength(6, AdaptiveLength(first_pause=8))
    for _ in range(100):
        length.saw(length.wanted(), 0, 1)
    for _ in range(200):
        drafts = length.wanted()
        length.saw(drafts, drafts, drafts + 1)
    assert length.wanted() == 6


@pytest.mark.parametrize(("acceptance", "cost"), [(0.95, 0.05), (0.8, 0.08), (0.6, 0.1), (0.3, 0.1)])
def test_the_number_of_drafts_is_the_one_that_pays_most(acceptance, cost):
    length = DraftLength(12, AdaptiveLength(draft_cost=cost, memory=1e6))
    rng = torch.Generator().manual_seed(0)
    for _ in range(3000):
        drafts = length.wanted()
        if drafts:
            right = (torch.rand(drafts, generator=rng) < acceptance).long().cumprod(0).sum()
            length.saw(drafts, int(right), int(right) + 1)
        else:
            length.saw(0, 0, 1)
    rates = [
        sum(acceptance**i for i in range(drafts + 1)) / (1 + drafts * cost) for drafts in range(13)
    ]  # tokens for the time of a pass
    assert rates[length.wanted()] > 0.99 * max(rates)


def test_the_text_is_the_same_however_many_drafts_are_asked_for():
    for adaptive in (False, True, AdaptiveLength(draft_cost=0.5), AdaptiveLength(draft_cost=5.0, first_pause=1)):
        got = mtp.generate(
            target(), teller(lambda i: i % 3), PROMPTS, max_new_tokens=NEW, num_drafts=5, adaptive=adaptive
        )
        assert got.tokens == plain()


def test_a_request_without_hope_does_not_slow_down_the_others():
    def draft(context):
        right = teller()(context)
        hopeless = torch.tensor([request == 0 for request in context.requests])
        return torch.where(hopeless[:, None], (right + 1) % small_reference.VOCAB, right)

    got = mtp.generate(target(), draft, PROMPTS, max_new_tokens=NEW, num_drafts=4)
    assert got.tokens == plain()
    hopeless, *others = got.statistics_by_request
    assert sum(hopeless.offered) <= 25  # of 60
    assert hopeless.offered[3] == 1
    assert all(each.rounds <= 5 for each in others)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": []}, ValueError, "generate: input_ids must hold a token"),
        ({"input_ids": [[1], []]}, ValueError, "generate: input_ids must hold a token for each"),
        ({"input_ids": torch.ones(2, 3)}, TypeError, "generate: input_ids"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, ValueError, "generate: input_ids must have shape"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, "generate: attention_mask must be None with a list"),
        ({"max_new_tokens": 0}, ValueError, "generate: max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": [3]}, ValueError, "generate: max_new_tokens must be a number or 5 of them"),
        ({"num_drafts": -1}, ValueError, "generate: num_drafts must be at least 0, got -1"),
        ({"num_drafts": 2.5}, TypeError, "generate: num_drafts must be a whole number"),
        ({"method": "typical"}, ValueError, "generate: method must be one of match, rejection, block, got 'typical'"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 \\(greedy\\) or a positive number"),
        ({"temperature": torch.ones(2)}, ValueError, "generate: temperature must have shape \\(5\\)"),
        ({"top_k": 1.5}, TypeError, "generate: top_k must be a whole number"),
        ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1"),
        ({"seeds": 0.5}, TypeError, "generate: seeds must be a whole number"),
        ({"seeds": 2**63 - 2}, ValueError, "generate: seeds must fit into 64 bits for 5 requests"),
        ({"input_ids": [[1.7, 2.2]]}, TypeError, "generate: a prompt of input_ids must be int32 or int64, got float32"),
        ({"eos_token_ids": (1.5,)}, TypeError, "generate: an element of eos_token_ids must be a whole number"),
        ({"do_sample": True}, ValueError, "inputs: expected none"),
        ({"stop_strings": ["x"]}, ValueError, "generate: tokenizer must be given with stop_strings"),
        ({"stop_strings": "x", "tokenizer": Letters}, TypeError, "generate: stop_strings must be a list"),
        ({"stop_strings": [""], "tokenizer": Letters}, TypeError, "generate: stop_strings must be a list"),
        ({"drafter": 3}, TypeError, "generate: drafter must be a Drafter, transformers' assistant, a function or None"),
        ({"drafter": lambda c: torch.ones(5, 9)}, ValueError, "generate: what drafter returned must have shape"),
        ({"drafter": lambda c: torch.full((5, 4), 96)}, ValueError, "generate: a token that drafter returned"),
        ({"position": "middle"}, ValueError, "position"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, message):
    given = {
        "model": target(),
        "drafter": drafter(),
        "input_ids": PROMPTS,
        "max_new_tokens": 6,
        "num_drafts": 4,
        "adaptive": False,
    }
    given |= arguments
    with pytest.raises(error, match=message):
        mtp.generate(given.pop("model"), given.pop("drafter"), given.pop("input_ids"), **given)


def test_rows_of_nan_end_a_request_and_no_other():
    class Poisoned:
        def __init__(self):
            self.inner, self.steps = target().speculative_target(), 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def step(self, tokens):
            out = self.inner.step(tokens)
            self.steps += 1
            logits = out.logits.clone()
            if self.steps == 6:
                logits[1] = torch.nan
            return Pass(logits, out.hidden)

    poisoned = Poisoned()
    got = mtp.generate(poisoned, None, PROMPTS, max_new_tokens=NEW)
    assert got.finish_reasons == ["length", "refused", "length", "length", "length"]
    assert got.tokens[1] == plain()[1][:6]
    assert got.tokens[:1] + got.tokens[2:] == plain()[:1] + plain()[2:]
