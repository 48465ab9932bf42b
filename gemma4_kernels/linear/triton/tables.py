"""Which configuration a product gets, and why: data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gemma4_kernels.linear.schemes import Layout


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

# From how many rows of x on the weight is written out once in x's dtype and the library multiplies. Both sides grow with the
# weight, so the card decides: writing and reading back moves 4 bytes a weight, once; making a weight again takes about 8
# instructions of a lane, in every tile of 128 rows. (most multiprocessors, rows, reason). On paper; no card has measured it.
_DEQUANTIZE_FROM = (
    (48, 1024, "RTX 3060, 4060: 11 to 15 ps for 4 bytes against 1.1 to 1.3 ps a tile, so eight tiles and more"),
    (84, 512, "RTX 3080, 3090, 4080: 4 to 6 ps for 4 bytes against 0.4 to 0.5 ps a tile, and the library's own lead"),
    (
        1 << 30,
        256,
        "A100, H100: 1 to 3 ps for 4 bytes against 0.3 to 0.4 ps a tile, and as much again for the library's lead",
    ),
)
# Below so many weights a second launch costs more than it saves: they are made in a few microseconds, which a launch takes too.
_SMALL_WEIGHTS = 4_000_000
_SMALL_FROM = 2048
DEQUANTIZE = Config(0, 32, 16, 4, 1, "512 words, 4 for each thread: stores of neighbouring columns meet in the cache")
EMBEDDING = Config(16, 0, 16, 4, 1, "as DEQUANTIZE; one token wastes 15 rows of lanes, which nothing else wants")
ADD_OUTPUTS = 1024
COMBINE_ELEMENTS = 1024
ARGMAX_TILES = 1024  # the 4096 tiles of a vocabulary of 262144 in four passes
# Rows of x of one argmax: its tiles of a vocabulary of 262144 leave 32 KiB a row.
ARGMAX_ROWS = 4096

# Programs that a multiprocessor runs at a time, by registers and shared memory of the decode configuration.
_RESIDENT = 2


def lookup(rows: int, outputs: int, dtype: torch.dtype) -> Config:
    """The configuration for x with so many rows and a weight with so many outputs."""
    table = _32_BIT if dtype.itemsize == 4 else _16_BIT
    return next(config for most, config in table if rows <= most)


def lookup_geglu(rows: int, outputs: int, dtype: torch.dtype, layout: Layout) -> Config:
    """The same for two weights at once. Bits do not depend on what differs, the stages.

    Two tiles of codes in a stage: two stages keep as many bytes under way as four of one weight, and registers for
    more blocks. With the inner scales and the table of IQ4_XS the compiler spills six words at two stages, none at three.
    """
    config = lookup(rows, outputs, dtype)
    if layout.values == "table" and config.rows > 16:
        # What is looked up in two tables for two stages takes up to 114 KiB of shared memory, more than consumer cards have;
        # with one stage NF4 spills at 128 rows, and none does at 64.
        return replace(lookup(min(rows, 64), outputs, dtype), stages=1)
    return replace(config, stages=min(config.stages, 3 if (layout.values, layout.scales) == ("table", "int8") else 2))


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


def dequantize_from_rows(outputs: int, columns: int, multiprocessors: int) -> int:
    """The fewest rows of x for which a weight of that shape is written out."""
    if outputs * columns < _SMALL_WEIGHTS:
        return _SMALL_FROM
    return next(rows for most, rows, _ in _DEQUANTIZE_FROM if multiprocessors <= most)
