"""The compiled CUDA kernels in `bench --static`, and what is predicted of the 12B's layers on them."""

from __future__ import annotations

import subprocess
from itertools import product

import pytest

from gemma4_kernels.bench import cards, cuda_kernels, cuda_layers, occupancy, sass, static, static_tables
from gemma4_kernels.cli.main import main
from gemma4_kernels.linear import cuda_table

# One multiprocessor row of figures that are easy to do by hand: 100 bytes and 2 clocks a ns, 10 multiprocessors.
CARD = cards.Card(100.0, None, "of nobody", 0.0, "sm_86", 10, 2.0, {"bf16": 256})
DECODE = (
    "_ZN6gemma46linear13decode_kernelINS_3ptx4Bf16ENS0_11PlainScalesINS0_9Fp16ScaleELNS0_6ValuesE0ELi1EEELS6_0ELi4ELi2EEEv"
    "NS0_10ParametersE"
)
UNKNOWN = "_ZN6gemma49attention12_GLOBAL__N_112split_kernelINS_3ptx4Bf16ELi512EEEvNS0_10ParametersE"


# Occupancy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        ("sm_86", 255, 0, 4, 2),  # 65536 / (256 x 128)
        ("sm_86", 168, 0, 4, 3),  # 65536 / 21504
        ("sm_86", 129, 0, 4, 3),  # given out by eights: 136
        ("sm_86", 32, 43008, 4, 2),  # 102400 / (43008 + 1024)
        ("sm_86", 32, 50177, 1, 1),  # 50304 + 1024 twice is more than 102400
        ("sm_86", 32, 0, 8, 6),  # 48 warps
        ("sm_86", 16, 0, 1, 16),
        ("sm_89", 16, 0, 1, 24),
        ("sm_80", 120, 43008, 4, 3),
        ("sm_90", 120, 43008, 4, 4),
    ],
)  # fmt: skip
def test_resident_blocks(architecture, registers, shared, warps, blocks):
    assert occupancy.resident_blocks(architecture, registers, shared, warps) == blocks


def kernel(**changes) -> occupancy.Kernel:
    """25 blocks of 1000 bytes, of which each has 60 under way: a wave of ten, two and a half of them."""
    settings = {
        "blocks": 25, "resident": 1, "dram_bytes": 25000.0, "longest_bytes": 1000.0, "in_flight": 60.0,
        "instructions": 80.0, "macs": {"bf16": 5120.0},
    }  # fmt: skip
    return occupancy.Kernel(**(settings | changes))


def test_a_wave_takes_what_takes_longest():
    # 10 x 1000 bytes at 100 a ns; 1000 bytes, 60 of them every 3 ns; 80 instructions of a block whose warps issue every second
    # clock, by 4 schedulers at 2 GHz; 5120 multiplications, 256 a clock.
    assert occupancy.wave(CARD, kernel(), 10, latency=3.0) == pytest.approx((100.0, 50.0, 20.0, 10.0))
    # Eleven blocks are two on one multiprocessor, which warps of both keep busy.
    assert occupancy.wave(CARD, kernel(), 11, latency=3.0) == pytest.approx((110.0, 50.0, 20.0, 20.0))
    assert occupancy.wave(CARD, kernel(), 31, latency=3.0) == pytest.approx((310.0, 50.0, 40.0, 40.0))


def test_a_tail_lasts_as_long_as_its_longest_block():
    # Two waves of 100 ns and one of five blocks, 50 ns by memory, 50 by latency; once the latency.
    assert occupancy.kernel_ns(CARD, kernel(), latency=3.0) == pytest.approx(3 + 100 + 100 + 50)
    assert occupancy.kernel_ns(CARD, kernel(in_flight=30.0), latency=3.0) == pytest.approx(3 + 100 + 100 + 100)
    assert occupancy.kernel_ns(CARD, kernel(in_flight=15.0), latency=3.0) == pytest.approx(3 + 200 + 200 + 200)
    assert occupancy.kernel_ns(CARD, kernel(resident=3), latency=3.0) == pytest.approx(3 + 250)


