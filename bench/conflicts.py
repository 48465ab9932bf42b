"""Bank conflicts and coalescing of the CUDA kernels, counted on the emulator, without a GPU.

    python -m gemma4_kernels.bench.conflicts                # the cases below, kernel by kernel
    python -m gemma4_kernels.bench.conflicts CASE ...       # any cases that a CUDA kernel serves, by their strings
    python -m gemma4_kernels.bench.conflicts --lines        # every line of source, not only those with an excess

For each kernel, loads and stores of shared memory in wavefronts and of global memory in sectors of 32 bytes, each beside the
fewest there can be. emulator/counts.h says how they come about; docs/cuda.md what is assumed. The counted module is built from
csrc/ at the first use, so this needs the repository and g++.

A kernel is covered by a case in CASES; tests/cuda/test_conflicts.py holds it to no excess in shared memory but for what it
lists with a reason.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from gemma4_kernels import backends, environment
from gemma4_kernels.bench.cases import parse
from gemma4_kernels.cuda_common import support

ROOT = Path(__file__).resolve().parents[1]
TRAFFIC = {
    "shared-loads": "wavefronts", "shared-stores": "wavefronts", "global-loads": "sectors", "global-stores": "sectors",
}  # fmt: skip

# Both numbers of tiles, each kind of values and of scales, ragged n, and K in pieces.
CASES = (
    "quantized_linear(m=1,n=70,k=2048,scheme=Q4_0)",
    "quantized_linear(m=16,n=64,k=768,scheme=Q4_0,dtype=fp16)",
    "quantized_linear(m=8,n=64,k=768,scheme=AWQ)",
    "quantized_linear(m=3,n=64,k=768,scheme=MLX)",
    "quantized_linear(m=16,n=64,k=768,scheme=Q4_K)",
    "quantized_linear(m=1,n=64,k=768,scheme=NF4)",
    "quantized_linear(m=9,n=64,k=768,scheme=IQ4_XS)",
    "quantized_linear(m=3,n=64,k=512,scheme=NF4_NESTED)",
    "quantized_linear(m=3,n=64,k=768,scheme=Q5_K)",
    "quantized_linear(m=3,n=64,k=768,scheme=Q6_K)",
    "quantized_linear(m=3,n=64,k=512,scheme=Q8_0)",
    "flash_attn_with_kvcache(sq=2,lengths=130+40,left=31,right=0,page=16)",
    "k_eq_v_attention(sq=1,sk=130,hkv=1,d=512)",
    "k_eq_v_attention(sq=3,lengths=70+3,hq=8,hkv=1,d=128,page=16,cache=int8)",
)


@dataclass(frozen=True)
class Count:
    """Warp instructions, what they took (wavefronts or sectors) and the least they could have taken."""

    instructions: int = 0
    taken: int = 0
    ideal: int = 0

    @property
    def excess(self) -> int:
        return self.taken - self.ideal

    def __add__(self, other: Count) -> Count:
        return Count(self.instructions + other.instructions, self.taken + other.taken, self.ideal + other.ideal)


@dataclass(frozen=True)
class Line:
    """What one line of source does to one kind of memory."""

    traffic: str
    """A key of TRAFFIC."""
    what: str
    """ldmatrix, cp.async; plain: a load or store of C++."""
    where: str
    """file:line, the file by its name only."""
    count: Count


@dataclass
class KernelCounts:
    """All launches of one kernel."""

    kernel: str
    launches: int
    lines: list[Line] = field(default_factory=list)

    def total(self, traffic: str) -> Count:
        return sum((line.count for line in self.lines if line.traffic == traffic), Count())


# Counting -----------------------------------------------------------------------------------------------------------


class Counter:
    """What `counting` gives: the kernels that ran within, once it is over."""

    def __init__(self) -> None:
        self.kernels: list[KernelCounts] = []


@contextmanager
def counting() -> Iterator[Counter]:
    """Within, what asks for the emulated module gets the counted one. The caller has chosen the emulator.

    Raises RuntimeError where the counted module cannot be built.
    """
    module, path = _counted_module()
    counter = Counter()
    name = "gemma4_kernels._C_emulated"
    before = sys.modules.get(name)
    sys.modules[name] = module
    support._load.cache_clear()
    take = ctypes.CDLL(str(path)).gemma4_emulator_counts
    take.restype = ctypes.c_char_p
    take()
    try:
        yield counter
    finally:
        counter.kernels = read(take().decode(), path)
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        support._load.cache_clear()


def count_case(case: str) -> list[KernelCounts]:
    """The kernels that a case runs."""
    parsed = parse(case)
    made = parsed.inputs()
    with _emulated(), backends.use_backend("cuda"), counting() as counter:
        parsed.run(made)
    return counter.kernels


@contextmanager
def _emulated() -> Iterator[None]:
    """What is chosen is kept for the process: others shall not find the emulator chosen, nor this the lack of it."""
    before = os.environ.get("GEMMA4_EMULATE")
    environment.emulate()
    backends._select.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("GEMMA4_EMULATE")
        if before is not None:
            os.environ["GEMMA4_EMULATE"] = before
        backends._select.cache_clear()


@lru_cache
def _counted_module() -> tuple[ModuleType, Path]:
    script = ROOT / "csrc" / "build.py"
    if not script.is_file():
        raise RuntimeError("counting needs the repository: csrc/ is not beside bench/")
    build = _module_from("gemma4_kernels_build", script)
    path = build.counted_module(ROOT / "build" / "csrc")
    return _module_from("gemma4_kernels._C_counted", path), path


def _module_from(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Reading ------------------------------------------------------------------------------------------------------------


def read(text: str, binary: Path) -> list[KernelCounts]:
    """The counts that a program or module of the counted build gave as text (emulator/counts.h).

    Raises RuntimeError for a twin that would be counted as the loads and stores that it is made of.
    """
    rows = [line.split() for line in text.splitlines()]
    kernels = _frames([row[1] for row in rows if row[0] == "kernel"], binary)
    # The address is where the call returns to: one byte before it belongs to the call.
    places = _frames([f"{int(row[1], 16) - 1:x}" for row in rows if row[0] == "place"], binary)
    found: list[KernelCounts] = []
    sums: list[dict[tuple[str, str, str], Count]] = []
    for row in rows:
        if row[0] == "kernel":
            found.append(KernelCounts(_plain_name(kernels.pop(0)[0][0]), int(row[2])))
            sums.append({})
            continue
        frames = places.pop(0)
        if row[3] == "plain" and os.path.basename(frames[0][1]).startswith("twins.h:"):
            raise RuntimeError(
                f"{frames[0][0]} of twins.h touches memory word by word: it must count itself (docs/cuda.md)"
            )
        key = (row[2], row[3], _of_the_kernel(frames))
        sums[-1][key] = sums[-1].get(key, Count()) + Count(*map(int, row[4:]))
    for counts, lines in zip(found, sums, strict=True):
        counts.lines = [Line(*key, count) for key, count in sorted(lines.items())]
    return found


def _frames(addresses: Sequence[str], binary: Path) -> list[list[tuple[str, str]]]:
    """For each address (function, file:line), the innermost of inlined functions first."""
    if not addresses:
        return []
    command = ["addr2line", "-a", "-f", "-C", "-i", "-e", str(binary)]
    done = subprocess.run(command, input="\n".join(addresses), capture_output=True, text=True, check=True)
    frames: list[list[str]] = []
    for line in done.stdout.splitlines():
        if re.fullmatch(r"0x[0-9a-f]+", line):
            frames.append([])
        else:
            frames[-1].append(line)
    return [list(zip(lines[::2], lines[1::2], strict=True)) for lines in frames]


def _of_the_kernel(frames: Sequence[tuple[str, str]]) -> str:
    """The innermost place that is not in the emulator's twins and vectors."""
    outside = [place for _, place in frames if "/csrc/emulator/" not in os.path.normpath(place)]
    path, line = (outside or [place for _, place in frames])[0].split(" ")[0].rsplit(":", 1)
    return f"{os.path.basename(path)}:{line}"


