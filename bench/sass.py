"""Machine code of a compiled kernel, as cuobjdump prints it: its resources, its loops, and what a pass of a loop asks for.

Nothing here runs or knows a card. Counts are per warp. Within a loop every instruction between the first and the last address
counts as executed once a pass:

* a branch inside the loop makes the count an upper bound, because a real pass skips one of the two sides; `Loop.fewest` is the
  lower bound;
* a loop inside the loop makes it a lower bound; `Loop.inner_loops` says whether there is one;
* code that ptxas moved behind the end of the kernel, and functions that are called, are not in it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LANES = 32  # of a warp


class Instruction(NamedTuple):
    address: int
    text: str
    """Mnemonic and operands, without the predicate: "LDG.E.128 R4, [R2.64]"."""
    predicate: str = ""
    """ "P0", "!UP2"; empty if the instruction is always executed."""

    @property
    def mnemonic(self) -> str:
        return self.text.split(" ", 1)[0]


class Loop(NamedTuple):
    """Everything between a backward branch and its target, counted for one warp and one pass."""

    start: int
    end: int
    """Addresses of the first and the last instruction."""
    instructions: int
    fewest: int
    """Instructions of a pass in which every branch takes the shortest way."""
    loads: Mapping[int, int]
    """Loads from global memory into registers: bytes per lane -> number."""
    copies: Mapping[int, int]
    """Asynchronous copies from global to shared memory (LDGSTS): bytes per lane -> number."""
    bulk_copies: int
    """Copies of the copy engine (UBLKCP, UTMALDG), whose size the machine code does not show."""
    macs: Mapping[str, int]
    """Multiply-accumulates of the tensor cores by kind, see `matrix_macs`."""
    matrix_instructions: int
    shared_accesses: int
    """LDS, LDSM, STS and their relatives."""
    transcendentals: int
    """MUFU: exp2, reciprocal, square root, ..."""
    local_accesses: int
    """LDL, STL: spilled registers, or arrays that did not fit into registers."""
    inner_branches: int
    """Branches besides the one that closes the loop."""
    inner_loops: int

    @property
    def loaded_bytes(self) -> int:
        """Bytes that one warp reads from global memory, without bulk copies; lanes that are switched off count too."""
        return LANES * (_sum(self.loads) + _sum(self.copies))

    @property
    def reads_memory(self) -> bool:
        return bool(self.loads or self.copies or self.bulk_copies)


# How a kernel with several loops names its main one: the greatest of these, among the innermost loops that load.
MAIN_LOOP: dict[str, Callable[[Loop], tuple[int, ...]]] = {
    # A bulk copy has no size in the code and is more than any other load.
    "loads": lambda loop: (
        loop.bulk_copies, loop.loaded_bytes, sum(loop.macs.values()), loop.instructions,
    ),
    # A fast path beside a general one loads and multiplies the same with fewer instructions.
    "fast path": lambda loop: (
        loop.bulk_copies, loop.loaded_bytes, sum(loop.macs.values()), -loop.instructions,
    ),
    "copies": lambda loop: (_sum(loop.copies), sum(loop.macs.values()), loop.instructions),
    # Of several loops that multiply as much, one for a special case is shorter, whatever the general one loads besides.
    "fast macs": lambda loop: (sum(loop.macs.values()), -loop.instructions),
    "macs": lambda loop: (sum(loop.macs.values()), loop.loaded_bytes, loop.instructions),
    "instructions": lambda loop: (loop.instructions,),
}  # fmt: skip


def main_loop(loops: Sequence[Loop], choice: str = "loads") -> Loop | None:
    """The loop that a kernel spends its time in: an innermost one, by default that with the most bytes loaded.

    A loop inside another takes its place only if it loads as well: a loop that waits for a barrier does not. `choice` is a key
    of MAIN_LOOP. None if there is no loop.
    """
    candidates = [
        loop for loop in loops if not any(other.reads_memory and _within(other, loop) for other in loops)
    ]  # fmt: skip
    return max(candidates, key=MAIN_LOOP[choice], default=None)


def unrolling(loop: Loop, loops: Sequence[Loop]) -> int:
    """How many passes of the source one pass of `loop` seems to be; 1 if nothing says so.

    ptxas unrolls small loops and keeps a second one for the passes that remain: what that one loads and multiplies is a whole
    fraction of what `loop` does, in each width and kind.
    """
    mine = _work(loop)
    found = 1
    for other in loops:
        theirs = _work(other)
        if theirs and theirs.keys() == mine.keys():
            ratios = {mine[each] / theirs[each] for each in mine}
            if len(ratios) == 1 and (ratio := ratios.pop()).is_integer():
                found = max(found, int(ratio))
    return found


def _work(loop: Loop) -> dict[tuple[str, int | str], int]:
    work: dict[tuple[str, int | str], int] = {("load", width): number for width, number in loop.loads.items()}
    work |= {("copy", width): number for width, number in loop.copies.items()}
    return work | {("mac", kind): number for kind, number in loop.macs.items()}


# Instructions --------------------------------------------------------------------------------------------------------

_LOAD = re.compile(r"(LDG|LD)(\.|$)")
_COPY = re.compile(r"LDGSTS(\.|$)")
_BULK_COPY = re.compile(r"(UBLKCP|UTMALDG)(\.|$)")
_SHARED = re.compile(r"(LDS|LDSM|STS|STSM|ATOMS)(\.|$)")
_LOCAL = re.compile(r"(LDL|STL)(\.|$)")
_TRANSCENDENTAL = re.compile(r"MUFU(\.|$)")
_MATRIX = re.compile(r"[A-Z0-9]*MMA(\.|$)")
_MATRIX_KNOWN = re.compile(r"(H|Q|I|D)(G?)MMA\.")
_WARP_SHAPE = re.compile(r"\.(16|8)8(4|8|16|32|64|128)(?=\.|$)")
_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)(?=\.|$)")
_WARPS_OF_A_GROUP = 4
_BRANCH = re.compile(r"BRA\S*\s+(.*?)(?:0x([0-9a-f]+)|`\(\S+\))\s*$")
_END = re.compile(r"(EXIT|RET|BRX|JMP|JMX|BRXU)\b")


def load_bytes(mnemonic: str) -> int:
    """Bytes per lane of a load from global memory: "LDG.E.LTC128B.64" -> 8. Without a size it is 4."""
    for part in mnemonic.split("."):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:]) // 8
    return 4


def matrix_macs(mnemonic: str) -> tuple[str, int]:
    """Kind and multiply-accumulates that a tensor-core instruction does for its warp.

    Kinds: "bf16" (16-bit floats summed in fp32), "fp16 sums" (summed in fp16), "tf32", "fp8" (also 6 and 4 bits in the same
    instruction), "int8", "fp64". Names as ptxas writes them for sm_80 to sm_120, which has the names of sm_89:
    "HMMA.16816.F32.BF16" is 16 x 8 x 16 for one warp, "HGMMA.64x128x16.F32" is 64 x 128 x 16 for four warps together, each of
    which issues it. Raises ValueError for one that is not known: a count that leaves it out would be wrong without a sign.
    """
    family = _MATRIX_KNOWN.match(mnemonic)
    parts = mnemonic.split(".")
    if family is None or "SP" in parts or {"S4", "U4", "B1"} & set(parts):
        raise ValueError(f"the tensor-core instruction {mnemonic} is not known")
    if family[2] and (shape := _GROUP_SHAPE.search(mnemonic)):
        macs = int(shape[1]) * int(shape[2]) * int(shape[3]) // _WARPS_OF_A_GROUP
    elif not family[2] and (shape := _WARP_SHAPE.search(mnemonic)):
        macs = int(shape[1]) * 8 * int(shape[2])
    else:
        raise ValueError(f"the shape of the tensor-core instruction {mnemonic} is not known")
    if family[1] == "H":
        return ("tf32" if "TF32" in parts else "bf16" if "F32" in parts else "fp16 sums"), macs
    return {"Q": "fp8", "I": "int8", "D": "fp64"}[family[1]], macs


def branch_target(instruction: Instruction) -> int | None:
    """Address that the instruction may jump to; None if it is no branch."""
    match = _BRANCH.match(instruction.text)
    return int(match[2], 16) if match and match[2] else None


def _falls_through(instruction: Instruction) -> bool:
    """Whether the next instruction may follow."""
    if instruction.predicate:
        return True
    if match := _BRANCH.match(instruction.text):
        return bool(match[1])  # "BRA.U UP0, 0x5b0" carries its condition as an operand
    return not _END.match(instruction.text)


# Loops ---------------------------------------------------------------------------------------------------------------


def find_loops(listing: Sequence[Instruction]) -> list[Loop]:
    """Loops by their backward branches; two branches to one target are one loop, to the later of them.

    A backward branch closes a loop only if the code between leads from its target to it. Code that ptxas puts behind the end
    of a kernel also jumps back, into the middle, and closes none.
    """
    ends: dict[int, int] = {}
    for instruction in listing:
        target = branch_target(instruction)
        if target is not None and target < instruction.address:
            body = [each for each in listing if target <= each.address <= instruction.address]
            if _fewest(body) is not None:
                ends[target] = max(instruction.address, ends.get(target, 0))
    spans = sorted(ends.items())
    return [
        _loop(
            [each for each in listing if start <= each.address <= end],
            inner_loops=sum((start, end) != span and start <= span[0] and span[1] <= end for span in spans),
        )
        for start, end in spans
    ]


def _fewest(body: Sequence[Instruction]) -> int | None:
    """Instructions on the shortest way from the first to the last, both included; None if none leads there inside `body`."""
    position = {instruction.address: index for index, instruction in enumerate(body)}
    steps = {0: 1}
    waiting = deque([0])
    while waiting:
        index = waiting.popleft()
        following = [index + 1] if _falls_through(body[index]) else []
        target = branch_target(body[index])
        if target in position:
            following.append(position[target])
        for each in following:
            if each < len(body) and each not in steps:
                steps[each] = steps[index] + 1
                waiting.append(each)
    return steps.get(len(body) - 1)


def _loop(body: Sequence[Instruction], inner_loops: int) -> Loop:
    # "@!PT LDS RZ, [RZ]" takes an issue slot and does nothing else.
    names = [instruction.mnemonic for instruction in body if instruction.predicate not in ("!PT", "!UPT")]
    matrix = [matrix_macs(name) for name in names if _MATRIX.match(name)]
    macs: Counter[str] = Counter()
    for kind, number in matrix:
        macs[kind] += number

    def count(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(name)) for name in names)

    return Loop(
        body[0].address,
        body[-1].address,
        len(body),
        fewest=_fewest(body) or len(body),
        loads=dict(Counter(load_bytes(name) for name in names if _LOAD.match(name))),
        copies=dict(Counter(load_bytes(name) for name in names if _COPY.match(name))),
        bulk_copies=count(_BULK_COPY),
        macs=dict(macs),
        matrix_instructions=len(matrix),
        shared_accesses=count(_SHARED),
        transcendentals=count(_TRANSCENDENTAL),
        local_accesses=count(_LOCAL),
        inner_branches=sum(name.split(".")[0] in ("BRA", "BRX") for name in names) - 1,
        inner_loops=inner_loops,
    )


def count_spills(listing: Sequence[Instruction]) -> int:
    """Instructions that access local memory."""
    return sum(bool(_LOCAL.match(instruction.mnemonic)) for instruction in listing)


def _within(inner: Loop, outer: Loop) -> bool:
    return (
        (inner.start, inner.end) != (outer.start, outer.end) and outer.start <= inner.start and inner.end <= outer.end
    )


def _sum(widths: Mapping[int, int]) -> int:
    return sum(width * number for width, number in widths.items())


# cuobjdump -----------------------------------------------------------------------------------------------------------


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


def disassemble(cubin: bytes) -> str:
    """`cuobjdump -res-usage -sass` of a cubin, both in one run: each starts with half a second of its own. Raises
    RuntimeError where that fails."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is missing")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-res-usage", "-sass", str(path)], capture_output=True, text=True, timeout=120, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{Path(tool).name} failed: {done.stderr.strip().splitlines()[:1]}")
    return done.stdout


