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
    r"decode_kernelINS_3ptx4(?P<x>Bf16|Fp16)E.*?\d(?P<scales>Fp16|Bf16|Fp32|E8m0|Int8|SixBit)Scales?E.*?ValuesE(?P<values>[0123])E.*?Li(?P<tiles>[12])EEEv"
)
VALUES = ("centred", "zeros", "offsets", "table")
STAGE_BYTES = 64 * 128  # of codes
WARPS = 4


class Kernel(NamedTuple):
    x: str
    scales: str
    values: str
    tiles: int
    """Of 8 rows of x."""


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
                found[Kernel(match["x"], match["scales"], values, int(match["tiles"]))] = reading
    if not found:
        pytest.skip(f"the module has no machine code for {request.param}")
    return found


def test_every_kernel_is_there_and_leaves_room_for_another_block(readings):
    # Types of x, tiles of 8 rows; three kinds of values with plain scales of three types, six-bit ones, tables with four kinds.
    assert len(readings) == 2 * 2 * (3 * 3 + 1 + 4)
    for kernel, reading in readings.items():
        # Two blocks at a time, as many as consumer cards have memory for.
        assert 2 * 32 * WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel


def stages_in_a_pass(kernel: Kernel, loop: sass.Loop) -> int:
    """16 mma of the weight for each tile of x in a stage, and a warp's 4 for sums of x."""
    return loop.matrix_instructions // ((20 if kernel.values == "offsets" else 16) * kernel.tiles)


def test_codes_and_x_are_copied_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        stages = stages_in_a_pass(kernel, loop)
        assert stages == (3 if kernel.tiles == 1 else 2), kernel
        # Of a thread and stage: 4 chunks of codes and 2 of each tile of x.
        assert loop.copies == {16: stages * (4 + 2 * kernel.tiles)}, kernel
        assert loop.local_accesses == 0, kernel


# Up to 8 and up to 16 rows of x. With plain scales, and six-bit ones.
MOST = {"centred": (20.0, 26.0), "zeros": (22.0, 26.5), "offsets": (24.5, 33.0), "table": (39.5, 44.0)}
MOST_SIX_BIT = (27.5, 36.0)


@pytest.mark.parametrize("readings", ["sm_86", "sm_89"], indirect=True)
def test_instructions_for_128_bytes_of_codes(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        taken = stages_in_a_pass(kernel, loop) * STAGE_BYTES
        instructions = loop.instructions * WARPS * static.LINE / taken
        most = MOST_SIX_BIT if kernel.scales == "SixBit" else MOST[kernel.values]
        assert instructions <= most[kernel.tiles - 1], f"{kernel}: {instructions:.2f}"
