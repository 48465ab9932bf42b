"""Which configuration a product gets, and why: data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Sizes of one program."""

    rows: int
    """Rows of x of a tile."""
    outputs: int
    """Rows of the weight of a tile."""
    words: int
    """32-bit words of codes of a tile's row."""
    warps: int
    stages: int
    reason: str


# (most rows of x, configuration). Up to 16 rows there is one, or a row's bits would depend on their number.
_16_BIT = (
    (
        16,
        Config(
            16, 64, 16, 4, 4, "16 words are the 16 columns of one matrix instruction; 64 outputs keep many programs"
        ),
    ),
    (64, Config(64, 64, 16, 4, 3, "each weight is made once for 64 rows")),
    (1 << 30, Config(128, 64, 16, 8, 2, "each weight is made once for 128 rows")),
)
_32_BIT = ((1 << 30, Config(16, 32, 16, 4, 1, "products of fp32 run on the ordinary cores: for tests")),)

# From so many rows on the weight is written out once in x's dtype and the library multiplies: making a weight takes about
# six instructions, which the tensor cores then wait for in every tile of rows. On paper; no card has measured it yet.
DEQUANTIZE_FROM_ROWS = 256
DEQUANTIZE = Config(0, 32, 16, 4, 1, "512 words, 4 for each thread: stores of neighbouring columns meet in the cache")
ADD_OUTPUTS = 1024

# Programs that a multiprocessor runs at a time, by registers and shared memory of the decode configuration.
_RESIDENT = 2


def lookup(rows: int, outputs: int, dtype: torch.dtype) -> Config:
    """The configuration for x with so many rows and a weight with so many outputs."""
    table = _32_BIT if dtype.itemsize == 4 else _16_BIT
    return next(config for most, config in table if rows <= most)


def splits(outputs: int, columns: int, config: Config, multiprocessors: int) -> int:
    """Pieces of K, a power of two: until there are two programs for every multiprocessor, or a piece has eight tiles.

    It depends on the weight's shape and the card only, never on x.
    """
    programs = -(-outputs // config.outputs)
    tiles = max(1, columns // (8 * config.words))
    count = 1
    while programs * count < _RESIDENT * multiprocessors and tiles // (2 * count) >= 8:
        count *= 2
    return count