def test_little_asks_for_bandwidth_times_latency():
    # 360 GB/s x 600 ns are 216 KB on the way, of 28 multiprocessors
    assert occupancy.wanted_in_flight(cards.CARDS["rtx 3060"]) == pytest.approx(216000 / 28)


# The 12B's layers ---------------------------------------------------------------------------------------------------

CONSUMER = ("rtx 3060", "rtx 4060", "rtx 4070", "rtx 5080")


def test_shared_memory_is_what_the_documentation_says():
    def ring(values: str, bits: int) -> list[tuple[int, int]]:
        stages = [cuda_kernels.Stage(values, bits, tiles) for tiles in (1, 2)]
        return [(stage.ring_stages, stage.shared_bytes) for stage in stages]

    assert ring("centred", 4) == ring("table", 4) == [(3, 43008), (2, 36864)]
    assert ring("zeros", 4) == [(3, 49152), (2, 40960)]
    assert ring("offsets", 4) == [(3, 49408), (2, 41472)]
    assert ring("centred", 5) == [(3, 49152), (2, 40960)]
    assert ring("offsets", 5) == [(2, 37120), (2, 45568)]
    assert ring("centred", 6) == [(2, 40960), (2, 49152)]
    assert ring("centred", 8) == [(4, 45056), (3, 39936)]


def test_shapes_are_those_of_the_12b():
    assert set(cuda_layers.layers().values()) == {
        (4096, 3840), (8192, 3840), (2048, 3840), (512, 3840), (3840, 4096), (3840, 8192), (15360, 3840), (3840, 15360),
        (8704, 3840), (2 * 15360, 3840), (262144, 3840),
    }  # fmt: skip


def test_the_gate_on_a_3060_by_hand():
    found = cuda_layers.predict(cards.CARDS["rtx 3060"], 1, 15360, 3840)
    assert (found.pieces, found.blocks, found.resident, found.waves) == (1, 240, 2, pytest.approx(240 / 56))
    assert found.in_flight == 2 * 2 * 8192
    # 4 waves and 16 blocks; each takes 64 x 3840 weights of 4.5 bits, and no wave of them waits for anything else.
    bytes_of_block = 64 * 3840 * 4.5 / 8
    assert found.ns == pytest.approx(600 + 240 * bytes_of_block / 360)
    assert found.dram_share == pytest.approx(1 - 600 / found.ns)
    # At 16 rows the tail waits for latency: 15 stages, one of them under way at a time.
    late = cuda_layers.predict(cards.CARDS["rtx 3060"], 16, 15360, 3840)
    assert late.ns == pytest.approx(600 + 4 * 56 * bytes_of_block / 360 + 15 * 600)


def test_pieces_cost_a_kernel_and_their_bytes():
    card = cards.CARDS["rtx 4060"]
    found = cuda_layers.predict(card, 8, 512, 3840, pieces=4)
    # 32 blocks at once, of 4 stages of 8 KB, two under way; 4 x 8 x 512 numbers written and read
    memory, latency = 512 * 3840 * 4.5 / 8 / 272, 4 / 2 * 600
    assert found.ns == pytest.approx(600 + max(memory, latency) + 1500 + 4 * 8 * 512 * 8 / 272)
    # 15 stages in six pieces are five of three.
    assert cuda_layers.predict(card, 8, 512, 3840, pieces=6) == cuda_layers.predict(card, 8, 512, 3840, pieces=5)


@pytest.mark.parametrize("name", CONSUMER[:2])
def test_small_layers_fill_the_card(name):
    card = cards.CARDS[name]
    for m, n in product(cuda_layers.ROWS, (512, 2048)):
        found = cuda_layers.predict(card, m, n, 3840)
        assert found.blocks >= card.sms
        assert found.resident >= 2
        assert found.in_flight >= found.wanted


