"""Which products the compiled kernels take, and into how many pieces they cut K: data, with a reason for each row.

CHOICES say whether a call is theirs; PIECES how K is cut. A piece of K is a sum of its own, so the pieces decide the order of
sums, and with it bits: a row of PIECES can name outputs, columns, multiprocessors and architectures, never the rows of x.
Where no row fits, K is halved by the rule of csrc/linear/linear.cu, of which `halved` is the twin.

Figures in reasons are predictions of `bench/cuda_layers.py` from data sheets and machine code. No card has measured them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

OUTPUTS = 64  # of a block
MOST_ROWS = 16  # two tiles of 8
_FEWEST_STAGES = 4  # of a piece of the rule
_BLOCKS = 2  # of a multiprocessor, which the rule aims at


def stage_columns(bits: int) -> int:
    """By the bits of a code: csrc/linear/stage.cuh."""
    return 128 if bits == 8 else 256


Span = tuple[int, int]
"""From and to, both included."""
_ANY: Span = (0, 1 << 62)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where a row holds, and why."""

    reason: str
    outputs: Span = _ANY
    columns: Span = _ANY
    multiprocessors: Span = _ANY
    architectures: frozenset[str] | None = None
    """None: all."""

    def fits(self, N: int, K: int, multiprocessors: int, architecture: str) -> bool:
        spans = ((self.outputs, N), (self.columns, K), (self.multiprocessors, multiprocessors))
        if any(not first <= number <= last for (first, last), number in spans):
            return False
        return self.architectures is None or architecture in self.architectures


@dataclass(frozen=True, kw_only=True)
class Choice(Row):
    rows: Span
    """Of x."""
    compiled: bool
    """Whether the compiled kernels take the call; else the next backend does."""


@dataclass(frozen=True, kw_only=True)
class Pieces(Row):
    pieces: int


# The first row that fits counts; the last ones leave nothing over.
CHOICES: tuple[Choice, ...] = (
    Choice(
        rows=(0, MOST_ROWS), compiled=True,
        reason="up to 16 rows a product waits for its weight, which these kernels read at the speed of memory "
        "(predicted, on consumer cards)",
    ),
    Choice(
        rows=(MOST_ROWS + 1, _ANY[1]), compiled=False,
        reason=f"goes to {MOST_ROWS} rows: from there on Triton's tiles make a weight once for more rows",
    ),
)  # fmt: skip

_GEFORCE = frozenset({"sm_86", "sm_89", "sm_120"})

