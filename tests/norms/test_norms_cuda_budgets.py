"""The machine code of the compiled norms and of the prologue, for cards that are not here: registers, width of accesses."""

from __future__ import annotations

import re

import pytest
from budgets import assert_nothing_in_local_memory, compiled_cubins

from gemma4_kernels.bench import sass, static

# (kernel, type, numbers that tell its instances apart): the most registers of a thread.
MOST_REGISTERS = {
    # 1024 threads of a block must fit into 65536 registers; rows of up to 8192 numbers leave room for three blocks of 480.
    **{("sandwich_norm", dtype, 1): 48 for dtype in ("Bf16", "Fp16", "Fp32")},
    **{("sandwich_norm", dtype, 2): 64 for dtype in ("Bf16", "Fp16", "Fp32")},
    # Seven blocks of four warps on a multiprocessor, enough to cover the latency of its memory. sm_120 takes 66 of fp16, the
    # others 64.
    **{("prologue", dtype, lanes): 72 for dtype in ("Bf16", "Fp16", "Fp32") for lanes in (16, 32)},
}
_KERNEL = re.compile(r"(sandwich_norm|prologue)_kernelIN\w*?(Bf16|Fp16|Fp32)ELi(\d+)E")


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def kernels(request) -> dict[tuple, tuple[static.Reading, str]]:
    """(kernel, type, number) -> its reading, and its instructions as text."""
    found = {}
    for cubin in compiled_cubins(request.param, "sandwich_norm_kernel", "prologue_kernel"):
        listings = sass.parse_listing(sass.disassemble(cubin))
        for reading in static.read(static.CompiledKernel("norms", request.param, cubin)):
            kernel, dtype, number = _KERNEL.search(reading.function).groups()
            found[kernel, dtype, int(number)] = reading, "\n".join(map(str, listings[reading.function]))
    return found


def test_every_kernel_is_there_and_keeps_to_its_registers(kernels):
    assert kernels.keys() == MOST_REGISTERS.keys()
    for name, (reading, _) in kernels.items():
        assert_nothing_in_local_memory(str(name), reading)
        assert reading.registers <= MOST_REGISTERS[name], f"{name}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, name


def test_rows_are_taken_16_bytes_at_a_time(kernels):
    """Beside the loads one by one of rows that lie elsewhere. What a 16-bit thread has is twice as much in fp32."""
    for (kernel, dtype, number), (_, text) in kernels.items():
        times = 2 if dtype == "Fp32" else 1
        # x and residual, in and hidden and normed, out of each eight; low and high halves of the head, cos and sin.
        reads, writes = (2 * number, 2 * number) if kernel == "sandwich_norm" else (2 * 3, 2)
        assert len(re.findall(r"\bLDG\.E\S*\.128", text)) >= reads * times, (kernel, dtype)
        assert len(re.findall(r"\bSTG\.E\S*\.128", text)) >= writes * times, (kernel, dtype)


def test_sums_of_squares_are_not_fused(kernels):
    """Squares are rounded before they are added; what is fused belongs to divisions and square roots."""
    for name, (_, text) in kernels.items():
        squares = len(re.findall(r"\bFMUL\S*\s+(R\d+), (R\d+), \2\b", text))
        assert squares >= 8, f"{name}: {squares} squares"