# Since sm_90 a function with shared memory counts the kilobyte that the driver keeps for itself in each block, which is not
# part of what a launch may ask for.
_RESERVED_SHARED = 1024
_FUNCTION_USAGE = re.compile(r"Function (\S+?):\s*\n\s*(.+)")
_NUMBER = re.compile(r"(\w+)(?:\[\d+\])?:(\d+)")
_FUNCTION_CODE = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][^;]*);")


def parse_resources(text: str, architecture: str) -> dict[str, dict[str, int]]:
    """The part of -res-usage -> {function: {"REG": 32, "STACK": 0, "SHARED": 1024, ...}}, SHARED as the source has it."""
    found = {
        name: {key: int(value) for key, value in _NUMBER.findall(line)} for name, line in _FUNCTION_USAGE.findall(text)
    }
    if int(architecture.removeprefix("sm_")) >= 90:
        for numbers in found.values():
            numbers["SHARED"] = max(numbers["SHARED"] - _RESERVED_SHARED, 0)
    return found


def parse_listing(text: str) -> dict[str, list[Instruction]]:
    """The part of -sass -> {function: its instructions}; padding after the end is dropped."""
    listings: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := _FUNCTION_CODE.match(line):
            current = listings.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(int(match[1], 16), match[3].strip(), match[2] or ""))
    return {name: _without_padding(listing) for name, listing in listings.items()}


def _without_padding(listing: list[Instruction]) -> list[Instruction]:
    """Behind the last instruction stands a branch to itself, and NOPs to a full line."""
    end = len(listing)
    while end and listing[end - 1].mnemonic == "NOP":
        end -= 1
    if end and branch_target(listing[end - 1]) == listing[end - 1].address:
        end -= 1
    return listing[:end]
