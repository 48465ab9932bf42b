"""Argument checks. Every message says which function, which argument, what was expected and what came.

Checks here look at shapes, dtypes, strides and devices, which the host knows, and at values only where the tensor lives on
the CPU: reading a value of a device tensor would stall its stream. Kernels guard those values themselves.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ShapeError(ValueError):
    """A tensor has the wrong number of dims or the wrong size."""


class DTypeError(TypeError):
    """A tensor has a dtype that the function does not take."""


class DeviceError(ValueError):
    """Tensors of one call live on different devices."""


class StrideError(ValueError):
    """A tensor's last dim is not dense in memory."""


class FormatError(ValueError):
    """A weight format that is not read here. The message says what to use instead."""


class WeightFileError(ValueError):
    """A file of weights is damaged, is not what it says it is, or cannot be found."""


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can serve a call. The message holds the reason of each refusal."""


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def is_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")


def has_shape(function: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds a size where it is fixed and a letter where any size will do: (2, "S", 256)."""
    is_tensor(function, name, tensor)
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ShapeError(f"{function}: {name} must have shape {_sizes(expected)}, got {_sizes(tensor.shape)}")


def _sizes(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(str(size) for size in sizes)})"


def has_dtype(function: str, name: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    is_tensor(function, name, tensor)
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise DTypeError(f"{function}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def is_dense(function: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise StrideError(
            f"{function}: {name} must be dense in its last dim (stride 1), got strides {tuple(tensor.stride())}; "
            "call .contiguous()"
        )


def same_device(function: str, **tensors: Tensor | None) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, anchor), *others = present.items()
    for name, tensor in others:
        if tensor.device != anchor.device:
            raise DeviceError(f"{function}: {name} must be on {anchor.device} like {first}, got {tensor.device}")


def is_flag(function: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {value!r}")


def whole_number(function: str, name: str, value: object, minimum: int = 0) -> int:
    if isinstance(value, torch.SymInt):  # a dynamic size under torch.compile
        number: Any = value
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    else:
        raise TypeError(f"{function}: {name} must be a whole number, got {value!r}")
    if number < minimum:
        raise ValueError(f"{function}: {name} must be at least {minimum}, got {number}")
    return number  # type: ignore[no-any-return]


def real_number(function: str, name: str, value: object, hint: str = "") -> float:
    if isinstance(value, torch.SymFloat):  # a dynamic number under torch.compile
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{function}: {name} must be a number, got {value!r}{hint}")


def positive_number(function: str, name: str, value: object, hint: str = "") -> float:
    number = real_number(function, name, value, hint)
    if not 0 < number < math.inf:  # NaN is not either
        raise ValueError(f"{function}: {name} must be positive and finite, got {number}{hint}")
    return number


def window(function: str, value: object) -> tuple[int, int]:
    """(left, right) neighbours; -1 for no limit."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{function}: window_size must be a pair (left, right), got {value!r}")
    left = whole_number(function, "window_size[0]", value[0], minimum=-1)
    right = whole_number(function, "window_size[1]", value[1], minimum=-1)
    return left, right


def neutral(function: str, name: str, value: object, neutral_value: object, reason: str) -> None:
    """An argument of FlashAttention-2 that is accepted only at the value which changes nothing."""
    if value is None and neutral_value is None:
        return
    if isinstance(value, Tensor) or value != neutral_value:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{function}: {name} must be {neutral_value!r}, got {shown}: {reason}")


def values_within(function: str, name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Every element lies in [low, high]. Looks only at CPU tensors."""
    if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < low or largest > high:
        found = smallest if smallest < low else largest
        raise ValueError(f"{function}: {name} must lie in [{low}, {high}], got {found}")
