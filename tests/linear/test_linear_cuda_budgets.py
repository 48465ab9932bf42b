"""The machine code of the compiled products, for cards that are not here: registers, memory, and instructions for the bytes.

The fused forms are these kernels too: what becomes of the sums is decided after the main loop.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from budgets import assert_fits

from gemma4_kernels.bench import cards, cuda_kernels, cuda_layers, sass, static
from gemma4_kernels.bench.cuda_kernels import WARPS, Stage

if cuda_kernels.module() is None:
    pytest.skip("gemma4_kernels._C is not built", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)


class Kernel(NamedTuple):
    x: str
    scales: str
    stage: Stage

    @property
    def copies_of_high(self) -> int:
        """Of a thread and stage."""
        return {5: 1, 6: 2}.get(self.stage.bits, 0)


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request) -> dict[Kernel, static.Reading]:
    found = {}
    try:
        for compiled in cuda_kernels.provide(request.param):
            if match := cuda_kernels.LINEAR.search(compiled.function):
                (reading,) = static.read(compiled)
                assert_fits(compiled.name, reading)
                found[Kernel(match["x"], match["scales"], cuda_kernels.stage_of(match))] = reading
    except static.UnavailableError as reason:
        pytest.skip(str(reason))
    return found


def test_every_kernel_is_there_and_leaves_room_for_another_block(readings):
    # Types of x, tiles of 8 rows; of 4 bits three kinds of values with plain scales of three types, six-bit ones, tables
    # with five kinds; three of 5 bits, and one each of 6 and 8.
    assert len(readings) == 2 * 2 * (3 * 3 + 1 + 5 + 3 + 1 + 1)
    for kernel, reading in readings.items():
        # Two blocks at a time, as many as consumer cards have memory for.
        assert 2 * 32 * WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel


def stages_in_a_pass(stage: Stage, loop: sass.Loop) -> int:
    """16 mma of the weight for each tile of x in a stage, of 8 bits 8, and a warp's 4 for sums of x."""
    of_stage = (8 if stage.bits == 8 else 16) + (4 if stage.values == "offsets" else 0)
    return loop.matrix_instructions // (of_stage * stage.tiles)


def test_codes_and_x_are_copied_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        loop, stage = reading.main_loop, kernel.stage
        stages = stages_in_a_pass(stage, loop)
        assert stages == stage.ring_stages, kernel
        # Of a thread and stage: 4 chunks of codes, those of upper bits, and 2 of each tile of x, beside 8-bit codes 1.
        x = (1 if stage.bits == 8 else 2) * stage.tiles
        assert loop.copies[16] == stages * (4 + kernel.copies_of_high + x), kernel
        # Rows of fifth bits that begin at no multiple of 16 bytes take another way through the loop.
        assert loop.copies.get(4, 0) == (stages * 4 if stage.bits == 5 else 0), kernel
        assert loop.copies.keys() <= {16, 4}, kernel
        assert loop.local_accesses == 0, kernel


def test_a_pass_takes_in_what_the_provider_says(readings):
    for kernel, reading in readings.items():
        values, bits, _ = kernel.stage
        done = sum(reading.main_loop.macs.values()) * WARPS
        extra = 1.25 if values == "offsets" else 1  # products with ones
        assert reading.kernel.loop_macs * extra == done, kernel
        assert reading.kernel.loop_bytes * 8 // bits * kernel.stage.rows == reading.kernel.loop_macs, kernel


# Up to 8 and up to 16 rows of x, by the bits of a code. With six-bit scales, and with all others.
MOST_SIX_BIT = {4: (28.0, 36.0), 5: (29.5, 37.0)}
MOST = {
    (4, "zeros"): (21.5, 26.0), (4, "offsets"): (24.0, 32.5), (4, "table"): (39.5, 43.5), (5, "centred"): (22.5, 26.0),
    (5, "offsets"): (26.5, 34.5),
    **{
        (scheme.bits, cuda_layers.VALUES): tuple(code.instructions for code in scheme.paper.values())
        for scheme in cuda_layers.SCHEMES.values()
    },
}  # fmt: skip


@pytest.mark.parametrize("readings", ["sm_86", "sm_89"], indirect=True)
def test_instructions_for_128_bytes_of_codes(readings):
    for kernel, reading in readings.items():
        values, bits, tiles = kernel.stage
        instructions = reading.main_loop.instructions * WARPS * static.LINE / reading.kernel.loop_bytes
        most = MOST_SIX_BIT[bits] if kernel.scales == "SixBit" else MOST[bits, values]
        assert instructions <= most[tiles - 1], f"{kernel}: {instructions:.2f}"


def test_registers_are_those_that_the_table_counts_on(readings):
    on_paper = {scheme.bits: scheme.paper for scheme in cuda_layers.SCHEMES.values()}
    for kernel, reading in readings.items():
        values, bits, _ = kernel.stage
        if values == cuda_layers.VALUES and bits in on_paper:
            most = on_paper[bits][kernel.stage.rows].registers
            assert reading.registers <= most, f"{kernel}: {reading.registers} registers"


@pytest.mark.parametrize("readings", ["sm_86"], indirect=True)
def test_tensor_cores_keep_up_with_the_memory_of_a_3060_at_16_rows(readings):
    """mma.m16n8k16 summed in fp32 takes 32 clocks of a scheduler's tensor core there, as the data sheet's rate has it."""
    prediction = static.predict(readings[Kernel("Bf16", "Fp16", Stage("centred", 4, 2))], cards.CARDS["rtx 3060"])
    assert prediction.tensor_ns == pytest.approx(2 * 32 / (28 * 4 * 1.777))
    # 128 bytes of codes come with 16 of scales where a group has 32 columns, and with 4 where it has 128.
    assert prediction.tensor_ns < 0.85 * prediction.dram_ns * (128 + 16) / 128
    assert prediction.tensor_ns < 0.90 * prediction.dram_ns * (128 + 4) / 128
