"""Small Triton kernels compiled without a GPU, as a family would provide its own.

Importing this module imports Triton and compiles kernels only where TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma4_kernels.bench.static import CompiledKernel, LazyKernel

BLOCK = 1024
WARPS = 4
# Products of a 16-row tile, as in decoding, and of a 64-row tile, for which sm_90 has an instruction of four warps.
KEYS, DIM = 64, 64


@triton.jit
def summed_rows(x_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    """One loop that adds rows of BLOCK numbers."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(num_rows):
        total += tl.load(x_ptr + row * BLOCK + column).to(tl.float32)
    tl.store(out_ptr + column, total)


@triton.jit
def products(q_ptr, k_ptr, out_ptr, num_tiles, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr):
    """One loop that reads tiles of KEYS x DIM bf16 numbers and multiplies each by the same ROWS x DIM."""
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    q = tl.load(q_ptr + row[:, None] * DIM + dim[None, :])  # [ROWS, DIM]
    total = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    for tile in range(num_tiles):
        k = tl.load(k_ptr + tile * KEYS * DIM + key[None, :] * DIM + dim[:, None])  # [DIM, KEYS]
        total += tl.dot(q, k)
    tl.store(out_ptr + row[:, None] * KEYS + key[None, :], total)


@triton.jit
def marked_rows(x_ptr, out_ptr, num_rows, first_marked, BLOCK: tl.constexpr):
    """A loop with a branch inside: some rows are also stored."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(num_rows):
        x = tl.load(x_ptr + row * BLOCK + column)
        if row >= first_marked:
            # Long enough that ptxas jumps over it and does not merely switch it off.
            y = x
            for _ in tl.static_range(8):
                y = tl.exp2(y * x)
            tl.store(out_ptr + row * BLOCK + column, y)
        total += x
    tl.store(out_ptr + column, total)


@triton.jit
def two_paths(
    q_ptr, k_ptr, out_ptr, num_full, num_tiles, length, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr
):
    """A fast loop and a general one that masks; a pass of both reads and multiplies the same."""
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    q = tl.load(q_ptr + row[:, None] * DIM + dim[None, :])  # [ROWS, DIM]
    total = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    for tile in range(num_full):
        k = tl.load(k_ptr + tile * KEYS * DIM + key[None, :] * DIM + dim[:, None])  # [DIM, KEYS]
        total += tl.dot(q, k)
    for tile in range(num_full, num_tiles):
        k = tl.load(k_ptr + tile * KEYS * DIM + key[None, :] * DIM + dim[:, None])  # [DIM, KEYS]
        total += tl.where(tile * KEYS + key[None, :] < length, tl.exp2(tl.dot(q, k)), 0.0)
    tl.store(out_ptr + row[:, None] * KEYS + key[None, :], total)


def compiled(kernel, architecture, types, constants, aligned=True, **options):
    """`types` are Triton's names by parameter; pointers are multiples of 16 bytes unless `aligned` is False."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if aligned and signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS} | options)


def as_kernel(name, architecture, found, **more):
    return CompiledKernel(name, architecture, found.asm["cubin"], found.metadata.shared, WARPS, **more)


def summed(architecture, dtype="fp32", aligned=True, block=BLOCK):
    types = {"x_ptr": f"*{dtype}", "out_ptr": "*fp32", "num_rows": "i32"}
    found = compiled(summed_rows, architecture, types, {"BLOCK": block}, aligned)
    bits = {"fp32": 32, "bf16": 16, "i8": 8}[dtype]
    return as_kernel("summed_rows", architecture, found, loop_bytes=block * bits // 8)


def multiplied(architecture, rows, dtype="bf16", **options):
    """5 of `rows` rows are meant to be rows of a request."""
    types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "out_ptr": "*fp32", "num_tiles": "i32"}
    constants = {"ROWS": rows, "KEYS": KEYS, "DIM": DIM}
    found = compiled(products, architecture, types, constants, **options)
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    return as_kernel(
        f"products {rows}", architecture, found, loop_bytes=KEYS * DIM * size, loop_macs=5 * KEYS * DIM,
    )  # fmt: skip


def marked(architecture):
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32", "first_marked": "i32"}
    found = compiled(marked_rows, architecture, types, {"BLOCK": BLOCK})
    return as_kernel("marked_rows", architecture, found, loop_bytes=4 * BLOCK)


def with_two_paths(architecture, main_loop):
    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("num_full", "num_tiles", "length"), "i32")
    found = compiled(two_paths, architecture, types, {"ROWS": 16, "KEYS": KEYS, "DIM": DIM})
    return as_kernel("two_paths", architecture, found, loop_bytes=2 * KEYS * DIM, main_loop=main_loop)


def provide(architecture):
    yield summed(architecture)
    yield LazyKernel("products 16", lambda: multiplied(architecture, 16))


def provide_nothing_good(architecture):
    raise RuntimeError("the compiler is on strike\nand this is its second line")


def provide_one_bad(architecture):
    yield LazyKernel("bad", lambda: provide_nothing_good(architecture))
    yield LazyKernel("products 16", lambda: multiplied(architecture, 16))


def provide_too_few_registers(architecture):
    yield LazyKernel("products", lambda: multiplied(architecture, 16, maxnreg=24))


def provide_damaged(architecture):
    yield CompiledKernel("damaged", architecture, b"no cubin at all")
    yield multiplied(architecture, 16)
