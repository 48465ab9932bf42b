"""Noise that is a function of (seed, position, token): Philox4x32-10, and what is made of its bits.

    key      seed, low and high 32 bits
    counter  (token >> 2, position low, stream, position high)
    word     token & 3

A stream is a use: the samples of the target, acceptance, residuals, the drafter's own samples. Uses are independent, and
nothing else (batch, place, number of drafts, device) enters. docs/mtp.md has the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.verification import portable_math

TARGET, ACCEPTANCE, RESIDUAL, DRAFT = range(4)
STREAMS = {"target": TARGET, "draft": DRAFT}
"""Those that a caller may ask for."""

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
RARE, RARE_WORD = 5.0, 28_900_000
"""Gumbel noise of the first or more, which 0.7 % of all is, has a word below the second (28.85 million and less)."""
SMALLEST = -3.14
"""All Gumbel noise is above."""


Word = Any
"""Tensors that hold 32-bit words as int64, or a number of Python, which needs no operation of torch."""


def philox(counter: tuple[Word, ...], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Philox4x32-10. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products wrap at 64 bits; the sign that this may give them is gone after the masks. c1 and c3 keep upper halves
        # that are masked away once they are used.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = second >> 32, first >> 32
        # In place, where they are tensors: a new one costs as much as the operation.
        c0 ^= c1
        c0 ^= k0
        c0 &= _MASK
        c2 ^= c3
        c2 ^= k1
        c2 &= _MASK
        c1, c3 = second, first
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _words(seeds: Tensor, positions: Tensor, blocks: Tensor, stream: int) -> Tensor:
    """(R, blocks, 4) of seeds (R,), positions (R,) and blocks (R or 1, blocks)."""
    seed: Word
    position: Word
    counter: tuple[Word, ...]
    if seeds.device.type == "cpu" and seeds.numel() == 1:
        seed, position = int(seeds), int(positions)
        counter = (blocks, position & _MASK, stream, (position >> 32) & _MASK)
    else:
        seed, position = seeds.long()[:, None], positions.long()[:, None]
        zeros = torch.zeros_like(seed * blocks)  # philox mixes words of one shape
        counter = (blocks + zeros, (position & _MASK) + zeros, zeros + stream, ((position >> 32) & _MASK) + zeros)
    return torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)


def words_of(seeds: Tensor, positions: Tensor, tokens: Tensor, stream: int) -> Tensor:
    """A 32-bit word, as int64, for each of tokens (R, M)."""
    words = _words(seeds, positions, tokens >> 2, stream)
    return words.gather(-1, (tokens & 3).expand(words.shape[:2])[..., None])[..., 0]


def words_of_all(seeds: Tensor, positions: Tensor, vocab_size: int, stream: int) -> Tensor:
    """The same for tokens 0 to vocab_size - 1, four from one evaluation: (R, V)."""
    return words_between(seeds, positions, 0, vocab_size, stream)


def words_between(seeds: Tensor, positions: Tensor, start: int, stop: int, stream: int) -> Tensor:
    """The same for tokens start, a multiple of 4, to stop - 1: (R, stop - start)."""
    blocks = torch.arange(start // 4, (stop + 3) // 4, device=seeds.device)[None]
    return _words(seeds, positions, blocks, stream).flatten(1)[:, : stop - start]


def uniform(words: Tensor) -> Tensor:
    """fp32 strictly between 0 and 1: (the upper 24 bits rounded down to even + 1) / 2**24, exact."""
    return ((words >> 8) | 1).to(torch.float32) * 2.0**-24


def exponential(words: Tensor) -> Tensor:
    """fp32 E = -ln(1 - v), v = (word + 1/2) / 2**32, from 2**-33 to 22.9, as exact for small v as for large."""
    odd = 2 * words + 1  # v * 2**33
    near_one = odd < 2**31  # 1 - v > 3/4: E comes from v itself, which 1 - v would have rounded
    near = portable_math.log_of_parts(
        odd.clamp(max=2**31).to(torch.float32) * -(2.0**-33), torch.zeros((), device=words.device)
    )
    far = portable_math.log((2**33 - odd).to(torch.float32) * 2.0**-33)
    return -torch.where(near_one, near, far)


def gumbel(words: Tensor) -> Tensor:
    """fp32 -ln(E)."""
    return -portable_math.log(exponential(words))
