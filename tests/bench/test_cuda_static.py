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
    "_ZN6gemma46linear13decode_kernelINS_3ptx4Bf16ENS0_11PlainScalesINS0_9Fp16ScaleELNS0_6ValuesE0EEELS6_0ELi2EEEv"
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
    found = {
        (values, rows): cuda_layers.shared_bytes(values, rows) for values in cuda_kernels.VALUES for rows in (8, 16)
    }
    assert (found["centred", 8], found["zeros", 8], found["offsets", 8]) == (43008, 49152, 49408)
    assert (found["centred", 16], found["zeros", 16], found["offsets", 16]) == (36864, 40960, 41472)
    assert (found["table", 8], found["table", 16]) == (43008, 36864)


def test_shapes_are_those_of_the_12b():
    assert set(cuda_layers.layers().values()) == {
        (4096, 3840), (8192, 3840), (2048, 3840), (512, 3840), (3840, 4096), (3840, 8192), (15360, 3840), (3840, 15360),
        (8704, 3840), (262144, 3840),
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
    six_bit = DECODE.replace(
        "11PlainScalesINS0_9Fp16ScaleELNS0_6ValuesE0EEELS6_0ELi2E", "12SixBitScalesELNS0_6ValuesE2ELi1E"
    )
    found = cuda_kernels.facts(six_bit)
    assert (found.name, found.shared_bytes) == ("linear offsets (Q4_K), SixBit scales, Bf16 x, up to 8 rows", 49408)


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
    eight = DECODE.replace("Li2EEEv", "Li1EEEv")
    cubin = b"".join(b"\0.text." + name.encode() for name in (DECODE, eight)) + b"\0"
    monkeypatch.setattr(cuda_kernels, "machine_code", lambda architecture: [cubin])
    found = static.collect(["sm_86"])
    lines = cuda_layers.summary([reading for _, reading in found.readings], cards.REPRESENTATIVES)
    assert "Predicted, not measured" in lines[1]
    assert "Assumed: 600 ns" in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| rtx")]
    assert len(rows) == 10 * 3
    assert {row[0] for row in rows} == {"rtx 3060"}
    (gate,) = (row for row in rows if row[2:4] == ["15360 x 3840", "1"])
    assert gate[4:12] == ["1", "240", "4.29", "2", "32.0", "7.5", "92.8", "99 %"]
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
