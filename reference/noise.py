"""The noise of samples and decisions, written down a second time: docs/mtp.md, "The noise".

Philox4x32-10 (Salmon et al. 2011) from its paper, in products of 16-bit halves that no integer can overflow, and float64
logarithms. `python_philox` is the same for one counter, in whole numbers of Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TARGET, ACCEPTANCE, RESIDUAL, DRAFT = 0, 1, 2, 3
"""Streams: samples of the target, acceptance, residuals, the drafter's samples."""
_WORD = 2**32
_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def python_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four words of one counter."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = divmod(_M0 * x0, _WORD)
        high1, low1 = divmod(_M1 * x2, _WORD)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) % _WORD, (k1 + _W1) % _WORD
    return x0, x1, x2, x3


def _halves(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of multiplier * x, of 32 bits each, by long multiplication."""
    m_high, m_low = divmod(multiplier, 2**16)
    x_high, x_low = x >> 16, x & 0xFFFF
    lowest = m_low * x_low
    middle = m_high * x_low + (lowest >> 16)
    other = m_low * x_high + (middle & 0xFFFF)
    return m_high * x_high + (middle >> 16) + (other >> 16), ((other & 0xFFFF) << 16) | (lowest & 0xFFFF)


@dataclass(frozen=True)
class KeyedNoise:
    """All noise of one request over V tokens. Row i belongs to the token at `position` + i of its text."""

    seed: int
    """Any 64 bits, as a signed number."""
    position: int
    vocab_size: int

    def words(self, row: int, stream: int) -> Tensor:
        """(V,) int64 that hold 32 bits."""
        position, seed = self.position + row, self.seed % 2**64
        block = torch.arange((self.vocab_size + 3) // 4)  # token div 4
        x0, x1 = block, torch.full_like(block, position % _WORD)
        x2, x3 = torch.full_like(block, stream), torch.full_like(block, position // _WORD)
        k0, k1 = seed % _WORD, seed // _WORD
        for _ in range(_ROUNDS):
            high0, low0 = _halves(_M0, x0)
            high1, low1 = _halves(_M1, x2)
            x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
            k0, k1 = (k0 + _W0) % _WORD, (k1 + _W1) % _WORD
        return torch.stack((x0, x1, x2, x3), dim=-1).flatten()[: self.vocab_size]

    def exponential(self, row: int, stream: int = RESIDUAL) -> Tensor:
        """(V,) float64 E = -ln(1 - v) of v = (word + 1/2) / 2**32."""
        return -torch.log1p(-(self.words(row, stream).double() + 0.5) / _WORD)

    def gumbel(self, row: int, stream: int = TARGET) -> Tensor:
        """(V,) float64 -ln(E)."""
        return -torch.log(self.exponential(row, stream))

    def uniform(self, row: int) -> float:
        """The number that decides about the draft of a row: 24 bits of token 0's word, the last of them 1."""
        position, seed = self.position + row, self.seed % 2**64
        counter = (0, position % _WORD, ACCEPTANCE, position // _WORD)
        word = python_philox(counter, (seed % _WORD, seed // _WORD))[0]
        return (word // 2**8 | 1) / 2**24