@pytest.mark.parametrize("name", CONSUMER[:2])
def test_no_layer_falls_under_its_share_of_the_memory(name):
    """Up to 8 rows 83 %, up to 16 rows 65 %. The keys of a full layer, 1.1 MB, are read in the time of a second kernel."""
    for (n, k), m in product(cuda_layers.layers().values(), cuda_layers.ROWS):
        least = 0.40 if n == 512 else 0.83 if m <= 8 else 0.65
        assert cuda_layers.predict(cards.CARDS[name], m, n, k).dram_share >= least, (n, k, m)


def test_every_row_of_pieces_saves_time_wherever_it_fits():
    for row in cuda_table.PIECES:
        gains = [
            cuda_layers.gain(card, n, k, row.pieces)
            for card, (n, k) in product(map(cards.CARDS.get, cards.predictable()), cuda_layers.layers().values())
            if row.fits(n, k, card.sms, card.architecture)
            and cuda_table.pieces(n, k, card.sms, card.architecture) == row.pieces
        ]
        assert max(each.mean for each in gains) >= 0.05, row
        assert min(each.mean for each in gains) > 0, row
        assert min(each.worst for each in gains) >= 0, row


def test_rows_of_pieces_hold_for_more_bits():
    """They are made for 4. Of 8 bits the rule makes 8 pieces where there are 8 tiles, and 15 are worse than that by 3.5 %."""
    for card, (n, k) in product(map(cards.CARDS.get, cards.predictable()), cuda_layers.layers().values()):
        if pieces := cuda_table.pieces(n, k, card.sms, card.architecture):
            assert cuda_layers.gain(card, n, k, pieces, "Q6_K").worst >= 0, (card.sms, n, k)
            of_8_bits = cuda_layers.gain(card, n, k, pieces, "Q8_0")
            assert of_8_bits.worst >= 0 or (n == 512 and of_8_bits.mean > -0.036), (card.sms, n, k, of_8_bits)


@pytest.mark.parametrize("name", [*CONSUMER, "h100 80gb hbm3"])
def test_no_other_cut_saves_five_percent(name):
    card = cards.CARDS[name]
    for n, k in cuda_layers.layers().values():
        in_table = cuda_table.pieces(n, k, card.sms, card.architecture) or cuda_table.halved(n, k, card.sms)
        now = cuda_layers.gain(card, n, k, in_table).mean
        for each in cuda_layers.gains(card, n, k):
            assert each.mean - now < 0.05 or each.worst < 0, (n, k, each)


# The provider -------------------------------------------------------------------------------------------------------


def test_a_function_is_described_by_its_name():
    found = cuda_kernels.facts(DECODE)
    assert found == cuda_kernels.Facts(
        "linear centred (Q4_0, W4A16), Fp16 scales, Bf16 x, up to 16 rows",
        4,
        36864,
        2 * 8192,
        2 * 64 * 256 * 16,
        "copies",
    )
    plain = "11PlainScalesINS0_9Fp16ScaleELNS0_6ValuesE0ELi1EEELS6_0ELi4ELi2E"
    six_bit = DECODE.replace(plain, "12SixBitScalesELNS0_6ValuesE2ELi4ELi1E")
    found = cuda_kernels.facts(six_bit)
    assert (found.name, found.shared_bytes) == ("linear offsets (Q4_K), SixBit scales, Bf16 x, up to 8 rows", 49408)
    nested = cuda_kernels.facts(DECODE.replace(plain, "12NestedScalesELNS0_6ValuesE3ELi4ELi1E"))
    assert nested.name == "linear table (NF4_NESTED, FP4_NESTED), Nested scales, Bf16 x, up to 8 rows"
    q6 = cuda_kernels.facts(DECODE.replace(plain, "10Int8ScalesILi8EEELNS0_6ValuesE0ELi6ELi2E"))
    assert q6.name == "linear centred (Q6_K), Int8 scales, Bf16 x, up to 16 rows"
    assert (q6.shared_bytes, q6.loop_bytes, q6.loop_macs) == (49152, 2 * 64 * 192, 2 * 64 * 256 * 16)
    q8 = cuda_kernels.facts(DECODE.replace("ELi1EEELS6_0ELi4ELi2E", "ELi2EEELS6_0ELi8ELi2E"))
    assert q8.name == "linear centred (Q8_0), Fp16 scales, Bf16 x, up to 16 rows"
    assert (q8.shared_bytes, q8.loop_bytes, q8.loop_macs) == (39936, 3 * 64 * 128, 3 * 64 * 128 * 16)