def _plain_name(function: str) -> str:
    """Without the return type, the namespaces and the parameters of a C++ function's name."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", function.removeprefix("void "))
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and place > 0:
            return name[:place]
    return name


# The report ---------------------------------------------------------------------------------------------------------


def render(kernels: Sequence[KernelCounts], all_lines: bool) -> str:
    lines = []
    for counts in kernels:
        lines += ["", f"{counts.kernel}, {counts.launches} launch{'es' if counts.launches > 1 else ''}"]
        for traffic, unit in TRAFFIC.items():
            total = counts.total(traffic)
            if total.instructions == 0:
                continue
            lines.append(f"  {traffic.replace('-', ' '):<13}  {_numbers(total, unit)}")
            for line in counts.lines:
                if line.traffic == traffic and (all_lines or line.count.excess):
                    lines.append(f"    {line.where:<24} {line.what:<9} {_numbers(line.count, unit)}")
    return "\n".join(lines[1:])


def _numbers(count: Count, unit: str) -> str:
    return f"{count.taken:>8} {unit}, {count.ideal:>8} at best ({count.instructions} instructions)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gemma4_kernels.bench.conflicts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default those of CASES")
    parser.add_argument("--lines", action="store_true", help="every line of source, not only those with an excess")
    parsed = parser.parse_args(arguments)
    for number, case in enumerate(parsed.cases or CASES):
        try:
            kernels = count_case(case)
        except (RuntimeError, ValueError) as error:
            print(f"conflicts: {error}", file=sys.stderr)
            return 2
        print(f"{'' if number == 0 else chr(10)}{case}")
        print(render(kernels, parsed.lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
