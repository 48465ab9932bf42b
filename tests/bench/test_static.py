"""Machine code as cuobjdump prints it: what is read from it, and a kernel that is really compiled."""

from __future__ import annotations

import importlib.util

import pytest

from gemma4_kernels.bench import static
from gemma4_kernels.bench.static import Loop

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# An outer loop from 0x20 to 0xb0 around a loop over loads (0x30 to 0x60) and a shorter one without any (0x80 to 0x90).
LISTING = """
	code for sm_86
		Function : first
	.headerflags	@"EF_CUDA_SM86"
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
                                                            /* 0x000fe40000000f00 */
        /*0010*/                   STL [R1], R2 ;           /* 0x0 */
        /*0020*/                   IADD3 R3, R3, 0x1, RZ ;  /* 0x0 */
        /*0030*/              @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0 */
        /*0040*/                   LDGSTS.E [R9], [R2.64] ; /* 0x0 */
        /*0050*/                   FADD R5, R4, R5 ;        /* 0x0 */
        /*0060*/               @P1 BRA 0x30 ;               /* 0x0 */
        /*0070*/                   LDL R2, [R1] ;           /* 0x0 */
        /*0080*/                   FMUL R5, R5, R5 ;        /* 0x0 */
        /*0090*/              @UP2 BRA 0x80 ;               /* 0x0 */
        /*00a0*/               @P3 BRA 0xc0 ;               /* 0x0 */
        /*00b0*/               @P2 BRA 0x20 ;               /* 0x0 */
        /*00c0*/                   EXIT ;                   /* 0x0 */
        /*00d0*/                   BRA 0xd0;                /* 0x0 */
        /*00e0*/                   NOP;                     /* 0x0 */
        /*00f0*/                   NOP;                     /* 0x0 */
		..........
		Function : second
        /*0000*/                   EXIT ;                   /* 0x0 */
"""


def test_registers_stack_and_shared_memory():
    found = static.parse_resources(USAGE)
    assert list(found) == ["first", "second"]
    assert {name: found["first"][name] for name in ("REG", "STACK", "SHARED")} == {
        "REG": 40,
        "STACK": 16,
        "SHARED": 1024,
    }


def test_a_listing_ends_where_the_code_ends():
    found = static.parse_listing(LISTING)
    assert [len(found["first"]), len(found["second"])] == [13, 1]
    assert static.count_spills(found["first"]) == 2
    assert found["first"][3] == (0x30, "LDG.E.128 R4, [R2.64]")


def test_loops_and_what_they_load():
    loops = static.find_loops(static.parse_listing(LISTING)["first"])
    assert loops == [Loop(0x20, 0xB0, 10, 2), Loop(0x30, 0x60, 4, 2), Loop(0x80, 0x90, 2, 0)]


def reading(kernel=None):
    listing = static.parse_listing(LISTING)["first"]
    kernel = kernel or static.CompiledKernel("first", "sm_86", b"", 2048, warps=4, loop_bytes=64)
    return static.Reading(kernel, "first", 40, 16, 1024, 2, len(listing), tuple(static.find_loops(listing)))


def test_the_main_loop_is_the_innermost_that_loads():
    assert reading().main_loop == Loop(0x30, 0x60, 4, 2)


def test_a_table_row_and_a_prediction_that_says_it_is_one():
    text = static.render(static.Collection([("linear", reading())], []))
    row = next(line for line in text.splitlines() if line.startswith("| linear"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["linear", "first", "sm_86", "40", "3072", "2", "13", "4", "2"]
    (sentence,) = [line for line in text.splitlines() if "RTX" in line]
    # 4 instructions x 4 warps for 64 bytes; a 3060 issues 28 x 4 x 1.78 = 199 a nanosecond and reads 360 bytes.
    assert sentence.startswith("predicted, first on RTX 3060: 0.250 warp instructions per byte; memory bandwidth bind")
    assert "2.2 times" in sentence


def test_where_instructions_bind_it_says_so():
    kernel = static.CompiledKernel("first", "sm_89", b"", 0, warps=8, loop_bytes=16)
    text = static.render(static.Collection([("linear", reading(kernel))], []))
    assert "on RTX 4060: 2.000 warp instructions per byte; issue slots bind, 2.3 times" in text


def test_no_bytes_no_prediction():
    kernel = static.CompiledKernel("first", "sm_86", b"", 0, warps=4)
    assert "predicted" not in static.render(static.Collection([("linear", reading(kernel))], []))


def test_a_version_without_compiled_kernels_says_so(monkeypatch):
    monkeypatch.setattr(static, "_providers", {})
    text = static.render(static.collect())
    assert "0 compiled kernels." in text
    assert "No family of this version has compiled kernels" in text


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or static.cuobjdump() is None,
    reason="Triton and cuobjdump are not installed",
)


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setattr(static, "_providers", {})
    return static.register


@needs_triton
def test_a_kernel_is_compiled_and_read_without_a_gpu(provider):
    provider("tests", "static_kernels:provide")
    found = static.collect(["sm_86"])
    assert found.remarks == []
    ((family, read),) = found.readings
    assert (family, read.function, read.kernel.architecture) == ("tests", "summed_rows", "sm_86")
    assert 8 <= read.registers <= 64
    assert (read.spill_instructions, read.stack_bytes) == (0, 0)
    assert read.main_loop is not None
    assert read.main_loop.loads >= 2
    assert read.main_loop.instructions < read.instructions
    text = static.render(found)
    assert "1 compiled kernels." in text
    assert "predicted, summed_rows on RTX 3060" in text


@needs_triton
def test_a_family_that_cannot_be_compiled_is_a_remark(provider):
    provider("broken", "static_kernels:provide_nothing_good")
    provider("absent", "no_such_module:provide")
    found = static.collect(["sm_86"])
    assert found.readings == []
    assert found.remarks[0] == "broken on sm_86: RuntimeError: the compiler is on strike"
    assert found.remarks[1].startswith("absent on sm_86: ModuleNotFoundError")


def test_without_cuobjdump_it_says_so(provider, monkeypatch):
    provider("tests", "static_kernels:provide")
    monkeypatch.setattr(static, "cuobjdump", lambda: None)
    assert static.collect(["sm_86"]).remarks == [
        "cuobjdump is missing: it comes with the CUDA toolkit and with Triton."
    ]


@needs_triton
def test_damaged_machine_code_is_a_sentence(provider):
    with pytest.raises(RuntimeError, match="cuobjdump"):
        static.read(static.CompiledKernel("damaged", "sm_86", b"no cubin at all"))
