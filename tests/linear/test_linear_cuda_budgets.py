"""The machine code of the compiled products, for cards that are not here: registers, memory, and instructions for the bytes.

The fused forms are these kernels too: what becomes of the sums is decided after the main loop.
"""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from budgets import assert_nothing_in_local_memory

from gemma4_kernels.bench import sass, static

_found = find_spec("gemma4_kernels._C")
if _found is None or _found.origin is None:
    pytest.skip("gemma4_kernels._C is not built", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)
MODULE = Path(_found.origin)
_KERNEL = re.compile(
    r"decode_kernelINS_3ptx4(?P<x>Bf16|Fp16)E.*?\d(?P<scales>Fp16|Bf16|Fp32|E8m0|Int8|SixBit|Nested)Scales?[EI].*?"
    r"ValuesE(?P<values>[0123])E.*?Li(?P<bits>[4568])ELi(?P<tiles>[12])EEEv"
)
VALUES = ("centred", "zeros", "offsets", "table")
STAGE_BYTES = {4: 64 * 128, 5: 64 * (128 + 32), 6: 64 * (128 + 64), 8: 64 * 128}  # of codes, with their upper bits
WARPS = 4


class Kernel(NamedTuple):
    x: str
    scales: str
    values: str
    bits: int
    tiles: int
    """Of 8 rows of x."""

    @property
    def copies_of_high(self) -> int:
        """Of a thread and stage."""
        return {5: 1, 6: 2}.get(self.bits, 0)


def machine_code(architecture: str, folder: Path) -> list[Path]:
    """The module's cubins for an architecture, one for each source file."""
    command = [sass.cuobjdump(), "-xelf", f"{architecture}.cubin", str(MODULE)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    # A source file without kernels leaves an empty one.
    return [path for path in sorted(folder.glob("*.cubin")) if b".text." in path.read_bytes()]


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request, tmp_path_factory) -> dict[Kernel, static.Reading]:
    found = {}
    for path in machine_code(request.param, tmp_path_factory.mktemp(request.param)):
        compiled = static.CompiledKernel(path.name, request.param, path.read_bytes(), warps=WARPS, main_loop="copies")
        for reading in static.read(compiled):
            assert_nothing_in_local_memory(reading.function, reading)
            if match := _KERNEL.search(reading.function):
                values = VALUES[int(match["values"])]
                found[Kernel(match["x"], match["scales"], values, int(match["bits"]), int(match["tiles"]))] = reading
    if not found:
        pytest.skip(f"the module has no machine code for {request.param}")
    return found


def test_every_kernel_is_there_and_leaves_room_for_another_block(readings):
    # Types of x, tiles of 8 rows; of 4 bits three kinds of values with plain scales of three types, six-bit ones, tables
    # with five kinds; three of 5 bits, and one each of 6 and 8.
    assert len(readings) == 2 * 2 * (3 * 3 + 1 + 5 + 3 + 1 + 1)
    for kernel, reading in readings.items():
        # Two blocks at a time, as many as consumer cards have memory for.
        assert 2 * 32 * WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel


def stages_in_a_pass(kernel: Kernel, loop: sass.Loop) -> int:
    """16 mma of the weight for each tile of x in a stage, of 8 bits 8, and a warp's 4 for sums of x."""
    of_stage = (8 if kernel.bits == 8 else 16) + (4 if kernel.values == "offsets" else 0)
    return loop.matrix_instructions // (of_stage * kernel.tiles)


def stages_of_ring(kernel: Kernel) -> int:
    if kernel.bits == 8:
        return 4 if kernel.tiles == 1 else 3
    narrow = kernel.bits == 4 or (kernel.bits == 5 and kernel.values == "centred")
    return 3 if kernel.tiles == 1 and narrow else 2


def test_codes_and_x_are_copied_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        stages = stages_in_a_pass(kernel, loop)
        assert stages == stages_of_ring(kernel), kernel
        # Of a thread and stage: 4 chunks of codes, those of upper bits, and 2 of each tile of x, beside 8-bit codes 1.
        x = (1 if kernel.bits == 8 else 2) * kernel.tiles
        assert loop.copies[16] == stages * (4 + kernel.copies_of_high + x), kernel
        # Rows of fifth bits that begin at no multiple of 16 bytes take another way through the loop.
        assert loop.copies.get(4, 0) == (stages * 4 if kernel.bits == 5 else 0), kernel
        assert loop.copies.keys() <= {16, 4}, kernel
        assert loop.local_accesses == 0, kernel


# Up to 8 and up to 16 rows of x, by the bits of a code. With six-bit scales, and with all others.
MOST_SIX_BIT = {4: (28.0, 36.0), 5: (29.5, 37.0)}
MOST = {
    (4, "centred"): (19.0, 23.5), (4, "zeros"): (21.5, 25.0), (4, "offsets"): (24.0, 32.5), (4, "table"): (39.5, 43.5),
    (5, "centred"): (22.5, 26.0), (5, "offsets"): (26.5, 34.5), (6, "centred"): (23.0, 27.0), (8, "centred"): (15.0, 17.5),
}  # fmt: skip


@pytest.mark.parametrize("readings", ["sm_86", "sm_89"], indirect=True)
def test_instructions_for_128_bytes_of_codes(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        taken = stages_in_a_pass(kernel, loop) * STAGE_BYTES[kernel.bits]
        instructions = loop.instructions * WARPS * static.LINE / taken
        most = MOST_SIX_BIT[kernel.bits] if kernel.scales == "SixBit" else MOST[kernel.bits, kernel.values]
        assert instructions <= most[kernel.tiles - 1], f"{kernel}: {instructions:.2f}"
