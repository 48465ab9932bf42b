"""What every compiled kernel is held to, where no written reason allows more."""

from __future__ import annotations

import pytest

from gemma4_kernels.bench import cuda_kernels
from gemma4_kernels.bench.static import Reading, UnavailableError

CONSUMER_BYTES = 101376
"""Shared memory of a block on consumer cards."""


def compiled_cubins(architecture: str, *kernels: str) -> list[bytes]:
    """The compiled module's cubins that hold one of these functions. Skips the test where the module has none."""
    try:
        found = cuda_kernels.machine_code(architecture)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    found = [cubin for cubin in found if any(kernel.encode() in cubin for kernel in kernels)]
    return found or pytest.skip(f"the module has no machine code for {architecture}")


def assert_fits(name: str, reading: Reading) -> None:
    assert reading.shared_bytes <= CONSUMER_BYTES, f"{name}: {reading.shared_bytes} bytes"
    assert_nothing_in_local_memory(name, reading)


def assert_nothing_in_local_memory(name: str, reading: Reading) -> None:
    assert reading.stack_bytes == 0, f"{name}: {reading.stack_bytes} bytes of stack"
    assert reading.spill_instructions == 0, name
