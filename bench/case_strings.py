"""What the cases of all families are: strings, each once, from which inputs are drawn."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

# Beyond this many operations the reference, in fp64 on the CPU, takes minutes or all memory, and a case is held against it
# on an excerpt.
EXCERPT_ABOVE = 1e9

QUICK = frozenset({"quick", "full"})
BENCH, BENCH_QUICK = frozenset({"bench"}), frozenset({"bench", "bench-quick"})
"""Tags of cases for correctness that are quick too, of cases that are worth timing, and of those that are timed quickly."""

T = TypeVar("T")


class CaseString:
    """For dataclasses with an `op`: op(field=value,...). What is at its default is left out, and so are the tags."""

    op: str

    def __str__(self) -> str:
        every: Any = fields(self)  # type: ignore[arg-type]
        shown = [f.name for f in every if f.name not in ("op", "tags") and getattr(self, f.name) != f.default]
        return f"{self.op}({','.join(f'{name}={getattr(self, name)}' for name in shown)})"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    @property
    def result_depends_on_the_noise(self) -> bool:
        """Whether it is sampled: then a baseline, which draws its own random numbers, is right with another result."""
        return False


def each_once(cases: Iterable[T]) -> tuple[T, ...]:
    """Of cases with one string, the last."""
    return tuple({str(case): case for case in cases}.values())