# Sizes are those of the 12B's layers; others keep the rule. A row is here if it saves 5 % or more on some card, in the mean of
# 1, 8 and 16 rows of x, and loses on none of `bench/cards.py` that it fits, even if memory answers within 400 or 900 ns instead
# of the 600 assumed, and the kernel that adds pieces takes 1 or 2.5 us instead of 1.5: tests/bench/test_cuda_static.py.
PIECES: tuple[Pieces, ...] = (
    Pieces(
        outputs=(512, 512), columns=(3840, 3840), multiprocessors=(82, 82), pieces=8,
        reason="8 tiles of outputs are few for so many multiprocessors: pieces of two stages make 64 blocks "
        "(predicted: 11 % less)",
    ),
    Pieces(
        outputs=(512, 512), columns=(3840, 3840), multiprocessors=(108, 170),
        architectures=frozenset({"sm_80", "sm_90", "sm_120"}), pieces=15,
        reason="8 tiles of outputs are few for so many multiprocessors: pieces of one stage make 120 blocks "
        "(predicted: 19 to 31 % less)",
    ),
    Pieces(
        outputs=(2048, 2048), columns=(3840, 3840), multiprocessors=(24, 32), pieces=1,
        reason="32 blocks are one for each multiprocessor, which has enough bytes under way for the memory, "
        "and no second kernel has to add pieces (predicted: 13 to 26 % less than in 2)",
    ),
    Pieces(
        outputs=(2048, 2048), columns=(3840, 3840), multiprocessors=(48, 48), pieces=2,
        reason="64 blocks fit at once, 128 are 1.33 waves (predicted: 6 % less)",
    ),
    Pieces(
        outputs=(3840, 3840), columns=(8192, 15360), multiprocessors=(28, 28), pieces=4,
        reason="60 blocks are 1.07 waves on 28 multiprocessors: for half the time 4 of them would be alone. "
        "In quarters that tail is short (predicted: 10 to 13 % less)",
    ),
    Pieces(
        outputs=(3840, 4096), columns=(3840, 4096), multiprocessors=(34, 48), pieces=1,
        reason="60 or 64 blocks are one for each multiprocessor and more, enough bytes under way for the memory, "
        "and no second kernel has to add pieces (predicted: 9 to 17 % less than in 2)",
    ),
    Pieces(
        outputs=(3840, 3840), columns=(8192, 8192), multiprocessors=(36, 48), pieces=1,
        reason="as the row before (predicted: 6 to 12 % less than in 2)",
    ),
    Pieces(
        outputs=(3840, 3840), columns=(15360, 15360), multiprocessors=(48, 48), pieces=1,
        reason="60 blocks keep the memory busy without a second wave or kernel (predicted: 8 % less than in 2)",
    ),
    Pieces(
        outputs=(4096, 4096), columns=(3840, 3840), multiprocessors=(82, 82), pieces=2,
        reason="128 blocks fit at once, 256 are 1.56 waves (predicted: 7 % less)",
    ),
    Pieces(
        outputs=(3840, 3840), columns=(8192, 8192), multiprocessors=(128, 170), architectures=_GEFORCE, pieces=3,
        reason="180 blocks fit at once or nearly, 8 pieces only cost more to add (predicted: 5 % less)",
    ),
    Pieces(
        outputs=(3840, 3840), columns=(8192, 15360), multiprocessors=(132, 132), architectures=frozenset({"sm_90"}), pieces=4,
        reason="240 blocks fit at once, as the multiprocessors of an H100 hold three or four (predicted: 8 % less than in 8)",
    ),
    Pieces(
        outputs=(8192, 8704), columns=(3840, 3840), multiprocessors=(68, 128), architectures=_GEFORCE, pieces=1,
        reason="128 or 136 blocks are one for each multiprocessor and more, enough bytes under way for the memory, "
        "and no second kernel has to add pieces (predicted: 11 to 19 % less than in 2)",
    ),
    Pieces(
        outputs=(8192, 8192), columns=(3840, 3840), multiprocessors=(132, 132), architectures=frozenset({"sm_90"}), pieces=2,
        reason="256 blocks fit at once, as the multiprocessors of an H100 hold three or four (predicted: 8 % less than in 4)",
    ),
    Pieces(
        outputs=(15360, 15360), columns=(3840, 3840), multiprocessors=(128, 170), pieces=1,
        reason="240 blocks are one for each multiprocessor and more, enough bytes under way for the memory, "
        "and no second kernel has to add pieces (predicted: 9 to 22 % less than in 2)",
    ),
)  # fmt: skip

R = TypeVar("R", bound=Row)


def _first(table: Sequence[R], *place: int | str) -> R | None:
    return next((row for row in table if row.fits(*place)), None)  # type: ignore[arg-type]


def choice(rows: int, N: int, K: int, multiprocessors: int, architecture: str) -> Choice:
    """The row of CHOICES for a product of `rows` rows of x with an N x K weight."""
    of_rows = [row for row in CHOICES if row.rows[0] <= rows <= row.rows[1]]
    found = _first(of_rows, N, K, multiprocessors, architecture)
    assert found is not None
    return found


@lru_cache(maxsize=1024)
def pieces(N: int, K: int, multiprocessors: int, architecture: str) -> int:
    """What gemma4_linear is told: pieces of K, or 0 for its own rule."""
    row = _first(PIECES, N, K, multiprocessors, architecture)
    return row.pieces if row else 0


def schedule(N: int, K: int, multiprocessors: int, architecture: str, *, bits: int) -> str:
    """How the kernels cut a product, and why, for `explain`."""
    row = _first(PIECES, N, K, multiprocessors, architecture)
    number = cut(K, row.pieces, bits)[0] if row else halved(N, K, multiprocessors, bits)
    blocks = -(-N // OUTPUTS) * number
    why = row.reason if row else "K is halved until there are two blocks for each multiprocessor, or pieces get short"
    return f"K in {number} piece{'s' * (number > 1)}, {blocks} blocks on {multiprocessors} multiprocessors: {why}"


def stages(K: int, bits: int = 4) -> int:
    return -(-K // stage_columns(bits))


def cut(K: int, number: int, bits: int = 4) -> tuple[int, int]:
    """(pieces, stages of the longest) if K is to be cut into `number` pieces: they are whole stages, so there may be fewer."""
    all_stages = stages(K, bits)
    longest = -(-all_stages // min(number, all_stages))
    return -(-all_stages // longest), longest


def halved(N: int, K: int, multiprocessors: int, bits: int = 4) -> int:
    """Pieces of K by the library's own rule."""
    blocks, number, longest = -(-N // OUTPUTS), 1, stages(K, bits)
    while blocks * number < _BLOCKS * multiprocessors and longest >= 2 * _FEWEST_STAGES:
        number, longest = 2 * number, -(-longest // 2)
    return -(-stages(K, bits) // longest)
