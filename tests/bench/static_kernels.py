"""A small Triton kernel compiled without a GPU, as a family would provide its own."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma4_kernels.bench.static import CompiledKernel

BLOCK = 1024
WARPS = 4


@triton.jit
def summed_rows(x_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    """One loop that adds rows of BLOCK fp32 numbers."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(num_rows):
        total += tl.load(x_ptr + row * BLOCK + column)
    tl.store(out_ptr + column, total)


def provide(architecture):
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(
        summed_rows, signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": BLOCK},
    )  # fmt: skip
    compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
    yield CompiledKernel(
        "summed_rows", architecture, compiled.asm["cubin"], compiled.metadata.shared, WARPS, loop_bytes=4 * BLOCK
    )


def provide_nothing_good(architecture):
    raise RuntimeError("the compiler is on strike\nand this is its second line")
