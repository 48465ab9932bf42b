"""Machine code as cuobjdump prints it: what is read from a listing, and from kernels that are really compiled."""

from __future__ import annotations

import importlib.util

import pytest

from gemma4_kernels.bench import sass, static
from gemma4_kernels.bench.sass import Instruction
from gemma4_kernels.environment import triton_interprets

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:16 SHARED:3072 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# An outer loop from 0x20 to 0xd0 around a loop over loads (0x30 to 0x80) and one that waits (0xa0 to 0xb0).
LISTING = """
	code for sm_86
		Function : first
	.headerflags	@"EF_CUDA_SM86"
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
                                                            /* 0x000fe40000000f00 */
        /*0010*/                   STL [R1], R2 ;           /* 0x0 */
        /*0020*/                   IADD3 R3, R3, 0x1, RZ ;  /* 0x0 */
        /*0030*/              @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0 */
        /*0040*/                   LDGSTS.E [R9], [R2.64], P1 ; /* 0x0 */
        /*0050*/              @!PT LDS RZ, [RZ] ;           /* 0x0 */
        /*0060*/               @P4 BRA 0x80 ;               /* 0x0 */
        /*0070*/                   MUFU.EX2 R5, R5 ;        /* 0x0 */
        /*0080*/                   BRA.U UP1, 0x30 ;        /* 0x0 */
        /*0090*/                   LDL R2, [R1] ;           /* 0x0 */
        /*00a0*/                   FMUL R5, R5, R5 ;        /* 0x0 */
        /*00b0*/              @UP2 BRA 0xa0 ;               /* 0x0 */
        /*00c0*/               @P3 BRA 0xe0 ;               /* 0x0 */
        /*00d0*/               @P2 BRA 0x20 ;               /* 0x0 */
        /*00e0*/                   EXIT ;                   /* 0x0 */
        /*00f0*/                   BRA 0xf0;                /* 0x0 */
        /*0100*/                   NOP;                     /* 0x0 */
		..........
		Function : second
        /*0000*/                   EXIT ;                   /* 0x0 */
"""


def listing(*lines):
    """Instructions sixteen bytes apart; "@P0 BRA 0x0" has a predicate."""
    found = []
    for index, line in enumerate(lines):
        predicate, _, text = line[1:].partition(" ") if line.startswith("@") else ("", "", line)
        found.append(Instruction(16 * index, text, predicate))
    return found


def test_registers_stack_and_shared_memory():
    found = sass.parse_resources(USAGE, "sm_86")
    assert list(found) == ["first", "second"]
    assert [found["first"][name] for name in ("REG", "STACK", "SHARED")] == [40, 16, 3072]


@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
def test_the_kilobyte_that_the_driver_keeps_is_not_the_kernels(architecture):
    found = sass.parse_resources(USAGE, architecture)
    assert (found["first"]["SHARED"], found["second"]["SHARED"]) == (2048, 0)


def test_a_listing_ends_where_the_code_ends():
    found = sass.parse_listing(LISTING)
    assert [len(found["first"]), len(found["second"])] == [15, 1]
    assert sass.count_spills(found["first"]) == 2
    assert found["first"][3] == (0x30, "LDG.E.128 R4, [R2.64]", "!P0")


def test_loops_and_what_a_pass_of_them_does():
    outer, loading, waiting = sass.find_loops(sass.parse_listing(LISTING)["first"])
    assert [(loop.start, loop.end) for loop in (outer, loading, waiting)] == [(0x20, 0xD0), (0x30, 0x80), (0xA0, 0xB0)]
    assert (loading.instructions, loading.inner_branches, loading.inner_loops) == (6, 1, 0)
    # A pass may jump over the MUFU, and one of the outer loop over nothing else: the loops inside run at least once.
    assert (loading.fewest, outer.fewest) == (5, 11)
    assert (loading.loads, loading.copies, loading.loaded_bytes) == ({16: 1}, {4: 1}, 32 * 20)
    # "@!PT LDS" is issued and does nothing.
    assert (loading.transcendentals, loading.shared_accesses, loading.local_accesses) == (1, 0, 0)
    assert (outer.inner_loops, outer.local_accesses) == (2, 1)
    assert sass.main_loop([outer, loading, waiting]) == loading


def test_a_loop_that_waits_does_not_take_the_place_of_the_loop_around_it():
    loops = sass.find_loops(
        listing("LDG.E R2, [R4.64]", "NANOSLEEP 0x8", "@P0 BRA 0x10", "FADD R3, R3, R2", "@P1 BRA 0x0", "EXIT")
    )
    assert [(loop.start, loop.end) for loop in loops] == [(0, 0x40), (0x10, 0x20)]
    assert sass.main_loop(loops) == loops[0]
    assert loops[0].inner_loops == 1


