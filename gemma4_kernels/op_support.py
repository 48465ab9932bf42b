"""What the ops of all families do alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gemma4_kernels.backends import Call

DECODE_ROWS = 16
"""Up to here a call is decoding or verifying drafts, and the bits of a row do not depend on the others."""

# Tensor cores that multiply bf16, and copies that go past the registers (cp.async), begin there.
OLDEST_ARCHITECTURE = 80


def refuses_architecture(call: Call) -> str | None:
    """Why a device of type cuda cannot run this package's kernels for GPUs, whoever compiles them; None if it can."""
    number = call.architecture.removeprefix("sm_")
    if not number.isdigit():
        return f"is written for NVIDIA cards, not for {call.architecture}"
    if int(number) < OLDEST_ARCHITECTURE:
        return f"needs sm_{OLDEST_ARCHITECTURE} or newer, this is {call.architecture}"
    return None


def fp32_sums(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would run the products inside an op at its own dtype; the op says what dtype they have."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def refuse_backward(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{op}: gemma4_kernels is for inference, it has no backward; use torch.no_grad()")

    return backward
