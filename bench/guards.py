"""Inputs between guard bytes, and memory that gives itself away when it is read before it is written.

Each input of a call lies inside a larger buffer. The bytes on both sides hold a pattern that is NaN in bf16, fp16 and fp32
and a large negative number in integers: a kernel that reads there poisons its result, and one that writes there is seen
afterwards. The inputs themselves are compared bit for bit, with what the call had to change taken into account.

Results are allocated by the library, so their surroundings are out of reach; what can be shown is that every element was
written: `poisoned_memory` makes torch.empty hand out NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# A multiple of every alignment that a kernel may rely on, and wider than one row of any cache.
GUARD_BYTES = 4096
# 0xFFA5: NaN as bf16 and fp16, and twice in a row as fp32. No kernel writes it by accident: a computed NaN is 0x7FFF or
# 0xFFFF or has trailing zeros.
_GUARD = 0xFFA5 - 0x10000
_CHUNK = 1 << 26  # bytes compared at a time: a long cache is not copied whole


class GuardedInputs:
    """Tensors of a call copied between guards on a device; everything that is no tensor stays as it is."""

    def __init__(self, made: dict[str, Any], device: torch.device) -> None:
        self.arguments: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        for name, value in made.items():
            if isinstance(value, Tensor):
                self._buffers[name], self.arguments[name] = _place(value, device)
            else:
                self.arguments[name] = value

    def damage(self, expected: dict[str, Any]) -> list[str]:
        """What a call did that it must not have done, in sentences.

        Args:
            expected: the arguments as the call must leave them, tensors on any device.
        """
        found = []
        for name, buffer in self._buffers.items():
            before, after = buffer[:GUARD_BYTES], buffer[GUARD_BYTES + _padded(_nbytes(self.arguments[name])) :]
            for guard, side in ((before, "before"), (after, "after")):
                written = int((guard.view(torch.int16) != _GUARD).sum())
                if written:
                    found.append(f"wrote {2 * written} bytes {side} input {name}")
            changed = _first_difference(self.arguments[name], expected[name])
            if changed is not None:
                found.append(f"input {name} changed, or was not changed as it had to be, at element {changed}")
        return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its kin give NaN (integers: their largest value).

    It is a side effect of deterministic algorithms, which may also give other bits than usual: a result from here is held
    against the error rule, not against the bits of another run alone.
    """
    settings: Any = torch.utils.deterministic
    mode, filling = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        try:
            torch.set_deterministic_debug_mode("warn")
            settings.fill_uninitialized_memory = True
            yield
        finally:
            settings.fill_uninitialized_memory = filling
            torch.set_deterministic_debug_mode(mode)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bytes; NaN equals itself, 0.0 does not equal -0.0."""
    return left.dtype == right.dtype and left.shape == right.shape and _first_difference(left, right) is None


def _place(tensor: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(buffer uint8, the tensor inside it)."""
    size = _nbytes(tensor)
    words = (2 * GUARD_BYTES + _padded(size)) // 2
    buffer = torch.full((words,), _GUARD, dtype=torch.int16, device=device).view(torch.uint8)
    inside = buffer[GUARD_BYTES : GUARD_BYTES + size].view(tensor.dtype).view(tensor.shape)
    inside.copy_(tensor)
    return buffer, inside


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(size: int) -> int:
    return size + size % 2


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _first_difference(left: Tensor, right: Tensor) -> tuple[int, ...] | None:
    """Index of the first element whose bytes differ; the tensors may lie on different devices."""
    mine, other = _bytes(left), _bytes(right)
    for start in range(0, mine.numel(), _CHUNK):
        unequal = mine[start : start + _CHUNK].cpu() != other[start : start + _CHUNK].cpu()
        if bool(unequal.any()):
            element = (start + int(unequal.int().argmax())) // left.element_size()
            return tuple(int(i) for i in torch.unravel_index(torch.tensor(element), left.shape))
    return None
