"""The machine code of the compiled verification, for cards that are not here: memory, registers, instructions for the bytes."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from budgets import assert_nothing_in_local_memory, compiled_cubins

from gemma4_kernels.bench import sass, static

_KERNEL = re.compile(
    r"verification\S*?\d(?P<kernel>tiles|survey|rows|residuals)_kernelINS0_10(?P<dtype>Bf16|Fp16|Fp32)Logits"
)
_BYTES = {"Bf16": 2, "Fp16": 2, "Fp32": 4}
WARPS = {"tiles": 4, "survey": 4, "rows": 8, "residuals": 8}
TOKENS_OF_WARP = 512
REGISTERS = 65536  # of a multiprocessor
# Threads of a multiprocessor that registers leave room for: tiles and the survey wait for memory, which takes as many loads
# under way as 1024 threads have; the others are few blocks.
LEAST_THREADS = {"tiles": 1024, "survey": 1024, "rows": 512, "residuals": 512}


class Kernel(NamedTuple):
    kernel: str
    dtype: str


class Code(NamedTuple):
    reading: static.Reading
    listing: list[sass.Instruction]


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def codes(request) -> dict[Kernel, Code]:
    found = {}
    for cubin in compiled_cubins(request.param, "12verification"):
        listings = sass.parse_listing(sass.disassemble(cubin))
        for reading in static.read(static.CompiledKernel("verification", request.param, cubin)):
            if match := _KERNEL.search(reading.function):
                found[Kernel(match["kernel"], match["dtype"])] = Code(reading, listings[reading.function])
    return found


def test_every_kernel_is_there_and_has_room(codes):
    assert len(codes) == len(WARPS) * len(_BYTES)
    for kernel, (reading, _) in codes.items():
        assert_nothing_in_local_memory(str(kernel), reading)
        granted = -(-reading.registers // 8) * 8  # of a thread
        block = 32 * WARPS[kernel.kernel]
        threads = REGISTERS // (granted * block) * block
        assert threads >= LEAST_THREADS[kernel.kernel], f"{kernel}: {reading.registers} registers"


def test_logits_are_loaded_16_bytes_at_a_time(codes):
    for kernel, (reading, listing) in codes.items():
        wide = sum(bool(re.match(r"LDG\.\S*128", each.mnemonic)) for each in listing)
        each_group = _BYTES[kernel.dtype] // 2
        if kernel.kernel in ("tiles", "survey"):
            assert wide == 2 * each_group, kernel  # a thread's two groups of eight tokens
        else:
            # In every loop over a row, two groups of p and q.
            assert wide >= 2 * each_group, kernel
            assert wide % each_group == 0, kernel
            assert any(loop.loads.get(16) for loop in reading.loops), kernel


def lines(kernel: Kernel) -> float:
    """Of 128 bytes, that a warp of a tile reads."""
    return TOKENS_OF_WARP * _BYTES[kernel.dtype] / static.LINE


def shortest(listing: list[sass.Instruction]) -> int:
    """Instructions on the shortest way through a tile: greedy, no softcap, and a warp that sums nothing up for the block."""
    ends = [index for index, each in enumerate(listing) if each.mnemonic == "EXIT"]
    loads = [index for index, each in enumerate(listing) if re.match(r"LDG\.\S*128", each.mnemonic)]
    end = next(index for index in ends if index > loads[-1])
    found = sass._fewest(listing[: end + 1])
    assert found is not None
    return found


# For 128 bytes of logits of 16 bits: a greedy row, and what words and bounds of noise add, without the tokens that could win.
MOST_GREEDY, MOST_NOISE = 50, 52


@pytest.mark.parametrize("codes", ["sm_86", "sm_89"], indirect=True)
def test_instructions_for_128_bytes_of_logits(codes):
    for kernel, (reading, listing) in codes.items():
        if kernel.kernel != "tiles":
            continue
        greedy = shortest(listing) / lines(kernel)
        # The loop over a thread's two groups is the one with Philox in it.
        noise = max(reading.loops, key=lambda loop: loop.instructions)
        added = 2 * noise.fewest / lines(kernel)
        print(f"{kernel}: greedy {greedy:.1f}, noise {added:.1f}, {reading.registers} registers")
        share = 2 / _BYTES[kernel.dtype]
        assert greedy <= MOST_GREEDY * share, f"{kernel}: {greedy:.1f}"
        assert added <= MOST_NOISE * share, f"{kernel}: {added:.1f}"
