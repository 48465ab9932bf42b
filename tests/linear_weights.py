"""Quantised weights of every scheme with numbers like a model's, none of them from a file."""

from __future__ import annotations

import torch

from gemma4_kernels import QuantizedWeight
from gemma4_kernels.linear.schemes import SCHEMES, expected_tensors

SHAPES = {scheme: (70, 512 if layout.scales in ("int8", "six_bit") else 160) for scheme, layout in SCHEMES.items()}
"""N and K of which neither is a multiple of a tile."""


def random_weight(
    scheme: str, shape: tuple[int, int] | None = None, group: int | None = None, seed: int = 0
) -> QuantizedWeight:
    """Codes of all kinds; scales around 0.05, powers of two within a few of one."""
    rng = torch.Generator().manual_seed(seed)
    layout, shape = SCHEMES[scheme], shape or SHAPES[scheme]
    group = group or (layout.group_sizes[0] if layout.group_sizes else 32)
    tensors = {}
    for name, (size, dtypes) in expected_tensors(layout, shape, group).items():
        low, high = {
            torch.int32: (-(2**31), 2**31), torch.int8: (-128, 128),
            torch.uint8: (124, 132) if layout.scales == "e8m0" else (0, 16 if name == "zeros" else 256),
        }.get(dtypes[0], (0, 0))  # fmt: skip
        if high:
            tensors[name] = torch.randint(low, high, size, generator=rng).to(dtypes[0])
        else:
            tensors[name] = (0.05 * torch.randn(size, generator=rng)).to(dtypes[0])
    return QuantizedWeight(scheme=scheme, shape=shape, group_size=group, **tensors)
