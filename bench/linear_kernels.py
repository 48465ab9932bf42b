"""The quantised linear kernels compiled for an architecture: for `bench --static` and tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from gemma4_kernels.bench.linear_inputs import meta_weight
from gemma4_kernels.bench.static import CompiledKernel, LazyKernel
from gemma4_kernels.linear.triton import argmax, embedding, geglu, linear
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
# The fused forms: at decode for what people download, then for every way to make a value; in tiles of many rows once each.
_GEGLU = [
    *((rows, scheme) for scheme in ("Q4_0", "W4A16", "Q4_K") for rows in (1, 16)),
    *((1, scheme) for scheme in ("Q6_K", "Q5_0", "Q8_0", "IQ4_XS", "MXFP4", "GPTQ", "NF4", "NF4_NESTED", "MLX")),
    (64, "Q4_0"),
    (128, "Q4_0"),
    (128, "Q4_K"),
    *((128, scheme) for scheme in ("IQ4_XS", "MXFP4", "NF4", "NF4_NESTED")),
]
_ARGMAX = [
    *((rows, scheme) for scheme in ("Q6_K", "Q4_0") for rows in (1, 16)),
    *((1, scheme) for scheme in ("Q8_0", "Q4_K", "NF4_NESTED")),
    (128, "Q6_K"),
]
_EMBEDDING = ("Q6_K", "Q4_0", "Q8_0", "Q4_K", "GPTQ", "IQ4_XS", "NF4_NESTED")
_TOKENS = 512


def launches(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Launch, QuantizedWeight, int]]:
    """(name, launch, weight, rows of x) of every kernel."""
    for rows, where, scheme in _CALLS:
        weight = meta_weight(scheme, _SHAPES[where])
        N, K = weight.shape
        x, out = (torch.empty((rows, size), dtype=dtype, device="meta") for size in (K, N))
        (launch, *_) = linear.plan(x, weight, None, out, _MULTIPROCESSORS)
        yield f"linear {scheme} {N} x {K}, {rows} rows", launch, weight, rows


def fused_launches(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Launch, QuantizedWeight, int]]:
    """The same of the kernels that do more than a product."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    N, K = _SHAPES["gate"]
    for rows, scheme in _GEGLU:
        gate, up = meta_weight(scheme, (N, K)), meta_weight(scheme, (N, K))
        plan = geglu.plan(empty(rows, K), gate, up, empty(rows, N), _MULTIPROCESSORS)
        assert plan is not None, "K is cut, of a weight with so many outputs"
        (launch,) = plan
        yield f"geglu {scheme} 2 x {N} x {K}, {rows} rows", launch, gate, rows
    yield "combine, 4 rows", geglu.plan_combine(empty(4, N), empty(4, N), empty(4, N)), gate, 4
    N, K = _SHAPES["head"]
    for rows, scheme in _ARGMAX:
        weight = meta_weight(scheme, (N, K))
        found = argmax.plan(empty(rows, K), weight, empty(rows, of=torch.int64), _MULTIPROCESSORS) or ()
        for step, launch in zip(("argmax", "argmax of tiles"), found, strict=True):
            yield f"{step} {scheme} {N} x {K}, {rows} rows", launch, weight, rows
    for scheme in _EMBEDDING:
        weight = meta_weight(scheme, (N, K))
        launch = embedding.plan(empty(_TOKENS, of=torch.int64), weight, empty(_TOKENS, K))
        yield f"embedding {scheme} {N} x {K}, {_TOKENS} tokens", launch, weight, _TOKENS


def compile_launch(name: str, launch: Launch, weight: QuantizedWeight, rows: int, architecture: str) -> CompiledKernel:
    done = launch.compile(architecture)
    compiled = CompiledKernel(
        name, architecture, done.asm["cubin"], shared_bytes=done.metadata.shared, warps=launch.num_warps
    )
    if "BLOCK_M" not in launch.constants:  # it multiplies nothing, and has no loop over weights
        return compiled
    columns = launch.constants["WORDS"] * (4 if weight.layout.bits == 8 else 8)
    weights = launch.constants["BLOCK_N"] * columns * (2 if launch.kernel is geglu.geglu_kernel else 1)
    return replace(
        compiled,
        loop_bytes=round(weights * weight.bits_per_weight / 8),
        loop_macs=weights * min(rows, launch.constants["BLOCK_M"]),
        main_loop="copies",
    )


def provide(architecture: str) -> Iterator[LazyKernel]:
    """For `bench --static`."""
    for name, launch, weight, rows in chain(launches(), fused_launches()):
        yield LazyKernel(name, partial(compile_launch, name, launch, weight, rows, architecture))
