"""What compiled kernels say before any GPU has run them: registers, spills, shared memory, loops, and what will bind.

A family registers a provider, a function that compiles its kernels for an architecture and returns them as `CompiledKernel`s.
Everything here is read from the machine code with cuobjdump (of the CUDA toolkit, or the one that Triton brings along). No
figure is a measurement: each is a property of the code, or predicted from it.

Predicted binding resource: the main loop of a kernel issues so many instructions for so many bytes of weights or cache. A card
issues at most SMs x 4 x clock warp instructions a second and reads at most its bandwidth; whichever takes longer per byte
binds.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gemma4_kernels.bench.tables import table

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
SCHEDULERS = 4  # of an SM, each issuing one warp instruction a cycle


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture."""

    name: str
    architecture: str
    cubin: bytes
    shared_bytes: int | None = None
    """Dynamic shared memory that the launch asks for, which the machine code does not show; None for none."""
    warps: int | None = None
    loop_bytes: int | None = None
    """Bytes of weights or cache that a block takes in during one pass of its main loop, if the family says so."""


class Card(NamedTuple):
    """What the prediction needs; figures of the data sheets, see `cards`."""

    name: str
    architecture: str
    sms: int
    clock_ghz: float
    bandwidth_gbs: float


PREDICTED_FOR = (
    Card("RTX 3060", "sm_86", 28, 1.78, 360.0),
    Card("RTX 4060", "sm_89", 24, 2.46, 272.0),
)


class Loop(NamedTuple):
    """A loop of the machine code: everything between a backward branch and its target."""

    start: int
    end: int
    """Addresses of the first and the last instruction."""
    instructions: int
    loads: int
    """Instructions that read global memory, asynchronous copies included."""


class Reading(NamedTuple):
    """One function of a compiled kernel."""

    kernel: CompiledKernel
    function: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    spill_instructions: int
    """Loads from and stores to local memory: spilled registers, or arrays that did not fit into registers."""
    instructions: int
    loops: tuple[Loop, ...]

    @property
    def shared_bytes(self) -> int:
        return self.static_shared_bytes + (self.kernel.shared_bytes or 0)

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop with the most loads from global memory, and of those the longest."""
        innermost = [loop for loop in self.loops if not any(_within(other, loop) for other in self.loops)]
        return max(innermost, key=lambda loop: (loop.loads, loop.instructions), default=None)


Provider = Callable[[str], Iterable[CompiledKernel]]

# family -> "package.module:function", a Provider that is imported when it is asked.
_providers: dict[str, str] = {}


def register(family: str, entry: str) -> None:
    """Name the function that compiles a family's kernels. Registering a family again replaces it."""
    _providers[family] = entry


def unregister(family: str) -> None:
    del _providers[family]


class Collection(NamedTuple):
    readings: list[tuple[str, Reading]]
    """(family, reading)"""
    remarks: list[str]
    """What could not be read, and why."""


def collect(architectures: Iterable[str] = ARCHITECTURES) -> Collection:
    """Compile and read the kernels of every family; a family that fails becomes a remark."""
    readings: list[tuple[str, Reading]] = []
    remarks: list[str] = []
    if not _providers:
        remarks.append("No family of this version has compiled kernels: its implementations are plain PyTorch.")
        return Collection(readings, remarks)
    if cuobjdump() is None:
        remarks.append("cuobjdump is missing: it comes with the CUDA toolkit and with Triton.")
        return Collection(readings, remarks)
    for family, entry in _providers.items():
        for architecture in architectures:
            try:
                module, _, name = entry.partition(":")
                provider: Provider = getattr(importlib.import_module(module), name)
                for kernel in provider(architecture):
                    readings += [(family, reading) for reading in read(kernel)]
            except Exception as error:  # a compiler that is missing or fails says so in many ways
                remarks.append(f"{family} on {architecture}: {type(error).__name__}: {error}".splitlines()[0])
    return Collection(readings, remarks)


def render(collection: Collection) -> str:
    head = (
        "family",
        "kernel",
        "arch",
        "registers",
        "shared bytes",
        "spills",
        "instructions",
        "main loop",
        "loads in it",
    )
    rows, predictions = [], []
    for family, reading in collection.readings:
        loop = reading.main_loop
        rows.append(
            (
                family, reading.function, reading.kernel.architecture, str(reading.registers), str(reading.shared_bytes),
                str(reading.spill_instructions), str(reading.instructions),
                "-" if loop is None else str(loop.instructions), "-" if loop is None else str(loop.loads),
            )
        )  # fmt: skip
        predictions += [
            _predict(reading, card) for card in PREDICTED_FOR if card.architecture == reading.kernel.architecture
        ]
    lines = [*table(head, rows, numbers=range(3, len(head))), f"{len(rows)} compiled kernels."]
    found = [sentence for sentence in predictions if sentence]
    return "\n".join(lines + (["", *found] if found else []) + collection.remarks)


