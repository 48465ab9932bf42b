"""The Triton kernel in front of attention, compiled for cards that are not here: no spills, no fused multiply-adds."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import environment
from gemma4_kernels.bench import sass, static

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("a process with TRITON_INTERPRET=1 interprets kernels and compiles none", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)

from dataclasses import replace

from gemma4_kernels.attention.triton.prologue import plan

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


def launch(
    dtype, head_dim, kv_heads, keys=True, paged=True, heads=16, batch=2, rows=3, pages=9, page_size=16, columns=8
):
    """A layer as data: tensors of the meta device hold no numbers."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    merged = empty(batch, rows, heads + 2 * kv_heads, head_dim)
    q, k, v = merged.split([heads, kv_heads, kv_heads], dim=2)
    weight = empty(head_dim, dtype=torch.bfloat16)
    cos = empty(batch, rows, head_dim)
    cache = empty(pages, page_size, kv_heads, head_dim) if paged else empty(batch, 4096, kv_heads, head_dim)
    table = empty(batch, columns, dtype=torch.int32) if paged else None
    return plan(
        q, k if keys else None, v, weight, weight if keys else None, cos, cos, cache if keys else None, cache,
        empty(batch, dtype=torch.int32), table, 1e-6, empty(batch, rows, heads, head_dim),
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "keys", "paged"),
    [(256, 8, True, True), (256, 8, True, False), (512, 1, True, False), (512, 1, False, True), (512, 1, False, False)],
)
def test_a_layer_of_the_12b_compiles_without_spills(architecture, head_dim, kv_heads, keys, paged):
    made = launch(torch.bfloat16, head_dim, kv_heads, keys, paged)
    compiled = made.compile(architecture)
    (reading,) = static.read(
        static.CompiledKernel(
            made.name, architecture, compiled.asm["cubin"], compiled.metadata.shared, made.num_warps
        )
    )  # fmt: skip
    assert (reading.stack_bytes, reading.spill_instructions) == (0, 0)
    assert reading.registers <= 64  # eight blocks of four warps on an SM, enough to cover the latency of its memory
    # A head within a warp: its sum crosses no warps, and no thread waits for another.
    assert reading.shared_bytes == 0
    assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes at a time
    assert "ld.global.b16" not in compiled.asm["ptx"]
    assert "st.global.v4" in compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_other_dtypes_and_an_odd_head_dim_compile(dtype):
    for head_dim, keys in ((80, True), (256, True), (512, False)):
        made = launch(dtype, head_dim, 2, keys)
        compiled = made.compile("sm_86")
        (reading,) = static.read(static.CompiledKernel(made.name, "sm_86", compiled.asm["cubin"], 0, made.num_warps))
        assert (reading.stack_bytes, reading.spill_instructions) == (0, 0)


@pytest.mark.parametrize("paged", [False, True])
def test_sizes_of_one_compile(paged):
    """Triton takes an argument of 1 as a constant of the kernel."""
    ones = dict.fromkeys(("heads", "batch", "rows", "pages", "page_size", "columns"), 1)
    launch(torch.bfloat16, 2, 1, paged=paged, **ones).compile("sm_86")
    launch(torch.bfloat16, 512, 1, paged=paged, batch=1, rows=1).compile("sm_86")


def test_fp32_products_keep_their_rounding():
    """A fused a * cos + b * sin rounds once where PyTorch rounds twice."""
    made = launch(torch.float32, 256, 8)
    assert "fma." not in made.compile("sm_86").asm["ptx"]
    fused = replace(made, enable_fp_fusion=True)
    assert "fma." in fused.compile("sm_86").asm["ptx"]
