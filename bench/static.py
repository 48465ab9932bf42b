"""What compiled kernels say before any GPU has run them: registers, spills, shared memory, and what will bind the main loop.

A family registers a provider, a function that compiles or finds its kernels for an architecture and yields them as
`CompiledKernel`s, or as `LazyKernel`s that are compiled only if they are asked for. `sass` reads their machine code. No figure
is a measurement: each is a property of the code, or follows from it and a data sheet (`cards`).

For 128 bytes of cache or weights that the main loop takes in, and for the whole card with every SM at work:

    issue time     warp instructions of the loop / (SMs x 4 schedulers x clock)
    tensor time    multiply-accumulates of the loop / (SMs x those of an SM and clock x clock)
    DRAM time      128 bytes / bandwidth

The longest binds. If that is the DRAM time, the kernel can run at the speed of memory; else its ratio to the DRAM time is the
factor by which it must miss it. `static_tables` prints all of this.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from gemma4_kernels.bench import cards, sass

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
SCHEDULERS = 4  # of an SM, each issuing one warp instruction a cycle
LINE = 128  # bytes for which times are given


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture, as a family provides it."""

    name: str
    """Tells the family's configurations apart; it need not be the name of the function."""
    architecture: str
    cubin: bytes
    shared_bytes: int | None = None
    """Dynamic shared memory that the launch asks for, which the machine code does not show (Triton: metadata.shared)."""
    warps: int | None = None
    """Of a block."""
    loop_bytes: int | None = None
    """Bytes of cache or weights that a block takes in during one pass of its main loop. Without it, or without `warps`, nothing
    is predicted."""
    loop_macs: int | None = None
    """Multiply-accumulates of a block's pass that some result needs, if known: without rows and keys that only fill a tile."""
    main_loop: str = "loads"
    """How the main loop is told from others: a key of `sass.MAIN_LOOP`."""
    function: str | None = None
    """Which of the cubin's functions it is; None if all of them are."""

    def __post_init__(self) -> None:
        if self.main_loop not in sass.MAIN_LOOP:
            raise ValueError(
                f"{self.name}: main_loop is {self.main_loop!r}, expected one of {', '.join(sass.MAIN_LOOP)}"
            )


@dataclass(frozen=True)
class LazyKernel:
    """A kernel that `compile` compiles if it is asked for. If that fails, only this kernel is missing."""

    name: str
    compile: Callable[[], CompiledKernel]


class UnavailableError(Exception):
    """A provider's kernels cannot be had here. It is a remark, not a failure: nobody asked for them."""


Provider = Callable[[str], Iterable[CompiledKernel | LazyKernel]]

# family -> "package.module:function", a Provider that is imported when it is asked. A family of this package joins with a line
# here, kernels from elsewhere with `register`.
_providers: dict[str, str] = {
    "attention": "gemma4_kernels.bench.attention_kernels:provide",
    "linear": "gemma4_kernels.bench.linear_kernels:provide",
    "verification": "gemma4_kernels.bench.verification_kernels:provide",
    "cuda": "gemma4_kernels.bench.cuda_kernels:provide",
}
# family -> "package.module:function" that returns lines to print below the tables, where the family is in them.
_remarks: dict[str, str] = {"verification": "gemma4_kernels.bench.verification_kernels:remarks"}
# family -> "package.module:function" that makes lines of its readings and the names of cards: what whole calls come to.
_summaries: dict[str, str] = {"cuda": "gemma4_kernels.bench.cuda_layers:summary"}


def register(family: str, entry: str) -> None:
    """Name the function that compiles a family's kernels. Registering a family again replaces it."""
    _providers[family] = entry


def unregister(family: str) -> None:
    del _providers[family]


