"""The quantised linear kernels compiled for an architecture: for `bench --static` and tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gemma4_kernels.bench.static import CompiledKernel, LazyKernel
from gemma4_kernels.linear.schemes import SCHEMES, expected_tensors
from gemma4_kernels.linear.triton import linear
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.triton_common.launch import Launch

# The gate of the 12B's MLP, and its head: what most of a token's time goes to.
_SHAPES = {"gate": (15360, 3840), "head": (262144, 3840)}
_MULTIPROCESSORS = 28
# (rows of x, shape, scheme): what people download at decode and verification, then every way to make a value once.
_CALLS = [
    *((rows, "gate", scheme) for scheme in ("Q4_0", "W4A16", "Q4_K") for rows in (1, 4, 8, 16)),
    *((rows, "head", "Q6_K") for rows in (1, 16)),
    *((1, "gate", scheme) for scheme in ("Q5_0", "Q8_0", "IQ4_XS", "MXFP4", "GPTQ", "NF4", "NF4_NESTED", "MLX")),
    (64, "gate", "Q4_0"),
    (128, "gate", "Q4_0"),
]


def meta_weight(scheme: str, shape: tuple[int, int]) -> QuantizedWeight:
    """A weight without numbers."""
    layout = SCHEMES[scheme]
    group = layout.group_sizes[0] if layout.group_sizes else 32
    tensors: dict[str, Any] = {
        name: torch.empty(size, dtype=dtypes[0], device="meta")
        for name, (size, dtypes) in expected_tensors(layout, shape, group).items()
    }
    return QuantizedWeight(scheme=scheme, shape=shape, group_size=group, **tensors)


def launches(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Launch, QuantizedWeight, int]]:
    """(name, launch, weight, rows of x) of every kernel."""
    for rows, where, scheme in _CALLS:
        weight = meta_weight(scheme, _SHAPES[where])
        N, K = weight.shape
        x, out = (torch.empty((rows, size), dtype=dtype, device="meta") for size in (K, N))
        (launch, *_) = linear.plan(x, weight, None, out, _MULTIPROCESSORS)
        yield f"linear {scheme} {N} x {K}, {rows} rows", launch, weight, rows


def compile_launch(name: str, launch: Launch, weight: QuantizedWeight, rows: int, architecture: str) -> CompiledKernel:
    done = launch.compile(architecture)
    columns = launch.constants["WORDS"] * (4 if weight.layout.bits == 8 else 8)
    weights = launch.constants["BLOCK_N"] * columns
    return CompiledKernel(
        name, architecture, done.asm["cubin"], shared_bytes=done.metadata.shared, warps=launch.num_warps,
        loop_bytes=round(weights * weight.bits_per_weight / 8),
        loop_macs=weights * min(rows, launch.constants["BLOCK_M"]), main_loop="copies",
    )  # fmt: skip


def provide(architecture: str) -> Iterator[LazyKernel]:
    """For `bench --static`."""
    for name, launch, weight, rows in launches():
        yield LazyKernel(name, partial(compile_launch, name, launch, weight, rows, architecture))
