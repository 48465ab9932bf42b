"""Random quantised weights of awkward shapes, one for each scheme."""

from __future__ import annotations

from gemma4_kernels import QuantizedWeight
from gemma4_kernels.bench import linear_inputs
from gemma4_kernels.linear.schemes import SCHEMES

SHAPES = {scheme: (70, 512 if layout.scales in ("int8", "six_bit") else 160) for scheme, layout in SCHEMES.items()}
"""N and K of which neither is a multiple of a tile."""


def random_weight(
    scheme: str, shape: tuple[int, int] | None = None, group: int | None = None, seed: int = 0
) -> QuantizedWeight:
    return linear_inputs.random_weight(scheme, shape or SHAPES[scheme], group or 0, seed)