# Collecting ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One function of a compiled kernel."""

    kernel: CompiledKernel
    function: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    spill_instructions: int
    """Loads from and stores to local memory, in the whole function."""
    instructions: int
    loops: tuple[sass.Loop, ...]

    @property
    def shared_bytes(self) -> int:
        return self.static_shared_bytes + (self.kernel.shared_bytes or 0)

    @property
    def main_loop(self) -> sass.Loop | None:
        return sass.main_loop(self.loops, self.kernel.main_loop)

    @property
    def unrolled(self) -> int:
        """Passes of the source in one pass of the main loop. What the code looks like counts only if it also loads so many
        times `loop_bytes`."""
        loop, kernel = self.main_loop, self.kernel
        if loop is None or not (kernel.warps and kernel.loop_bytes):
            return 1
        times = sass.unrolling(loop, self.loops)
        return times if loop.loaded_bytes * kernel.warps >= times * kernel.loop_bytes else 1

    @property
    def loaded_share(self) -> float | None:
        """Bytes that the code of a pass loads over `loop_bytes`; None if the code does not show its bytes."""
        loop, kernel = self.main_loop, self.kernel
        if loop is None or loop.bulk_copies or not (kernel.warps and kernel.loop_bytes):
            return None
        return loop.loaded_bytes * kernel.warps / (kernel.loop_bytes * self.unrolled)


class Collection(NamedTuple):
    readings: list[tuple[str, Reading]]
    """(family, reading)"""
    failures: list[str]
    """What could not be compiled or read, and why."""
    remarks: list[str]


def read(kernel: CompiledKernel) -> list[Reading]:
    """Everything that cuobjdump tells of each function in a cubin. Raises RuntimeError where it cannot be run."""
    resources, listings = _read_cubin(kernel.cubin, kernel.architecture)
    if kernel.function is not None:
        resources = {kernel.function: resources[kernel.function]}
    return [
        Reading(
            kernel, function, numbers["REG"], numbers["STACK"], numbers["SHARED"],
            sass.count_spills(listings[function]), len(listings[function]), tuple(sass.find_loops(listings[function])),
        )
        for function, numbers in resources.items()
    ]  # fmt: skip


@lru_cache(maxsize=4)  # the functions of a cubin come one after another
def _read_cubin(cubin: bytes, architecture: str) -> tuple[dict[str, dict[str, int]], dict[str, list[sass.Instruction]]]:
    text = sass.disassemble(cubin)
    resources, listings = sass.parse_resources(text, architecture), sass.parse_listing(text)
    if not resources or not resources.keys() <= listings.keys():
        raise RuntimeError("cuobjdump printed no function, or one without its code")
    return resources, listings


def collect(architectures: Iterable[str] = ARCHITECTURES, names: Sequence[str] = ()) -> Collection:
    """Compile and read the kernels of every family whose names contain one of `names`; empty for all.

    Triton keeps what it compiled on disk. cuobjdump takes half a second for a kernel, so it runs beside the compiler.
    """
    found = Collection([], [], [])
    if not _providers:
        found.remarks.append("No family of this version has compiled kernels: its implementations are plain PyTorch.")
        return found
    if sass.cuobjdump() is None:
        found.failures.append("cuobjdump is missing: it comes with the CUDA toolkit and with Triton.")
        return found
    reading: list[tuple[str, CompiledKernel, Future[list[Reading]]]] = []
    # Triton prints the code that ptxas refused on stdout, where the tables go.
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.redirect_stdout(sys.stderr):
        for family, entry in _providers.items():
            for architecture in architectures:
                for kernel in _compile(family, entry, architecture, names, found):
                    reading.append((family, kernel, pool.submit(read, kernel)))
        for family, kernel, future in reading:
            try:
                found.readings.extend((family, each) for each in future.result())
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                found.failures.append(_sentence(f"{family}, {kernel.name} for {kernel.architecture}", error))
    for family in {family: None for family, _ in found.readings if family in _remarks}:
        found.remarks.extend(_imported(_remarks[family])())
    return found


def summarise(collection: Collection, names: Sequence[str]) -> list[str]:
    """What families make of their readings on these cards (keys of `cards.CARDS`), as lines."""
    lines: list[str] = []
    for family, entry in _summaries.items():
        readings = [reading for each, reading in collection.readings if each == family]
        lines += _imported(entry)(readings, names) if readings else []
    return lines


