"""The attention kernels compiled for an architecture, one for each configuration of the tables: for `bench --static` and tests.

Plans are made from tensors of the meta device, which hold no numbers, by the launchers that serve real calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.attention.triton import append, flash, k_eq_v
from gemma4_kernels.attention.triton.call import AttentionCall
from gemma4_kernels.bench.static import CompiledKernel, LazyKernel
from gemma4_kernels.triton_common.devices import Card
from gemma4_kernels.triton_common.launch import Launch

_KEYS, _PAGE, _MULTIPROCESSORS = 4096, 16, 28


class Shape(NamedTuple):
    """A call that reaches one configuration."""

    kernel: str
    head_dim: int
    rows: int
    heads: int
    kv_heads: int
    dtype: torch.dtype = torch.bfloat16
    paged: bool = False
    blocks: bool = False

    def __str__(self) -> str:
        name = f"{self.kernel} d{self.head_dim} {self.heads}/{self.kv_heads} heads, {self.rows} rows"
        extras = [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.bfloat16 else []
        extras += ["paged"] * self.paged + ["blocks"] * self.blocks
        return " ".join([name, *extras])


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """Every row of the tables, with the head counts of the models that have it."""
    for head_dim in (64, 128):
        yield Shape("prefill", head_dim, 512, 16, 8, dtype)
    yield Shape("decode", 128, 1, 16, 8, dtype)
    for paged in (False, True):
        for rows in (512, 1, 16):
            yield Shape("prefill" if rows == 512 else "decode", 256, rows, 16, 8, dtype, paged)
        for rows in (512, 1, 5):
            yield Shape("prefill" if rows == 512 else "decode", 512, rows, 16, 1, dtype, paged)
            kernel = "k_eq_v prefill" if rows == 512 else "k_eq_v decode"
            yield Shape(kernel, 512, rows, 16, 1, dtype, paged)
    for rows in (512, 16):
        yield Shape("prefill" if rows == 512 else "decode", 256, rows, 16, 8, dtype, blocks=True)


def plan(shape: Shape, architecture: str) -> list[Launch]:
    """What a call of this shape launches on the architecture."""

    def new(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    card = Card(architecture, _MULTIPROCESSORS)
    q = new(1, shape.rows, shape.heads, shape.head_dim)
    cache = new(*((_KEYS // _PAGE, _PAGE) if shape.paged else (1, _KEYS)), shape.kv_heads, shape.head_dim)
    call = AttentionCall(
        q, cache, cache, batch=1, num_rows=shape.rows, capacity=_KEYS, scale=1.0,
        left=-1 if shape.head_dim == 512 else 1023, right=0, lengths=new(1, dtype=torch.int32),
        table=new(1, _KEYS // _PAGE, dtype=torch.int32) if shape.paged else None,
        ids=new(1, _KEYS, dtype=torch.int32) if shape.blocks else None,
        first=new(1, dtype=torch.int64) if shape.blocks else None,
    )  # fmt: skip
    out, lse = call.results()
    if not shape.kernel.startswith("k_eq_v"):
        return flash.plan(call, out, lse, card)
    weight, inv_freq = new(shape.head_dim), new(shape.head_dim // 2, dtype=torch.float32)
    return k_eq_v.plan(call, weight, inv_freq, out, lse, card)


def launches(architecture: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Launch, Shape]]:
    """(name, launch, the call that it serves) of every kernel, each once."""
    seen = set()
    for shape in _shapes(dtype):
        for launch in plan(shape, architecture):
            name = str(shape)
            if launch.name in ("combine_kernel", "turns_kernel"):
                name = f"{launch.name.removesuffix('_kernel')} of {shape.kernel} d{shape.head_dim}"
            elif launch.constants.get("TURN_ALL"):
                name += ", any pairs"
            if name not in seen:
                seen.add(name)
                yield name, launch, shape
    cache = torch.empty((1, _KEYS, 8, 256), dtype=dtype, device="meta")
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    shape = Shape("append", 256, 1, 16, 8, dtype)
    yield "append d256", append.plan(cache, cache, cache[:, :1], cache[:, :1], lengths, None, None), shape


def compile_launch(name: str, launch: Launch, shape: Shape, architecture: str) -> CompiledKernel:
    done = launch.compile(architecture)
    sizes = {}
    # Kernels that walk over keys; that for any pairs has its loads in an inner loop, over columns.
    if "BLOCK_M" in launch.constants and not launch.constants.get("TURN_ALL"):
        keys: int = launch.constants["BLOCK_N"]
        caches = 1 if shape.kernel.startswith("k_eq_v") else 2
        packed = shape.rows * shape.heads // shape.kv_heads
        tile = launch.constants.get("TILES", 1) * launch.constants["BLOCK_M"]
        # Decode: the programs of one split read the same keys at the same time, from memory once and else from L2.
        programs = -(-packed // tile) if "decode" in shape.kernel else 1
        sizes = {
            "loop_bytes": keys * caches * shape.head_dim * shape.dtype.itemsize // programs,
            "loop_macs": min(tile, packed) * keys * 2 * shape.head_dim,
        }
    return CompiledKernel(
        name, architecture, done.asm["cubin"], shared_bytes=done.metadata.shared, warps=launch.num_warps,
        main_loop="copies" if launch.constants.get("STAGES", 1) > 1 else "loads", **sizes,
    )  # fmt: skip


def provide(architecture: str) -> Iterator[LazyKernel]:
    """For `bench --static`."""
    for name, launch, shape in launches(architecture):
        yield LazyKernel(name, partial(compile_launch, name, launch, shape, architecture))
