"""Quantised weights with numbers like a model's, none of them from a file: all the codes there are, cheaply."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.linear.schemes import SCHEMES, expected_tensors
from gemma4_kernels.linear.weight import QuantizedWeight

SCALE = 0.05


def default_group(scheme: str) -> int:
    """32 columns, or the only size that the scheme has."""
    sizes = SCHEMES[scheme].group_sizes
    return sizes[0] if sizes else 32


def random_weight(
    scheme: str, shape: tuple[int, int], group: int = 0, seed: int = 0, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Codes of all kinds; scales around SCALE, powers of two within a few of one. group 0: `default_group`."""
    rng = generator or torch.Generator().manual_seed(seed)
    layout = SCHEMES[scheme]

    def draw(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        low, high = {
            torch.int32: (-(2**31), 2**31), torch.int8: (-128, 128),
            torch.uint8: (124, 132) if layout.scales == "e8m0" else (0, 16 if name == "zeros" else 256),
        }.get(dtype, (0, 0))  # fmt: skip
        if high:
            return torch.randint(low, high, size, generator=rng, dtype=dtype)
        return (SCALE * torch.randn(size, generator=rng)).to(dtype)

    return _weight(scheme, shape, group, draw)


def meta_weight(scheme: str, shape: tuple[int, int], group: int = 0) -> QuantizedWeight:
    """A weight without numbers."""
    return _weight(scheme, shape, group, lambda name, size, dtype: torch.empty(size, dtype=dtype, device="meta"))


def weight_bytes(scheme: str, shape: tuple[int, int], group: int = 0) -> int:
    """Bytes of its tensors."""
    expected = expected_tensors(SCHEMES[scheme], shape, group or default_group(scheme))
    return sum(prod(size) * dtypes[0].itemsize for size, dtypes in expected.values())


def _weight(
    scheme: str, shape: tuple[int, int], group: int, draw: Callable[[str, tuple[int, ...], torch.dtype], Tensor]
) -> QuantizedWeight:
    group = group or default_group(scheme)
    tensors: dict[str, Any] = {
        name: draw(name, size, dtypes[0])
        for name, (size, dtypes) in expected_tensors(SCHEMES[scheme], shape, group).items()
    }
    return QuantizedWeight(scheme=scheme, shape=shape, group_size=group, **tensors)