def _imported(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _compile(
    family: str, entry: str, architecture: str, names: Sequence[str], found: Collection
) -> Iterable[CompiledKernel]:
    def wanted(name: str) -> bool:
        return not names or any(part in name for part in names)

    # Whatever a missing or failing compiler raises, the other kernels are still worth reading.
    try:
        provider: Provider = _imported(entry)
        for kernel in provider(architecture):
            if not wanted(kernel.name):
                continue
            try:
                ready = kernel.compile() if isinstance(kernel, LazyKernel) else kernel
            except Exception as error:
                found.failures.append(_sentence(f"{family}, {kernel.name} for {architecture}", error))
            else:
                yield ready
    except UnavailableError as error:
        if str(error) not in found.remarks:
            found.remarks.append(str(error))
    except Exception as error:
        found.failures.append(_sentence(f"{family} for {architecture}", error))


def _sentence(what: str, error: Exception) -> str:
    """The first line of the error and, if it quotes ptxas, the first line in which ptxas gives its reason."""
    lines = str(error).splitlines() or [""]
    reasons = [line for line in lines[1:] if line.startswith("ptxas") and ("fatal" in line or "error" in line)]
    return f"{what}: {type(error).__name__}: " + "; ".join([lines[0], *reasons[:1]])


# Predicting ----------------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What 128 bytes of the main loop cost on a card, all SMs together."""

    instructions: float
    """Warp instructions for 128 bytes."""
    fewest_instructions: float
    """Those of a pass that jumps over whatever it can."""
    budget: float
    """Warp instructions that the card can issue while its memory delivers 128 bytes."""
    issue_ns: float
    fewest_issue_ns: float
    tensor_ns: float | None
    """None where the card's rate for a kind of multiplication is not known."""
    dram_ns: float
    useful_share: float | None
    """Of the tensor cores' multiply-accumulates; None if the family does not say, or there are none."""

    @property
    def binding(self) -> tuple[str, float]:
        """What takes longest, and how long, ns."""
        return self._longest(self.issue_ns)

    @property
    def fewest_binding(self) -> tuple[str, float]:
        """The same for a pass that jumps over whatever it can."""
        return self._longest(self.fewest_issue_ns)

    def _longest(self, issue_ns: float) -> tuple[str, float]:
        times = {"memory": self.dram_ns, "issue slots": issue_ns, "tensor cores": self.tensor_ns or 0.0}
        return max(times.items(), key=lambda item: item[1])


def predict(reading: Reading, card: cards.Card) -> Prediction | None:
    """None where the family does not say what a pass takes in, or the card is incomplete or of another architecture."""
    loop, kernel = reading.main_loop, reading.kernel
    if loop is None or not kernel.loop_bytes or not kernel.warps or card.architecture != kernel.architecture:
        return None
    if not (card.sms and card.clock and card.tensor and card.bandwidth):
        return None
    bytes_taken = kernel.loop_bytes * reading.unrolled
    scale = kernel.warps * LINE / bytes_taken  # from a warp's pass to 128 bytes
    issued_per_ns = card.sms * SCHEDULERS * card.clock
    dram_ns = LINE / card.bandwidth
    tensor_ns = None
    if all(kind in card.tensor for kind in loop.macs):
        clocks = sum(macs / card.tensor[kind] for kind, macs in loop.macs.items())  # of one SM
        tensor_ns = clocks * scale / (card.sms * card.clock)
    done = sum(loop.macs.values()) * kernel.warps / reading.unrolled
    return Prediction(
        instructions=loop.instructions * scale,
        fewest_instructions=loop.fewest * scale,
        budget=issued_per_ns * dram_ns,
        issue_ns=loop.instructions * scale / issued_per_ns,
        fewest_issue_ns=loop.fewest * scale / issued_per_ns,
        tensor_ns=tensor_ns,
        dram_ns=dram_ns,
        useful_share=kernel.loop_macs / done if kernel.loop_macs and done else None,
    )