def test_kernels_of_attention_are_described():
    flash = cuda_kernels.facts(
        "_ZN6gemma49attention19flash_decode_kernelINS_3ptx4Bf16ELi256ELi4EEEvNS0_15FlashParametersEi"
    )
    # Four tiles of 16 rows against 16 keys of 256 columns: scores, and weights times values
    assert flash == cuda_kernels.Facts(
        "attention flash_decode, head_dim 256, Bf16, up to 64 packed rows", 4, 3 * 8192 + 64 * 512 + 2 * 64 * 64, 16384,
        2 * 64 * 16 * 256, "copies",
    )  # fmt: skip
    k_eq_v = (
        "_ZN6gemma49attention6k_eq_v13k_eq_v_kernelINS1_10PlainCacheINS_3ptx4Bf16ELi512EEELi512EEEvNS1_10ParametersE"
    )
    plain = cuda_kernels.facts(k_eq_v)
    assert plain.name == "attention k_eq_v, head_dim 512, Bf16, values in Bf16, up to 32 packed rows"
    assert (plain.warps, plain.loop_bytes, plain.loop_macs) == (8, 32 * 1024, 2 * 32 * 32 * 512)
    coded = cuda_kernels.facts(
        k_eq_v.replace("PlainCacheINS_3ptx4Bf16ELi512E", "CodedCacheINS_3ptx4Bf16ENS1_6Float8ELi512E")
    )
    assert coded.name == "attention k_eq_v, head_dim 512, Bf16, values in Float8, up to 32 packed rows"
    assert coded.loop_bytes == 32 * 512


def test_other_kernels_have_a_name_and_warps():
    hidden = "12_GLOBAL__N_1"
    found = {
        f"_ZN6gemma46linear{hidden}17add_pieces_kernelINS_3ptx4Bf16EEEvNS0_10ParametersEi": ("linear sum of pieces, Bf16", 4),
        f"_ZN6gemma46linear{hidden}23argmax_of_blocks_kernelENS0_10ParametersEi": ("linear argmax of blocks", 8),
        f"_ZN6gemma46linear{hidden}16embedding_kernelINS_3ptx4Bf16EEEv26gemma4_embedding_argumentsb": (
            "linear rows by token id, Bf16",
            4,
        ),
        f"_ZN6gemma48prologue{hidden}15prologue_kernelINS_4Fp32ELi32EEEvNS1_10ParametersE": ("attention prologue, Fp32, 32", 4),
        f"_ZN6gemma45norms{hidden}20sandwich_norm_kernelINS_3ptx4Fp16ELi2EEEvNS1_10ParametersE": (
            "sandwich norm, Fp16, 2",
            None,
        ),
        f"_ZN6gemma412verification{hidden}12tiles_kernelINS0_10Bf16LogitsEEEvNS0_10ParametersE": (
            "verification tiles, Bf16",
            4,
        ),
    }  # fmt: skip
    for function, said in found.items():
        assert cuda_kernels.facts(function)[:2] == said


def test_a_function_that_nobody_described_has_a_name():
    assert cuda_kernels.facts(UNKNOWN) == cuda_kernels.Facts(
        "attention split_kernel <NS_3ptx4Bf16ELi512EEEvNS0_10ParametersE>"
    )
    assert cuda_kernels.facts("_ZN6gemma46linear11sum_of_rowsEv").name == "linear sum_of_rows"
    assert cuda_kernels.facts("plain_c").name == "plain_c"


