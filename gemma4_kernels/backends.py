"""Which implementations exist, what each supports, which one a call gets, and why the others did not.

A family declares one `Implementation` per op and backend, as data. A call describes what it needs as a `Call`. The
dispatcher takes the first backend in the order cuda, triton, eager whose implementation refuses nothing; each refusal is
a sentence, and `explain` shows them all. A backend asked for by name, with `use_backend` or GEMMA4_BACKEND, serves the call
or raises with its reason: it is never replaced silently.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from gemma4_kernels import environment
from gemma4_kernels.checks import BackendError

BACKENDS = ("cuda", "triton", "eager")  # the order in which auto tries them

logger = logging.getLogger("gemma4_kernels")


@dataclass(frozen=True)
class Call:
    """What one call needs from an implementation."""

    op: str
    device_type: str = "cpu"
    architecture: str = "cpu"
    """"sm_86" and the like on CUDA devices, else the device type."""
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 0
    scheme: str | None = None
    """Of the weight, and the columns of its groups, where a call has one."""
    group_size: int = 0
    sizes: tuple[int, ...] = ()
    """(M, N, K) of a product, M up to one more than those of decoding: beyond, calls are alike."""
    multiprocessors: int = 0
    """Of the device, where a table asks for them."""
    features: frozenset[str] = frozenset()
    shape_class: str = "any"
    """Calls of one class take the same kernel; what was chosen is logged once for each."""
    notes: tuple[tuple[str, str], ...] = ()
    """(backend, what it would do with this call), for `explain` alone."""

    def noting(self, backend: str, note: str) -> Call:
        return replace(self, notes=(*self.notes, (backend, note)))


@dataclass(frozen=True)
class Implementation:
    """One op in one backend: where it is and what it can do. `None` in a field means no restriction."""

    op: str
    backend: str
    entry: str
    """"package.module:function", imported at the first call."""
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    device_types: frozenset[str] | None = None
    architectures: frozenset[str] | None = None
    max_head_dim: int | None = None
    missing: Callable[[], str | None] = field(default=lambda: None, compare=False)
    """Says what the machine lacks ("triton is not installed"), or None."""
    refuses: Callable[[Call], str | None] = field(default=lambda call: None, compare=False)
    """Says why it cannot serve a call, where the fields above do not tell, or None."""
    only_by_name: Callable[[Call], str | None] = field(default=lambda call: None, compare=False)
    """Says why it is passed over unless it is asked for by name, or None."""
    serves: str = ""
    """Which calls of the op, where `refuses` leaves few: for `explain` of calls of no particular shape, and so for `info`."""

    def refusal(self, call: Call) -> str | None:
        """Why this implementation cannot serve the call; None if it can."""
        if lacking := self.missing():
            return lacking
        if self.device_types is not None and call.device_type not in self.device_types:
            return f"runs on {_words(self.device_types)}, not on {call.device_type}"
        if self.architectures is not None and call.architecture not in self.architectures:
            return f"has kernels for {_words(self.architectures)}, not for {call.architecture}"
        if call.dtype not in self.dtypes:
            return f"takes {_words(map(_short, self.dtypes))}, not {_short(call.dtype)}"
        if self.max_head_dim is not None and call.head_dim > self.max_head_dim:
            return f"head_dim goes to {self.max_head_dim}, the call has {call.head_dim}"
        if absent := call.features - self.features:
            return f"does not support {_words(absent)}"
        return self.refuses(call)

    @cached_property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.entry.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


@dataclass(frozen=True)
class Choice:
    """One line of `explain`."""

    backend: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What every backend says of one call. Prints as a short table."""

    call: Call
    choices: tuple[Choice, ...]

    @property
    def taken(self) -> str | None:
        return next((choice.backend for choice in self.choices if choice.taken), None)

    def __str__(self) -> str:
        call = self.call
        head = f"{call.op} on {call.architecture}, {_short(call.dtype)}, {call.shape_class}"
        lines = [f"  {'->' if choice.taken else '  '} {choice.backend:<7} {choice.reason}" for choice in self.choices]
        return "\n".join([head, *lines])


_implementations: dict[tuple[str, str], Implementation] = {}
_describers: dict[str, tuple[str, Callable[..., Call]]] = {}
_logged: set[tuple[str, str, str]] = set()
_override: ContextVar[str | None] = ContextVar("gemma4_kernels_backend", default=None)


def register(implementation: Implementation) -> None:
    """Declare an implementation. Declaring the same (op, backend) again replaces it."""
    _known(implementation.backend, "Implementation.backend")
    _implementations[implementation.op, implementation.backend] = implementation
    _select.cache_clear()


