"""The compiled modules, and what any family's CUDA kernels need of a machine, in words.

`_C` runs on GPUs. `_C_emulated` is made of the same sources and runs them on the CPU, thread by thread, for tests. Each is
loaded at the first call that could use it; that it is missing or does not load is a reason, never an import error.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from gemma4_kernels import backends, environment
from gemma4_kernels.backends import Call
from gemma4_kernels.op_support import refuses_architecture

ABI_VERSION = 2  # GEMMA4_ABI_VERSION of the header that this package was written with
EMULATED_MULTIPROCESSORS = 28  # csrc/common/device.cuh
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # gemma4_dtype


@lru_cache
def _load(name: str) -> ModuleType | str:
    """The module, or why there is none."""
    full = f"gemma4_kernels.{name}"
    if find_spec(full) is None:
        needs = "nvcc, a C++ compiler" if name == "_C" else "a C++ compiler"
        return f"{full} is not built: install the package where it finds {needs}, pybind11 and ninja (docs/cuda.md)"
    try:
        module = importlib.import_module(full)
        version = module.abi_version()
    except Exception as error:  # a damaged file, another Python, a symbol that is not there
        return f"{full} does not load: {type(error).__name__}: {error}".splitlines()[0]
    if version != ABI_VERSION:
        return f"{full} is of another version of the package (interface {version}, not {ABI_VERSION}): build it again"
    return module


def module_for(device: torch.device) -> Any:
    """The compiled module that serves tensors of this device; `refuses` has said that there is one."""
    module = module_of(device)
    assert module is not None
    return module


def module_of(device: torch.device) -> Any | None:
    """The compiled module of this device, or None where none is built."""
    module = _load("_C" if device.type == "cuda" else "_C_emulated")
    return None if isinstance(module, str) else module


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; those of the emulator on a CPU; 0 of what runs no compiled kernels."""
    if device.type == "cpu":
        return EMULATED_MULTIPROCESSORS
    return backends.multiprocessors_of(device) if device.type == "cuda" else 0


def describe() -> dict[str, str]:
    """For `gemma4-kernels info`: what each compiled module is."""
    found = {}
    for name in ("_C", "_C_emulated"):
        module = _load(name)
        if isinstance(module, str):
            found[name] = module
        elif name == "_C":
            numbers = ", ".join(f"sm_{number}" for number in module.architectures().split())
            found[name] = f"built for {numbers}; {module.driver_problem() or 'the driver is new enough'}"
        else:
            found[name] = "built; runs on CPU tensors with GEMMA4_EMULATE=1"
    return found


def refuses(call: Call) -> str | None:
    """Why no compiled kernel can run on the call's device, or None."""
    if call.device_type == "cpu":
        if not environment.emulates():
            return "runs on cuda, not on cpu (on a CPU only in the emulator, for tests: GEMMA4_EMULATE=1)"
        module = _load("_C_emulated")
        return module if isinstance(module, str) else None
    if call.device_type != "cuda":
        return f"runs on cuda, not on {call.device_type}"
    module = _load("_C")
    if isinstance(module, str):
        return module
    if reason := refuses_architecture(call):
        return reason
    number = int(call.architecture.removeprefix("sm_"))
    return _no_machine_code(number, [int(built) for built in module.architectures().split()]) or _driver_problem()


def only_by_name(call: Call) -> str | None:
    """Why the choice is not left to take the emulator by itself, or None."""
    if call.device_type == "cpu":
        return "could emulate it, slowly: only where asked for by name"
    return None


def _no_machine_code(number: int, built: list[int]) -> str | None:
    """Machine code runs on the same major version from its own minor on; the PTX in the module on what is newer than it."""
    if any(each // 10 == number // 10 and each <= number for each in built):
        return None
    with_ptx = max((each for each in built if each <= 90), default=min(built))  # csrc/build.py
    if number >= with_ptx:
        return None
    return f"was built for {', '.join(f'sm_{each}' for each in built)}, not for sm_{number}"


@lru_cache
def _driver_problem() -> str | None:
    module = _load("_C")
    assert not isinstance(module, str)
    problem: str | None = module.driver_problem()
    return problem