def _predict(reading: Reading, card: Card) -> str | None:
    """One sentence, or None where the family does not say what a pass of the loop takes in."""
    loop, kernel = reading.main_loop, reading.kernel
    if loop is None or not kernel.loop_bytes or not kernel.warps:
        return None
    per_byte = loop.instructions * kernel.warps / kernel.loop_bytes
    issue = per_byte / (card.sms * SCHEDULERS * card.clock_ghz)  # ns per byte
    memory = 1 / card.bandwidth_gbs
    binding, ratio = ("issue slots", issue / memory) if issue > memory else ("memory bandwidth", memory / issue)
    return (
        f"predicted, {reading.function} on {card.name}: {per_byte:.3f} warp instructions per byte; "
        f"{binding} bind, {ratio:.1f} times the other"
    )


# Reading machine code -----------------------------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """Path of cuobjdump: on the PATH, or Triton's own; Triton is not imported for it."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        candidate = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if candidate.is_file():
            return str(candidate)
    return None


def read(kernel: CompiledKernel) -> list[Reading]:
    """Everything cuobjdump tells of each function in a cubin. Raises RuntimeError where it cannot be run."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is missing")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.cubin)
        usage, code = (_output([tool, option, str(path)]) for option in ("-res-usage", "-sass"))
    resources = parse_resources(usage)
    if not resources:
        raise RuntimeError(f"cuobjdump found no function in {kernel.name} for {kernel.architecture}")
    listings = parse_listing(code)
    readings = []
    for function, numbers in resources.items():
        listing = listings.get(function, [])
        readings.append(
            Reading(
                kernel, function, numbers.get("REG", 0), numbers.get("STACK", 0), numbers.get("SHARED", 0),
                count_spills(listing), len(listing), tuple(find_loops(listing)),
            )
        )  # fmt: skip
    return readings


_FUNCTION_USAGE = re.compile(r"Function (\S+?):\s*\n\s*(.+)")
_NUMBER = re.compile(r"(\w+)(?:\[\d+\])?:(\d+)")
_FUNCTION_CODE = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);")
_SPILL = re.compile(r"(LDL|STL)\b")
_GLOBAL_LOAD = re.compile(r"(LDG|LDGSTS|LD|UBLKCP|UTMALDG)\b")
_BRANCH = re.compile(r"BRA\b.*?(?:`\(\S+\)|0x([0-9a-f]+))")


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """`cuobjdump -res-usage` -> {function: {"REG": 32, "STACK": 0, "SHARED": 1024, ...}}."""
    return {
        name: {key: int(value) for key, value in _NUMBER.findall(line)} for name, line in _FUNCTION_USAGE.findall(text)
    }


def parse_listing(text: str) -> dict[str, list[tuple[int, str]]]:
    """`cuobjdump -sass` -> {function: [(address, instruction without its predicate)]}; padding after the end is dropped."""
    listings: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _FUNCTION_CODE.match(line):
            current = listings.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append((int(match[1], 16), match[2].strip()))
    return {name: _without_padding(listing) for name, listing in listings.items()}


def _without_padding(listing: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Behind the last instruction stands a branch to itself, and NOPs to a full line."""
    end = len(listing)
    while end and listing[end - 1][1].startswith("NOP"):
        end -= 1
    if end and (target := _target(listing[end - 1][1])) is not None and target == listing[end - 1][0]:
        end -= 1
    return listing[:end]


def count_spills(listing: list[tuple[int, str]]) -> int:
    """Instructions that access local memory."""
    return sum(bool(_SPILL.match(text)) for _, text in listing)


def find_loops(listing: list[tuple[int, str]]) -> list[Loop]:
    """Loops by their backward branches; two branches to one target are one loop, to the later of them."""
    ends: dict[int, int] = {}
    for address, text in listing:
        target = _target(text)
        if target is not None and target < address:
            ends[target] = max(address, ends.get(target, 0))
    loops = []
    for start, end in sorted(ends.items()):
        body = [text for address, text in listing if start <= address <= end]
        loops.append(Loop(start, end, len(body), sum(bool(_GLOBAL_LOAD.match(text)) for text in body)))
    return loops


def _target(text: str) -> int | None:
    match = _BRANCH.match(text)
    return int(match[1], 16) if match and match[1] else None


def _within(inner: Loop, outer: Loop) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end and inner != outer


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip().splitlines()[:1]}")
    return done.stdout