@pytest.mark.parametrize("end", ["EXIT", "BRA 0x80", "RET.REL.NODEC R20 0x0"])
def test_code_behind_the_end_that_jumps_back_closes_no_loop(end):
    found = sass.find_loops(
        listing(
            "LDG.E R2, [R4.64]", "BRA.DIV UR4, 0x60", "FADD R3, R3, R2", "@P1 BRA 0x0", "STG.E [R4.64], R3", end,
            "WARPSYNC.COLLECTIVE R1, 0x70", "BRA 0x20", "EXIT",
        )
    )  # fmt: skip
    assert [(loop.start, loop.end) for loop in found] == [(0, 0x30)]


def test_two_branches_to_one_target_are_one_loop():
    (found,) = sass.find_loops(listing("LDG.E R2, [R4.64]", "@P0 BRA 0x0", "FADD R3, R3, R2", "@P1 BRA 0x0", "EXIT"))
    assert (found.start, found.end, found.inner_branches) == (0, 0x30, 1)


@pytest.mark.parametrize(
    ("mnemonic", "width"),
    [
        ("LDG.E.128", 16), ("LDG.E.EF.LTC128B.64", 8), ("LDG.E", 4), ("LDG.E.LTC128B", 4), ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.S8", 1), ("LDG.E.ENL2.256", 32), ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LD.E.U8", 1),
    ],
)  # fmt: skip
def test_width_of_a_load(mnemonic, width):
    assert sass.load_bytes(mnemonic) == width


@pytest.mark.parametrize(
    ("mnemonic", "kind", "macs"),
    [
        ("HMMA.16816.F32.BF16", "bf16", 16 * 8 * 16), ("HMMA.16816.F32", "bf16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "tf32", 16 * 8 * 8), ("HMMA.1688.F32", "bf16", 16 * 8 * 8),
        ("HMMA.16816.F16", "fp16 sums", 16 * 8 * 16), ("IMMA.16832.S8.S8.SAT", "int8", 16 * 8 * 32),
        ("IMMA.8816.S8.S8", "int8", 8 * 8 * 16), ("QMMA.16832.F32.E4M3.E4M3", "fp8", 16 * 8 * 32),
        ("DMMA.884", "fp64", 8 * 8 * 4), ("HGMMA.64x128x16.F32.BF16", "bf16", 64 * 128 * 16 // 4),
        ("HGMMA.64x256x8.F32.TF32", "tf32", 64 * 256 * 8 // 4), ("QGMMA.64x64x32.F32.E4M3.E4M3", "fp8", 64 * 64 * 32 // 4),
        ("IGMMA.64x8x32.S8.S8", "int8", 64 * 8 * 32 // 4),
    ],
)  # fmt: skip
def test_multiplications_of_a_tensor_core_instruction(mnemonic, kind, macs):
    assert sass.matrix_macs(mnemonic) == (kind, macs)


@pytest.mark.parametrize("mnemonic", ["OMMA.16864.F32", "HMMA.SP.16832.F32", "IMMA.16864.S4.S4", "UTCHMMA", "HMMA.F32"])
def test_an_unknown_tensor_core_instruction_is_no_zero(mnemonic):
    with pytest.raises(ValueError, match=mnemonic.split(".")[0]):
        sass.find_loops(listing(f"{mnemonic} R0, R4, R8, R0", "@P0 BRA 0x0", "EXIT"))


def test_moves_that_are_written_like_multiplications_are_none():
    (found,) = sass.find_loops(listing("HFMA2.MMA R0, -RZ, RZ, 0, 0", "@P0 BRA 0x0", "EXIT"))
    assert (found.macs, found.matrix_instructions) == ({}, 0)


def test_which_loop_is_the_main_one_can_be_said():
    text = []
    for body in (
        ["LDG.E.128 R2, [R4.64]", "HMMA.16816.F32 R4, R2, R3, R4"],
        ["LDG.E.128 R2, [R4.64]", "HMMA.16816.F32 R4, R2, R3, R4", "FADD R3, R3, R2"],
        ["LDGSTS.E.64 [R9], [R2.64]"],
        ["HMMA.16816.F32 R4, R2, R3, R4"] * 2,
        ["FADD R3, R3, R2"] * 9,
        ["HMMA.16816.F32 R4, R2, R3, R4"] * 2 + ["FADD R3, R3, R2"],
    ):
        text += [*body, f"@P0 BRA 0x{16 * len(text):x}"]
    loops = sass.find_loops(listing(*text, "EXIT"))
    chosen = {choice: loops.index(sass.main_loop(loops, choice)) for choice in sass.MAIN_LOOP}
    assert chosen == {"loads": 1, "fast path": 0, "copies": 2, "fast macs": 3, "macs": 5, "instructions": 4}
    assert sass.main_loop([]) is None


def test_an_unrolled_loop_is_known_by_the_loop_for_the_rest():
    main, rest, other, uneven = sass.find_loops(
        listing(
            *["LDG.E R2, [R4.64]", "LDG.E.U8 R3, [R5.64]"] * 4, "@P0 BRA 0x0",
            "LDG.E R2, [R4.64]", "LDG.E.U8 R3, [R5.64]", "@P0 BRA 0x90",
            "LDG.E R2, [R4.64]", "@P0 BRA 0xc0",
            "LDG.E R2, [R4.64]", "LDG.E R2, [R4.64]", "LDG.E.U8 R3, [R5.64]", "@P0 BRA 0xe0", "EXIT",
        )
    )  # fmt: skip
    assert sass.unrolling(main, [main, rest, other, uneven]) == 4
    assert sass.unrolling(rest, [main, rest, other, uneven]) == 1
    assert sass.unrolling(main, [main, other, uneven]) == 1


# Compiled kernels ----------------------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sass.cuobjdump() is None or triton_interprets(),
    reason="needs Triton, not interpreted, and cuobjdump",
)
everywhere = pytest.mark.parametrize("architecture", static.ARCHITECTURES)


def reading(kernel):
    (found,) = static.read(kernel)
    assert found.main_loop is not None
    return found


@compiles
@everywhere
@pytest.mark.parametrize("rows", [16, 64])
def test_multiplications_of_a_loop_are_those_of_its_source(architecture, rows):
    import static_kernels as kernels

    found = reading(kernels.multiplied(architecture, rows))
    loop = found.main_loop
    assert {kind: macs * kernels.WARPS for kind, macs in loop.macs.items()} == {
        "bf16": rows * kernels.KEYS * kernels.DIM
    }
    # 64 keys x 64 dims x 2 bytes by 128 threads
    assert (loop.copies, loop.loads, found.unrolled, found.loaded_share) == ({16: 4}, {}, 1, 1.0)
    # sm_90 multiplies 64 rows from shared memory, without a load.
    assert (loop.shared_accesses > 0) == ((architecture, rows) != ("sm_90", 64))
    assert found.shared_bytes == found.kernel.shared_bytes


@compiles
@everywhere
def test_fp32_is_multiplied_as_tf32(architecture):
    import static_kernels as kernels

    loop = reading(kernels.multiplied(architecture, 16, "fp32")).main_loop
    assert {kind: macs * kernels.WARPS for kind, macs in loop.macs.items()} == {"tf32": 16 * kernels.KEYS * kernels.DIM}


@compiles
@everywhere
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 16), ({"block": 256}, 8), ({"aligned": False}, 4),
        ({"dtype": "bf16", "aligned": False}, 2), ({"dtype": "i8", "aligned": False}, 1),
    ],
)  # fmt: skip
def test_widths_of_loads_are_those_of_the_source(architecture, options, width):
    import static_kernels as kernels

    found = reading(kernels.summed(architecture, **options))
    size = {"fp32": 4, "bf16": 2, "i8": 1}[options.get("dtype", "fp32")]
    loads = options.get("block", kernels.BLOCK) * size // (width * 32 * kernels.WARPS)
    assert found.main_loop.loads == {width: loads * found.unrolled}
    assert found.loaded_share == 1.0


