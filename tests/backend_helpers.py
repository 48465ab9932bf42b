"""An implementation for the length of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gemma4_kernels import backends
from gemma4_kernels.backends import Implementation


@contextmanager
def standing_in(implementation: Implementation) -> Iterator[None]:
    """Declare it, and put back what stood in its place."""
    key = implementation.op, implementation.backend
    real = backends._implementations.get(key)
    backends.register(implementation)
    try:
        yield
    finally:
        backends.unregister(*key)
        if real is not None:
            backends.register(real)
