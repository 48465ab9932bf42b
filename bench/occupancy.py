"""How many blocks of a kernel a card holds, and how long a kernel that streams memory takes on it: on paper, from data sheets.

A kernel is its blocks, which all do the same on other bytes. A multiprocessor holds so many of them at a time as registers,
shared memory and threads allow, all multiprocessors together a wave. The time of a kernel is that of its full waves, of what
remains, and once the latency of memory; a wave takes the longest of

    memory     bytes of all its blocks / bandwidth
    latency    bytes of its longest block / bytes that a block has under way x latency: Little's law for one block
    issue      warp instructions of the fullest multiprocessor / (schedulers x clock), no warp faster than one in two clocks
    tensor     multiply-accumulates of the fullest multiprocessor / (those of a clock x clock)

Real blocks do not wait for their wave; a tail that overlaps the wave before it is shorter. L2, launch overhead and bank
conflicts are not in it. What no data sheet says is assumed: DRAM_LATENCY_NS, KERNEL_NS and how often a lone warp issues.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gemma4_kernels.bench import cards

DRAM_LATENCY_NS = 600.0
"""Assumed, under load. Pointer chases on idle consumer cards are usually reported between 400 and 600 ns."""
KERNEL_NS = 1500.0
"""Assumed: what one more kernel in a CUDA graph costs, besides its bytes; the one before has to drain first."""
SCHEDULERS = 4
_WARP_CLOCKS = 2  # assumed: a warp that is alone on its scheduler waits for its own results


class Limits(NamedTuple):
    """Of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_bytes: int
    warps: int
    blocks: int


LIMITS = {
    "sm_80": Limits(164 * 1024, 64, 32),
    "sm_86": Limits(100 * 1024, 48, 16),
    "sm_89": Limits(100 * 1024, 48, 24),
    "sm_90": Limits(228 * 1024, 64, 32),
    "sm_120": Limits(100 * 1024, 48, 24),
}
_REGISTERS = 64 * 1024
_REGISTER_UNIT = 8  # of a thread: a warp gets them by 256
_RESERVED_SHARED = 1024  # of each block, for the driver, since sm_80
_SHARED_UNIT = 128


def resident_blocks(architecture: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time: registers of a thread, shared bytes and warps of a block."""
    limits = LIMITS[architecture]
    registers_of_block = 32 * warps * _up(max(registers, 1), _REGISTER_UNIT)
    shared_of_block = _up(shared_bytes, _SHARED_UNIT) + _RESERVED_SHARED
    return min(
        _REGISTERS // registers_of_block, limits.shared_bytes // shared_of_block, limits.warps // warps, limits.blocks
    )


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class Kernel(NamedTuple):
    """What a launch asks of a card. The longest block may do more than the others: pieces of K are not all equal."""

    blocks: int
    resident: int
    """Blocks of a multiprocessor at a time."""
    dram_bytes: float
    """Of all blocks."""
    longest_bytes: float
    """Of the longest block."""
    in_flight: float
    """Bytes that a block has under way while it waits."""
    instructions: float
    """Warp instructions of the longest block."""
    macs: Mapping[str, float]
    """Multiply-accumulates of the longest block on tensor cores, by kind: see `sass.matrix_macs`."""


class Times(NamedTuple):
    """What a wave waits for, ns."""

    memory: float
    latency: float
    issue: float
    tensor: float


def wanted_in_flight(card: cards.Card, latency: float = DRAM_LATENCY_NS) -> float:
    """Bytes that each multiprocessor must have under way for full bandwidth: Little's law."""
    assert card.bandwidth is not None
    assert card.sms is not None
    return card.bandwidth * latency / card.sms


def wave(card: cards.Card, kernel: Kernel, blocks: int, latency: float = DRAM_LATENCY_NS) -> Times:
    """Times of so many blocks side by side."""
    assert card.bandwidth is not None
    assert card.sms is not None
    assert card.clock is not None
    assert card.tensor is not None
    fullest = -(-blocks // card.sms)
    warp_limited = max(fullest, _WARP_CLOCKS)
    tensor_clocks = sum(macs / card.tensor[kind] for kind, macs in kernel.macs.items())
    return Times(
        memory=blocks * kernel.dram_bytes / kernel.blocks / card.bandwidth,
        latency=kernel.longest_bytes / kernel.in_flight * latency,
        issue=warp_limited * kernel.instructions / (SCHEDULERS * card.clock),
        tensor=fullest * tensor_clocks / card.clock,
    )


def kernel_ns(card: cards.Card, kernel: Kernel, latency: float = DRAM_LATENCY_NS) -> float:
    assert card.sms is not None
    slots = card.sms * kernel.resident
    full, rest = divmod(kernel.blocks, slots)
    ns = latency
    if full:
        ns += full * max(wave(card, kernel, slots, latency))
    if rest:
        ns += max(wave(card, kernel, rest, latency))
    return ns