@compiles
@everywhere
def test_a_loop_that_ptxas_unrolled_is_divided_by_its_passes(architecture):
    import static_kernels as kernels

    found = reading(kernels.summed(architecture))
    assert found.unrolled == 4
    longer, rest = sorted(found.loops, key=lambda loop: -loop.instructions)
    assert found.main_loop == longer
    # Not more than a loop of one pass costs, and not less than its loads and sums.
    assert 2 + 8 <= longer.instructions / 4 <= rest.instructions


@compiles
@everywhere
def test_a_branch_inside_the_main_loop_counts_with_both_sides(architecture):
    import static_kernels as kernels

    loop = reading(kernels.marked(architecture)).main_loop
    assert (loop.inner_branches, loop.inner_loops) == (1, 0)
    # Eight numbers a thread, eight times
    assert loop.transcendentals == 64
    assert loop.fewest < loop.instructions - 64
    assert loop.loads == {16: 2}


@compiles
@everywhere
def test_the_fast_path_beside_a_general_one(architecture):
    import static_kernels as kernels

    general = reading(kernels.with_two_paths(architecture, "loads")).main_loop
    fast = reading(kernels.with_two_paths(architecture, "fast path")).main_loop
    assert fast.copies == general.copies == {16: 4}
    assert fast.macs == general.macs
    assert (fast.transcendentals, general.transcendentals) == (0, 16 * kernels.KEYS // (32 * kernels.WARPS))
    assert fast.instructions < general.instructions


@compiles
def test_spills_are_counted_where_they_happen():
    import static_kernels as kernels

    assert reading(kernels.multiplied("sm_86", 64)).spill_instructions == 0
    found = reading(kernels.multiplied("sm_86", 64, maxnreg=64))
    assert found.spill_instructions > found.main_loop.local_accesses > 0
    assert found.stack_bytes > 0


@compiles
def test_damaged_machine_code_is_a_sentence():
    with pytest.raises(RuntimeError, match="cuobjdump"):
        static.read(static.CompiledKernel("damaged", "sm_86", b"no cubin at all"))
