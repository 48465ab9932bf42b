"""The machine code of the kernels of sliding layers, for cards that are not here: registers, memory, and what binds."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from budgets import CONSUMER_BYTES, assert_nothing_in_local_memory, compiled_cubins

from gemma4_kernels.bench import cards, sass, static

_KERNEL = re.compile(r"flash_decode_kernelINS_3ptx4(?P<type>Bf16|Fp16)ELi(?P<dim>\d+)ELi(?P<tiles>\d)E")
WARPS, SLOT_BYTES, TILE_ROWS = 4, 8192, 16


class Kernel(NamedTuple):
    type: str
    head_dim: int
    tiles: int
    """Of 16 packed rows."""

    @property
    def keys(self) -> int:
        return SLOT_BYTES // (2 * self.head_dim)

    @property
    def score_bytes(self) -> int:
        """Of a tile of rows; at 256 columns two halves of each."""
        return TILE_ROWS * self.keys * 4 * (2 if self.head_dim == 256 else 1)

    @property
    def shared_bytes(self) -> int:
        """The map in flash_decode.cuh."""
        return 3 * SLOT_BYTES + self.tiles * (TILE_ROWS * 2 * self.head_dim + self.score_bytes)

    @property
    def blocks(self) -> int:
        """That a multiprocessor is to hold."""
        return 1 if self.tiles == 4 else 2


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request) -> dict[Kernel, static.Reading]:
    found = {}
    for cubin in compiled_cubins(request.param, "flash_decode_kernel"):
        compiled = static.CompiledKernel("flash_decode", request.param, cubin, warps=WARPS, main_loop="copies")
        for reading in static.read(compiled):
            match = _KERNEL.search(reading.function)
            found[Kernel(match["type"], int(match["dim"]), int(match["tiles"]))] = reading
    return found


def test_every_kernel_is_there_and_fits(readings):
    dims, tiles = (64, 128, 256), (1, 2, 4)
    assert readings.keys() == {Kernel(name, d, t) for name in ("Bf16", "Fp16") for d in dims for t in tiles}
    for kernel, reading in readings.items():
        assert_nothing_in_local_memory(str(kernel), reading)
        assert kernel.blocks * 32 * WARPS * reading.registers <= 65536, f"{kernel}: {reading.registers} registers"
        assert reading.static_shared_bytes == 0, kernel
        # A block takes 1 KiB besides; a multiprocessor of a consumer card has 1 KiB more than a block may use.
        assert kernel.blocks * (kernel.shared_bytes + 1024) <= CONSUMER_BYTES + 1024, kernel


def test_keys_and_values_are_copied_once_and_16_bytes_at_a_time(readings):
    for kernel, reading in readings.items():
        loop = reading.main_loop
        assert loop.copies == {16: 2 * SLOT_BYTES // 16 // (32 * WARPS)}, kernel
        assert loop.matrix_instructions == 16 * kernel.tiles, kernel
        assert loop.local_accesses == 0, kernel


class Times(NamedTuple):
    """Of a multiprocessor, in clocks, for one tile of keys and values."""

    issue: float
    tensor: float
    shared: float
    memory: float


def wavefronts(kernel: Kernel) -> int:
    """Accesses to shared memory of 128 bytes, without bank conflicts: the map in flash_decode.cuh has none."""
    cache = 2 * 2 * SLOT_BYTES // 128  # copied and read
    queries = WARPS * TILE_ROWS * 2 * kernel.head_dim // (2 if kernel.head_dim == 256 else 1) // 128
    return cache + kernel.tiles * (queries + (1 + WARPS) * kernel.score_bytes // 128)


def times(name: str, kernel: Kernel, loop: sass.Loop) -> Times:
    card = cards.CARDS[name]
    assert card.clock
    assert card.bandwidth
    assert card.sms
    assert card.tensor
    return Times(
        loop.instructions * WARPS / static.SCHEDULERS,
        loop.matrix_instructions * WARPS * 16 * 8 * 16 / card.tensor["bf16"],
        wavefronts(kernel),
        2 * SLOT_BYTES / (card.bandwidth / card.sms) * card.clock,
    )


# Instructions for 128 bytes of keys and values, every branch taken: with one, two and four tiles of rows.
MOST = {256: (17.5, 24.0, 37.5), 128: (18.5, 28.0, 43.5), 64: (24.0, 37.0, 62.5)}


@pytest.mark.parametrize(
    ("readings", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")], indirect=["readings"]
)  # fmt: skip
def test_the_memory_binds(readings, card):
    for kernel, reading in readings.items():
        clocks = times(card, kernel, reading.main_loop)
        if (
            kernel.tiles == 1
        ):  # one row of a group of 2, and up to eight: even one after the other they fit beside memory
            assert clocks.issue + clocks.tensor + clocks.shared <= clocks.memory, f"{kernel}: {clocks}"
        assert max(clocks) == clocks.memory, f"{kernel}: {clocks}"
        instructions = reading.main_loop.instructions * WARPS / (2 * SLOT_BYTES / static.LINE)
        assert instructions <= MOST[kernel.head_dim][(1, 2, 4).index(kernel.tiles)], f"{kernel}: {instructions:.2f}"
