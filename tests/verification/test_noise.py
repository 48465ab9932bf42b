"""Philox against its published vectors, and what is made of its bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma4_kernels.verification import noise, portable_math

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORDS = torch.cat((torch.arange(1000), 2**32 - 1 - torch.arange(1000), torch.randint(0, 2**32, (100000,))))


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    assert noise.philox(words(counter), words(key)) == words(result)


def test_a_word_has_the_counter_that_is_promised():
    seed, position, token, stream = -(2**62) + 12345, 2**33 + 7, 262143, 3
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    counter = (token >> 2, position & 0xFFFFFFFF, stream, position >> 32)
    expected = noise.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))[token & 3]
    arguments = (torch.tensor([seed]), torch.tensor([position]))
    assert int(noise.words_of(*arguments, torch.tensor([[token]]), stream)) == int(expected)
    assert int(noise.words_of_all(*arguments, 262144, stream)[0, token]) == int(expected)


def test_each_token_seed_position_and_stream_has_its_own_word():
    seeds, positions = torch.tensor([1, 2, 2**32 + 1, 1]), torch.tensor([5, 5, 5, 6])
    drawn = torch.cat([noise.words_of_all(seeds, positions, 1001, stream) for stream in range(4)])
    assert drawn.shape == (16, 1001)
    assert drawn.unique().numel() == pytest.approx(drawn.numel(), abs=2)  # a collision of 32 bits may happen
    assert drawn.min() >= 0
    assert drawn.max() < 2**32
    assert torch.equal(drawn[:4], noise.words_of(seeds, positions, torch.arange(1001)[None], 0))


def test_uniform_is_never_0_or_1():
    u = noise.uniform(WORDS)
    assert float(u.min()) == 2.0**-24
    assert float(u.max()) == 1 - 2.0**-24
    assert float((u.double() - WORDS / 2**32).abs().max()) < 2.0**-23


def test_exponential_and_gumbel_are_exact_to_rounding_in_both_tails():
    v = (WORDS.double() + 0.5) / 2**32
    expected = -torch.log1p(-v)
    assert float((noise.exponential(WORDS) / expected - 1).abs().max()) < 4e-7
    assert float((noise.gumbel(WORDS) + expected.log()).abs().max()) < 2e-6


def test_a_word_shows_what_noise_it_may_become():
    """Bounds that sampling on a CPU relies on, with room for a rounding."""
    assert float(noise.gumbel(WORDS).min()) > noise.SMALLEST + 0.01
    assert float(noise.gumbel(torch.arange(noise.RARE_WORD, noise.RARE_WORD + 1000)).max()) < noise.RARE - 0.001
    common = torch.cat((WORDS, torch.arange(noise.RARE_WORD, 2**32, 10007)))
    common = common[common >= noise.RARE_WORD]
    assert float(noise.gumbel(common).max()) < noise.RARE


def test_words_between_are_a_part_of_all():
    seeds, positions = torch.tensor([3, -9]), torch.tensor([1, 2**35])
    whole = noise.words_of_all(seeds, positions, 103, noise.DRAFT)
    assert torch.equal(noise.words_between(seeds, positions, 40, 103, noise.DRAFT), whole[:, 40:])
    for b in range(2):
        one = noise.words_between(seeds[b : b + 1], positions[b : b + 1], 12, 61, noise.DRAFT)
        assert torch.equal(one, whole[b : b + 1, 12:61])


@pytest.mark.parametrize("function", ["exp", "log", "tanh"])
def test_portable_functions_have_two_units_in_the_last_place(function):
    x = torch.linspace(-85, 85, 200001)
    x = x.exp() if function == "log" else x / 8 if function == "tanh" else x
    expected = getattr(torch, function)(x.double())
    scale = expected.abs().clamp(min=1e-30)
    assert float(((getattr(portable_math, function)(x) - expected).abs() / scale).max()) < 2.4e-7


def test_portable_functions_at_their_ends():
    assert portable_math.exp(torch.tensor([0.0, -torch.inf, -200.0])).tolist() == [1.0, 0.0, 0.0]
    assert portable_math.tanh(torch.tensor([0.0, torch.inf, -torch.inf, 1e30])).tolist() == [0.0, 1.0, -1.0, 1.0]


def test_exp_has_the_bits_of_numpy_doing_the_same_steps():
    """Single IEEE operations: another library that does the same steps gets the same bits."""
    x = np.linspace(-80, 80, 20001, dtype=np.float32)
    n = np.floor(x * np.float32(portable_math.LOG2_E) + np.float32(0.5))
    rest = x - n * np.float32(portable_math.LN2_HIGH) - n * np.float32(portable_math.LN2_LOW)
    y = rest * np.float32(portable_math.EXP[0]) + np.float32(portable_math.EXP[1])
    for c in portable_math.EXP[2:]:
        y = y * rest + np.float32(c)
    expected = (y * (rest * rest) + rest + np.float32(1)) * np.exp2(n).astype(np.float32)
    assert np.array_equal(portable_math.exp(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("function", ["exp", "log", "tanh"])
def test_bits_do_not_depend_on_how_many_numbers_come_together(function):
    x = torch.linspace(0.01, 40, 2001)
    apart = torch.cat([getattr(portable_math, function)(part) for part in x.split(7)])
    assert torch.equal(getattr(portable_math, function)(x), apart)
