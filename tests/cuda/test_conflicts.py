"""The counted build of the emulator counts what it says, and the kernels meet no bank of shared memory twice."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cuda_build import FOLDER, build, skip_without_compiler

from gemma4_kernels.bench import conflicts

skip_without_compiler()
if shutil.which("addr2line") is None:
    pytest.skip("no addr2line", allow_module_level=True)

STORED = {"global-stores": (1, 4, 4)}  # out[threadIdx.x] of one warp
# Of each kernel of conflicts.cpp: instructions, wavefronts or sectors, and the fewest there can be.
PLANTED = {
    "words": {"shared-loads": (1, 1, 1), **STORED},
    "two-way": {"shared-loads": (1, 2, 1), **STORED},
    "thirty-two-way": {"shared-loads": (1, 32, 1), **STORED},
    "broadcast": {"shared-loads": (1, 1, 1), **STORED},
    "word-twice": {"shared-loads": (1, 1, 1), **STORED},
    "row-thrice": {"shared-loads": (1, 3, 1), **STORED},
    "stores": {"shared-stores": (1, 1, 1)},
    "stores-four-way": {"shared-stores": (1, 4, 1)},
    "bytes": {"shared-loads": (1, 1, 1), **STORED},
    "chunks": {"shared-loads": (1, 32, 4), **STORED},
    "chunks-permuted": {"shared-loads": (1, 4, 4), **STORED},
    "chunk-stores": {"shared-stores": (1, 32, 4)},
    "chunk-stores-permuted": {"shared-stores": (1, 4, 4)},
    "matrices": {"shared-loads": (1, 32, 4), **STORED},
    "matrices-permuted": {"shared-loads": (1, 4, 4), **STORED},
    "copies": {"shared-stores": (1, 32, 4), "global-loads": (1, 16, 16)},
    "copies-permuted": {"shared-stores": (1, 4, 4), "global-loads": (1, 16, 16)},
    "copies-of-some": {"shared-stores": (1, 4, 4), "global-loads": (1, 8, 8)},
    "pairs": {"shared-loads": (1, 2, 2), **STORED},
    "pairs-of-some": {"shared-stores": (1, 1, 1)},
    "loop": {"shared-loads": (4, 6, 4), **STORED},
    "barriers": {"shared-loads": (12, 28, 12), "global-stores": (4, 16, 16)},
    "global-words": {"global-loads": (1, 4, 4), **STORED},
    "global-strided": {"global-loads": (1, 32, 4), "global-stores": (1, 32, 4)},
    "global-one": {"global-loads": (1, 1, 1), **STORED},
    "global-shifted": {"global-loads": (1, 5, 4), **STORED},
    "global-chunks": {"global-loads": (1, 16, 16), "global-stores": (1, 16, 16)},
    "global-halves": {"global-loads": (1, 32, 2), "global-stores": (1, 2, 2)},
}
# Instructions of kernels that meet banks more often than they must, by (file, what they are): the reason.
EXCUSED: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def program():
    return build.checks(FOLDER, ("conflicts",), (build.COUNTED,))["conflicts", build.COUNTED]


def counts_of(program, name: str) -> conflicts.KernelCounts:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60, check=True)
    (counts,) = conflicts.read(done.stdout, program)
    return counts


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_counted_exactly(program, name):
    counts = counts_of(program, name)
    totals = {traffic: counts.total(traffic) for traffic in conflicts.TRAFFIC}
    found = {
        traffic: (count.instructions, count.taken, count.ideal)
        for traffic, count in totals.items()
        if count != conflicts.Count()
    }
    assert found == PLANTED[name]


def test_every_planted_kernel_is_in_the_list(program):
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == set(PLANTED)


def test_a_count_is_named_by_kernel_line_and_instruction(program):
    source = (build.ROOT / "tests" / "cuda" / "conflicts.cpp").read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(source) if "ptx::load_matrices" in line)
    counts = counts_of(program, "matrices")
    assert (counts.kernel, counts.launches) == ("matrices<false>", 1)
    (line,) = [line for line in counts.lines if line.traffic == "shared-loads"]
    assert (line.where, line.what) == (f"conflicts.cpp:{number}", "ldmatrix")
    assert f"conflicts.cpp:{number}" in conflicts.render([counts], all_lines=False)


@pytest.mark.skipif(build.obstacles()["_C_emulated"] is not None, reason="no emulated module can be built")
@pytest.mark.parametrize("case", conflicts.CASES)
def test_no_kernel_meets_a_bank_twice(case):
    kernels = conflicts.count_case(case)
    assert any(counts.total("shared-loads").instructions for counts in kernels)
    found = [
        f"{line.where} {line.what} {line.count}"
        for counts in kernels
        for line in counts.lines
        if line.traffic.startswith("shared") and line.count.excess
        if (line.where.split(":")[0], line.what) not in EXCUSED
    ]
    assert not found