@pytest.fixture
def machine_code(monkeypatch):
    """Two functions that nothing has compiled, in one cubin of sm_86."""
    cubin = b"\0.text." + DECODE.encode() + b"\0.text." + UNKNOWN.encode() + b"\0"
    loop = sass.Loop(
        0x100, 0x2000, 400, 400, loads={}, copies={16: 16}, bulk_copies=0, macs={"bf16": 131072}, matrix_instructions=64,
        shared_accesses=0, transcendentals=0, local_accesses=0, inner_branches=0, inner_loops=0,
    )  # fmt: skip
    monkeypatch.setattr(sass, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(cuda_kernels, "machine_code", lambda architecture: [cubin] if architecture == "sm_86" else [])
    monkeypatch.setattr(
        static, "read", lambda kernel: [static.Reading(kernel, kernel.function, 100, 0, 0, 0, 500, (loop,))]
    )
    monkeypatch.setattr(static, "_providers", {"cuda": static._providers["cuda"]})


def test_every_function_of_the_module_is_listed(machine_code):
    found = static.collect(["sm_86", "sm_90"])
    assert found.failures == []
    assert found.remarks == ["gemma4_kernels._C has no machine code for sm_90"]
    assert [(reading.function, reading.kernel.warps) for _, reading in found.readings] == [(DECODE, 4), (UNKNOWN, None)]
    text = static_tables.render(found)
    assert "attention split_kernel" in text
    assert "2 compiled kernels." in text
    # 400 instructions of 4 warps for 16 KB of codes
    prediction = static.predict(found.readings[0][1], cards.CARDS["rtx 3060"])
    assert prediction.instructions == pytest.approx(12.5)


def test_layers_are_printed_as_predictions_of_the_code_that_was_read(machine_code, monkeypatch):
    q6 = DECODE.replace(
        "11PlainScalesINS0_9Fp16ScaleELNS0_6ValuesE0ELi1EEELS6_0ELi4", "10Int8ScalesILi8EEELNS0_6ValuesE0ELi6"
    )
    q8 = DECODE.replace("ELi1EEELS6_0ELi4", "ELi2EEELS6_0ELi8")
    both = [each.replace("Li2EEEv", f"Li{tiles}EEEv") for each in (DECODE, q6, q8) for tiles in (2, 1)]
    cubin = b"".join(b"\0.text." + name.encode() for name in both) + b"\0"
    monkeypatch.setattr(cuda_kernels, "machine_code", lambda architecture: [cubin])
    found = static.collect(["sm_86"])
    lines = cuda_layers.summary([reading for _, reading in found.readings], cards.REPRESENTATIVES)
    assert "Predicted, not measured" in lines[1]
    assert "Assumed: 600 ns" in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| rtx")]
    assert len(rows) == (11 + 2) * 3
    assert {row[0] for row in rows} == {"rtx 3060"}
    assert [row[3] for row in rows if row[1] == "head"] == [each for each in ("Q4_0", "Q6_K", "Q8_0") for _ in range(3)]
    (gate,) = (row for row in rows if row[2:5] == ["15360 x 3840", "Q4_0", "1"])
    assert gate[5:13] == ["1", "240", "4.29", "2", "32.0", "7.5", "92.8", "99 %"]
    assert "\n".join(lines) in static_tables.render(found)
    assert cuda_layers.summary([found.readings[0][1]], cards.REPRESENTATIVES) == []


def test_a_module_that_is_not_there_is_a_remark(monkeypatch, capsys):
    monkeypatch.setattr(cuda_kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(sass, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(static, "_providers", {"cuda": static._providers["cuda"]})
    assert main(["bench", "--static"]) == 0
    text = capsys.readouterr().out
    assert "0 compiled kernels." in text
    assert text.count("gemma4_kernels._C is not built, so no compiled CUDA kernel is read") == 1
    assert "FAILED" not in text


def test_a_module_that_cannot_be_read_is_a_failure(monkeypatch):
    monkeypatch.setattr(sass, "cuobjdump", lambda: "false")
    monkeypatch.setattr(cuda_kernels, "module", lambda: "_C.so")
    monkeypatch.setattr(static, "_providers", {"cuda": static._providers["cuda"]})
    (failure,) = static.collect(["sm_86"]).failures
    assert failure.startswith(f"cuda for sm_86: {subprocess.CalledProcessError.__name__}")
