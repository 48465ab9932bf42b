"""The machine code of the compiled products, for cards that are not here: registers, memory, and instructions for the bytes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from budgets import assert_fits

from gemma4_kernels.bench import cuda_kernels, cuda_layers, sass, static

if cuda_kernels.module() is None:
    pytest.skip("gemma4_kernels._C is not built", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)


class Kernel(NamedTuple):
    x: str
    scales: str
    values: str
    rows: int
    """Of x, at most."""


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request) -> dict[Kernel, static.Reading]:
    found = {}
    try:
        for compiled in cuda_kernels.provide(request.param):
            (reading,) = static.read(compiled)
            assert_fits(compiled.name, reading)
            if match := cuda_kernels.LINEAR.search(reading.function):
                values = cuda_kernels.VALUES[int(match["values"])]
                rows = cuda_layers.TILE_ROWS * int(match["tiles"])
                found[Kernel(match["x"], match["scales"], values, rows)] = reading
    except static.UnavailableError as reason:
        pytest.skip(str(reason))
    return found


def test_every_kernel_is_there_and_leaves_room_for_another_block(readings):
    # Types of x, tiles of 8 rows; three kinds of values with plain scales of three types, six-bit ones, tables with four kinds.
    assert len(readings) == 2 * 2 * (3 * 3 + 1 + 4)
    for kernel, reading in readings.items():
        # Two blocks at a time, as many as consumer cards have memory for.
        assert 2 * 32 * cuda_layers.WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel


def stages_in_a_pass(kernel: Kernel, loop: sass.Loop) -> int:
    """16 mma of the weight for each tile of x in a stage, and a warp's 4 for sums of x."""
    tiles = kernel.rows // cuda_layers.TILE_ROWS
    return loop.matrix_instructions // ((20 if kernel.values == "offsets" else 16) * tiles)


def test_codes_and_x_are_copied_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        stages = stages_in_a_pass(kernel, loop)
        assert stages == cuda_layers.ring_stages(kernel.rows), kernel
        # Of a thread and stage: 4 chunks of codes and 2 of each tile of x.
        assert loop.copies == {16: stages * (4 + 2 * kernel.rows // cuda_layers.TILE_ROWS)}, kernel
        assert loop.local_accesses == 0, kernel


def test_a_pass_takes_in_what_the_provider_says(readings):
    for kernel, reading in readings.items():
        done = sum(reading.main_loop.macs.values()) * cuda_layers.WARPS
        extra = 1.25 if kernel.values == "offsets" else 1  # products with ones
        assert reading.kernel.loop_macs * extra == done, kernel
        assert reading.kernel.loop_bytes * 2 * kernel.rows == reading.kernel.loop_macs, kernel


# Up to 8 and up to 16 rows of x. With plain scales, and six-bit ones.
MOST = {
    "centred": tuple(code.instructions for code in cuda_layers.PAPER.values()),
    "zeros": (22.0, 26.5), "offsets": (24.5, 33.0), "table": (39.5, 44.0),
}  # fmt: skip
MOST_SIX_BIT = (27.5, 36.0)


@pytest.mark.parametrize("readings", ["sm_86", "sm_89"], indirect=True)
def test_instructions_for_128_bytes_of_codes(readings):
    for kernel, reading in readings.items():
        instructions = reading.main_loop.instructions * cuda_layers.WARPS * static.LINE / reading.kernel.loop_bytes
        most = MOST_SIX_BIT if kernel.scales == "SixBit" else MOST[kernel.values]
        assert instructions <= most[kernel.rows // cuda_layers.TILE_ROWS - 1], f"{kernel}: {instructions:.2f}"


def test_registers_are_those_that_the_table_counts_on(readings):
    for kernel, reading in readings.items():
        if kernel.values == "centred":
            assert reading.registers <= cuda_layers.PAPER[kernel.rows].registers, kernel


@pytest.mark.parametrize("readings", ["sm_86"], indirect=True)
def test_tensor_cores_keep_up_with_the_memory_of_a_3060_at_16_rows(readings):
    """mma.m16n8k16 summed in fp32 takes 32 clocks of a scheduler's tensor core there, as the data sheet's rate has it."""
    prediction = static.predict(readings[Kernel("Bf16", "Fp16", "centred", 16)], static.cards.CARDS["rtx 3060"])
    assert prediction.tensor_ns == pytest.approx(2 * 32 / (28 * 4 * 1.777))
    # 128 bytes of codes come with 16 of scales where a group has 32 columns, and with 4 where it has 128.
    assert prediction.tensor_ns < 0.85 * prediction.dram_ns * (128 + 16) / 128
    assert prediction.tensor_ns < 0.90 * prediction.dram_ns * (128 + 4) / 128
