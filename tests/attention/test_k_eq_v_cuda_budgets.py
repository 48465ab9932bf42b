"""The machine code of the compiled K-equals-V kernel, for cards that are not here: registers, memory, and what binds."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from budgets import CONSUMER_BYTES, assert_nothing_in_local_memory, compiled_cubins

from gemma4_kernels.bench import cards, sass, static

_KERNEL = re.compile(
    r"k_eq_v_kernelINS1_10(?P<cache>Plain|Coded)CacheINS_3ptx4(?P<type>Bf16|Fp16)E(NS1_\d(?P<codes>Float8|Int8)E)?Li\d+EEELi(?P<dim>\d+)E"
)
WARPS, KEYS, ROWS_OF_A_TILE = 8, 32, 16


class Kernel(NamedTuple):
    type: str
    head_dim: int
    codes: str | None = None


def shared_bytes(head_dim: int) -> int:
    """The map in k_eq_v.cuh: slots, scores, weights, factors, order."""
    return 2 * KEYS * 2 * head_dim + WARPS * 32 * KEYS * 4 + 32 * KEYS * 2 + 32 * 4 + 2 * head_dim // 16 + 16


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request) -> dict[Kernel, static.Reading]:
    found = {}
    for cubin in compiled_cubins(request.param, "k_eq_v_kernel"):
        for reading in static.read(static.CompiledKernel("k_eq_v", request.param, cubin, warps=WARPS)):
            match = _KERNEL.search(reading.function)
            found[Kernel(match["type"], int(match["dim"]), match["codes"])] = reading
    return found


def walk(kernel: Kernel, reading: static.Reading, tiles: int) -> sass.Loop:
    """The loop over keys for so many tiles of rows, where one step of a warp's at most rotates: the shorter one."""
    products = 2 * kernel.head_dim // WARPS // 16 * (KEYS // 8) * tiles  # of the scores, and as many of the values
    loops = [loop for loop in reading.loops if loop.matrix_instructions == products]
    return min(loops, key=lambda loop: loop.instructions)


def test_every_kernel_is_there_and_has_a_block_of_registers_and_memory(readings):
    plain = {Kernel(name, dim) for name in ("Bf16", "Fp16") for dim in (128, 256, 512)}
    assert readings.keys() == plain | {
        Kernel(name, dim, codes) for name in ("Bf16", "Fp16") for dim in (128, 512) for codes in ("Float8", "Int8")
    }
    for kernel, reading in readings.items():
        assert_nothing_in_local_memory(str(kernel), reading)
        assert 32 * WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel
        assert shared_bytes(kernel.head_dim) <= CONSUMER_BYTES, kernel


def test_values_are_copied_once_and_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        for tiles in (1, 2):
            loop = walk(kernel, reading, tiles)
            if kernel.codes is None:
                assert loop.copies == {16: KEYS * 2 * kernel.head_dim // 16 // (32 * WARPS)}, kernel
                assert loop.loads == {4: 1}, kernel  # a page number
            else:
                # And the scale of a lane's key.
                assert loop.loads == {16: KEYS * kernel.head_dim // 16 // (32 * WARPS), 4: 2}, kernel
            assert loop.local_accesses == 0, kernel


class Times(NamedTuple):
    """Of a multiprocessor, in clocks, for one tile of keys."""

    issue: float
    tensor: float
    shared: float
    memory: float


def wavefronts(tiles: int) -> int:
    """Accesses to shared memory of 128 bytes for 32 keys of 512 columns; the map in k_eq_v.cuh has no bank conflicts."""
    values = 3 * KEYS * 1024 // 128  # copied, and read by either product
    parts = 2 * tiles * WARPS * 16 * KEYS * 4 // 128  # written, and read by whose row it is
    weights = tiles * (16 * KEYS * 2 // 128 + WARPS * 16 * KEYS * 2 // 128)  # written, and read by every warp
    return values + parts + weights + tiles * (1 + WARPS * 2)  # and factors


def times(name: str, loop: sass.Loop, tiles: int) -> Times:
    card = cards.CARDS[name]
    assert card.clock
    assert card.bandwidth
    assert card.sms
    assert card.tensor
    return Times(
        loop.instructions * WARPS / static.SCHEDULERS,
        loop.matrix_instructions * WARPS * 16 * 8 * 16 / card.tensor["bf16"],
        wavefronts(tiles),
        KEYS * 1024 / (card.bandwidth / card.sms) * card.clock,
    )


@pytest.mark.parametrize(
    ("readings", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")], indirect=["readings"]
)  # fmt: skip
def test_one_row_runs_at_the_speed_of_memory(readings, card):
    for kernel, reading in readings.items():
        if kernel.head_dim == 512 and kernel.codes is None:
            clocks = times(card, walk(kernel, reading, 1), 1)
            # Products and the arithmetic between them take turns: even one after the other they fit beside memory.
            assert clocks.issue + clocks.tensor + clocks.shared <= clocks.memory, f"{kernel}: {clocks}"
            assert walk(kernel, reading, 1).instructions * WARPS / (KEYS * 8) <= 17.0, kernel


@pytest.mark.parametrize(
    ("readings", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")], indirect=["readings"]
)  # fmt: skip
def test_two_rows_are_bound_by_tensor_cores_and_nothing_else_on_the_chip(readings, card):
    for kernel, reading in readings.items():
        if kernel.head_dim == 512 and kernel.codes is None:
            clocks = times(card, walk(kernel, reading, 2), 2)
            assert max(clocks.issue, clocks.shared) <= 0.5 * clocks.tensor, f"{kernel}: {clocks}"
            assert clocks.tensor <= clocks.memory, f"{kernel}: {clocks}"
            assert walk(kernel, reading, 2).instructions * WARPS / (KEYS * 8) <= 21.0, kernel