def unregister(op: str, backend: str) -> None:
    del _implementations[op, backend]
    _select.cache_clear()


def register_describer(function: str, op: str, describe: Callable[..., Call]) -> None:
    """Make a public function known to `explain`: the op that serves it, and its arguments turned into a Call."""
    _describers[function] = (op, describe)


def ops() -> tuple[str, ...]:
    """Names of the public functions that go through the dispatcher."""
    return tuple(_describers)


def served() -> tuple[tuple[str, str, str], ...]:
    """(op, shape class, backend) of every kind of call served so far in this process, in order of name."""
    return tuple(sorted(_logged))


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every call inside the block with the named backend, or raise BackendError where it cannot.

    The block covers the thread that entered it. Put it around a compiled function, not inside.

    Args:
        name: "cuda", "triton" or "eager"; None or "auto" returns the choice to the package, whatever GEMMA4_BACKEND says.
    Raises: ValueError for another name.
    """
    token = _override.set("auto" if name is None else _known(name, "use_backend: name", auto=True))
    try:
        yield
    finally:
        _override.reset(token)


def explain(op: str, **call: Any) -> Explanation:
    """Say which backend a call would get and why each other one would not.

    Args:
        op: name of a public function, "flash_attn_func".
        call: the arguments of that function (on any device; no attention is computed and no cache changed), or fields of
            `Call`: device_type, architecture, dtype, head_dim, features, shape_class.
    Returns: an Explanation; print it, or read `.taken` and `.choices`.
    Raises: ValueError for an op that does not exist; what the function itself raises for arguments that it refuses.
    """
    if op not in _describers:
        raise ValueError(f"explain: op must be one of {', '.join(ops())}, got {op!r}")
    name, describe = _describers[op]
    if call and call.keys() - Call.__dataclass_fields__.keys():
        needs = describe(**call)
    else:
        if isinstance(features := call.get("features", frozenset()), str):
            raise TypeError(f"explain: features must be a collection of names, got {features!r}")
        architecture = call.get("architecture", call.get("device_type", "cpu"))
        needs = Call(**{**call, "op": name, "features": frozenset(features), "architecture": architecture})
    return _survey(needs, _requested())


def dispatch(call: Call) -> Callable[..., Any]:
    """The function that serves the call. Raises BackendError if none can, or if the one asked for cannot."""
    return _select(call, _requested()).function


def architecture_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return device.type
    return _cuda_architecture(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _cuda_architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@lru_cache
def multiprocessors_of(device: torch.device) -> int:
    """Of a device of type cuda."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _requested() -> str | None:
    override = _override.get()
    if override is not None:
        return None if override == "auto" else override
    name = environment.requested_backend()
    return None if name is None else _known(name, "GEMMA4_BACKEND", auto=True)


def _known(name: str, where: str, auto: bool = False) -> str:
    allowed = (*BACKENDS, "auto") if auto else BACKENDS
    if name not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, got {name!r}")
    return name


def _survey(call: Call, requested: str | None) -> Explanation:
    choices: list[Choice] = []
    taken = False
    for backend in BACKENDS:
        implementation = _implementations.get((call.op, backend))
        if implementation is None:
            refusal: str | None = "has no kernel for this op in this version"
        else:
            refusal = implementation.refusal(call)
        if refusal is not None:
            choices.append(Choice(backend, False, refusal))
        elif requested is not None and requested != backend:
            choices.append(Choice(backend, False, f"could serve it, but {requested} was asked for"))
        elif requested is None and implementation is not None and (reason := implementation.only_by_name(call)):
            choices.append(Choice(backend, False, reason))
        elif taken:
            choices.append(Choice(backend, False, "could serve it, but comes later in the order"))
        else:
            choices.append(Choice(backend, True, "asked for by name" if requested else "first in order that can"))
            taken = True
        note = dict(call.notes).get(backend)
        if note is None and implementation is not None and call.shape_class == "any":
            note = implementation.serves
        if refusal is None and note:
            choices[-1] = replace(choices[-1], reason=f"{choices[-1].reason}: {note}")
    return Explanation(call, tuple(choices))


@lru_cache(maxsize=1024)
def _select(call: Call, requested: str | None) -> Implementation:
    survey = _survey(call, requested)
    if survey.taken is None:
        wanted = f"backend {requested!r} was asked for and cannot serve this call" if requested else "no backend can"
        raise BackendError(f"{call.op}: {wanted}\n{survey}")
    line = (call.op, call.shape_class, survey.taken)
    if line not in _logged:
        _logged.add(line)
        logger.info("%s", survey)
    return _implementations[call.op, survey.taken]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(names: Any) -> str:
    return ", ".join(sorted(names))
