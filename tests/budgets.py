"""What every compiled kernel is held to, where no written reason allows more."""

from __future__ import annotations

from gemma4_kernels.bench.static import Reading

CONSUMER_BYTES = 101376
"""Shared memory of a block on consumer cards."""


def assert_fits(name: str, reading: Reading) -> None:
    assert reading.shared_bytes <= CONSUMER_BYTES, f"{name}: {reading.shared_bytes} bytes"
    assert_nothing_in_local_memory(name, reading)


def assert_nothing_in_local_memory(name: str, reading: Reading) -> None:
    assert reading.stack_bytes == 0, f"{name}: {reading.stack_bytes} bytes of stack"
    assert reading.spill_instructions == 0, name
