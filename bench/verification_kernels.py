"""The kernels of verification compiled for an architecture, and how often they read logits: for `bench --static` and tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gemma4_kernels.bench.static import CompiledKernel, LazyKernel
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.verification.triton import backend, tables

ROWS, VOCABULARY = 5, 262144
"""A bonus token and four drafts, Gemma's vocabulary."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ENDS = (1, 106)


def launches(dtype: str = "bf16") -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every kernel: by match, by rejection and block, with a drafter's logits and without."""
    for method, told in (
        ("match", False),
        ("rejection", True),
        ("rejection", False),
        ("block", True),
        ("block", False),
    ):
        for launch in plan(method, told, _DTYPES[dtype]):
            name = f"{method}{', told' if told else ''}: {launch.name.removesuffix('_kernel')}"
            yield f"{name}, {ROWS} x {VOCABULARY} {dtype}", launch


def plan(method: str, told: bool, dtype: torch.dtype, vocabulary: int = VOCABULARY) -> list[Launch]:
    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    logits, whole = empty(1, ROWS, vocabulary, of=dtype), empty(1, of=torch.int64)
    drafts = empty(1, ROWS - 1, of=torch.int64)
    draft_logits = empty(1, ROWS - 1, vocabulary, of=dtype) if told else None
    made, _ = backend.plan(
        logits, drafts, whole, empty(1), whole, empty(1), empty(1), empty(1), whole, whole, draft_logits, whole, _ENDS,
        method, 0,
    )  # fmt: skip
    return made


def compile_launch(name: str, launch: Launch, architecture: str) -> CompiledKernel:
    done = launch.compile(architecture)
    return CompiledKernel(
        name, architecture, done.asm["cubin"], shared_bytes=done.metadata.shared, warps=launch.num_warps
    )


def provide(architecture: str) -> Iterator[LazyKernel]:
    """For `bench --static`."""
    seen = set()
    for dtype in _DTYPES:
        for name, launch in launches(dtype):
            # Methods share what reads the tiles; dtypes differ in nothing but their loads.
            if (binary := binary_of(launch)) not in seen and (dtype == "bf16" or name.startswith("match")):
                seen.add(binary)
                yield LazyKernel(name, partial(compile_launch, name, launch, architecture))


def binary_of(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same machine code."""
    absent = tuple(
        name for name, value in launch.arguments.items() if value is None or (isinstance(value, int) and value == 1)
    )
    kinds = tuple(str(value.dtype) for value in launch.arguments.values() if isinstance(value, torch.Tensor))
    return launch.name, absent, kinds, tuple(sorted((key, str(value)) for key, value in launch.constants.items()))


# How often a row of logits is read ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """Bytes read of a row that is sampled, over its bytes. Single logits that are looked up again are not counted."""

    filters: str
    least: int
    most: int
    usual: str


# A search asks THRESHOLDS questions a read. The first read asks about the sample, and may learn nothing else.
_BITS_OF_A_READ = tables.THRESHOLDS.bit_length() - 1
_TOP_K_READS = 1 + -(-32 // _BITS_OF_A_READ)
_TOP_P_READS = 1 + -(-56 // _BITS_OF_A_READ)
READS = {
    "greedy": Reads("temperature 0", 1, 1, "1"),
    "sample": Reads("no filter", 1, 1, "1"),
    "lists": Reads(
        f"top_k up to {tables.LONGEST_TOP_K}, with any top_p and min_p", 1, 2 + _TOP_K_READS + _TOP_P_READS,
        "1; more only where equal scores at the k-th place outgrow a tile's list, or the vocabulary the lists",
    ),
    "min_p": Reads("min_p alone", 1, 2, "1 if the sample of the row survives, else 2"),
    "top_p": Reads(
        "top_p without top_k", 2, 2 + _TOP_P_READS, f"2 if the sample survives, or at most {tables.SCRATCH} tokens lie above it"
    ),
    "top_k": Reads(f"top_k above {tables.LONGEST_TOP_K}", 2, 2 + _TOP_K_READS, "as top_p"),
    "top_k and top_p": Reads(
        f"top_k above {tables.LONGEST_TOP_K} with top_p", 2, 2 + _TOP_K_READS + _TOP_P_READS, "2 to 5"
    ),
}  # fmt: skip


def remarks() -> list[str]:
    """For `bench --static`."""
    lines = [
        "",
        "Verification by match, bytes of logits read over bytes of the rows that are finished (derived; tests count them):",
    ]
    for each in READS.values():
        bounds = f"{each.least:.1f}" if each.least == each.most else f"{each.least:.1f} to at most {each.most:.1f}"
        usually = "" if each.least == each.most else f" (usually {each.usual})"
        lines.append(f"  {each.filters}: {bounds}{usually}")
    lines.append(
        "  rejection and block: one read more for a distribution that no lists hold, one for each row of p - q"
    )
    return lines
