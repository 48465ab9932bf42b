"""One launch of a Triton kernel as data: run it here, or compile it for a card that is not here.

A launcher plans a `Launch` from its tensors and runs it. Compiling the same plan ahead of time, from tensors that hold
no numbers, gives the machine code that a user's card will run: what the tests and `bench --static` read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 when Triton was imported: kernels run on the CPU, in NumPy, and take CPU tensors."""

_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
# Of CUDA, for the second and third axis of a grid.
_LARGEST_AXIS = 65535
# Addresses and sizes that are multiples of this are known to the compiler as such: it makes 16-byte loads possible.
_DIVISIBILITY = 16


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype in which kernels multiply: the tensors' own; fp32 where the interpreter would have to multiply bf16."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return _DOT_DTYPES[dtype]


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is given."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """Tensors, numbers, and None for tensors that are absent."""
    constants: Mapping[str, Any]
    """Values of the constexpr parameters."""
    num_warps: int
    enable_fp_fusion: bool = True
    """False keeps a * b + c as two operations with a rounding each, as PyTorch's own operations are."""

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def run(self) -> None:
        if 0 in self.grid:
            return
        if any(size > _LARGEST_AXIS for size in self.grid[1:]):
            raise ValueError(
                f"{self.name}: a launch has at most {_LARGEST_AXIS} heads, and half as many requests, "
                f"got a grid of {self.grid}; split the batch"
            )
        with _on_device_of(self.arguments):
            self.kernel[self.grid](**self.arguments, **self.constants, **self._options)

    def compile(self, architecture: str) -> Any:
        """triton's CompiledKernel for "sm_86" and the like; needs no GPU, but kernels that are not interpreted."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants = dict(self.constants)
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
                continue
            value = self.arguments[name]
            specialised = not parameter.do_not_specialize
            if value is None or (specialised and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            if specialised and (isinstance(value, Tensor) or (isinstance(value, int) and value % _DIVISIBILITY == 0)):
                attributes[index,] = [["tt.divisibility", _DIVISIBILITY]]
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        return triton.compile(source, target=target, options=self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": self.enable_fp_fusion}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _on_device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the tensors may lie on another."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
