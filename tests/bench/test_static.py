"""What is predicted from compiled kernels, how they are collected, and how it is printed."""

from __future__ import annotations

import csv
import importlib.util
import io
import json

import pytest

from gemma4_kernels.bench import cards, sass, static, static_tables
from gemma4_kernels.environment import triton_interprets


def loop(instructions=100, copies=4, macs=None, start=0x100):
    """Copies of 16 bytes per lane."""
    return sass.Loop(
        start, start + 16 * instructions, instructions, instructions * 99 // 100, loads={}, copies={16: copies}, bulk_copies=0,
        macs=macs or {}, matrix_instructions=sum((macs or {}).values()) // 2048, shared_accesses=7, transcendentals=3,
        local_accesses=0, inner_branches=1, inner_loops=0,
    )  # fmt: skip


def reading(*loops, architecture="sm_86", **more):
    """Four warps that copy 8 KB a pass."""
    settings = {"shared_bytes": 2048, "warps": 4, "loop_bytes": 8192, **more}
    kernel = static.CompiledKernel("decode", architecture, b"", **settings)
    return static.Reading(kernel, "decode", 40, 16, 1024, 2, 300, loops or (loop(),))


def test_issue_time_on_a_3060():
    found = static.predict(reading(loop(1000)), cards.CARDS["rtx 3060"])
    # 4 warps x 1000 instructions for 64 times 128 bytes
    assert found.instructions == 62.5
    # 28 SMs issue 4 x 1.777 instructions a nanosecond each; 128 bytes take 128 / 360 ns.
    assert found.dram_ns == pytest.approx(0.3556, rel=1e-3)
    assert found.budget == pytest.approx(70.8, rel=1e-3)
    assert found.issue_ns == pytest.approx(62.5 / (28 * 4 * 1.777))
    assert found.tensor_ns == 0
    assert found.binding == ("memory", found.dram_ns)


def test_issue_slots_bind_beyond_the_budget():
    found = static.predict(reading(loop(2000), architecture="sm_89"), cards.CARDS["rtx 4060"])
    # 24 SMs, 2.46 GHz, 272 GB/s
    assert found.budget == pytest.approx(24 * 4 * 2.46 * 128 / 272)
    assert found.binding == ("issue slots", found.issue_ns)
    assert found.issue_ns / found.dram_ns == pytest.approx(125 / found.budget)


def test_what_binds_may_depend_on_the_branches_that_a_pass_takes():
    branchy = loop(2000)._replace(fewest=1000)
    found = static.predict(reading(branchy), cards.CARDS["rtx 3060"])
    assert found.fewest_instructions == 62.5
    assert found.fewest_issue_ns == pytest.approx(found.issue_ns / 2)
    assert (found.fewest_binding[0], found.binding[0]) == ("memory", "issue slots")
    row = cells(static_tables.render(static.Collection([("attention", reading(branchy))], [], [])), "decode", 1)
    assert (row["binds"], row["x DRAM"]) == ("memory to issue slots", "1.00 to 1.77")


def test_tensor_time_is_that_of_the_printed_rate():
    card = cards.CARDS["rtx 3060"]
    found = static.predict(reading(loop(macs={"bf16": 1 << 20}), loop_macs=1 << 20), card)
    # 4 warps x 2^20 multiplications of two operations for 8 KB
    assert found.tensor_ns == pytest.approx(2 * (4 << 20) / 64 / (card.rate * 1e3), rel=1e-2)
    assert found.binding == ("tensor cores", found.tensor_ns)
    assert found.useful_share == 0.25


def test_kinds_of_multiplications_have_their_own_rates():
    def ns(name, **macs):
        card = cards.CARDS[name]
        return static.predict(reading(loop(macs=macs), architecture=card.architecture), card).tensor_ns

    assert ns("rtx 4060", bf16=4096, tf32=2048) == pytest.approx(2 * ns("rtx 4060", bf16=4096))
    assert ns("rtx 4060", int8=4096) == pytest.approx(ns("rtx 4060", bf16=4096) / 4)
    assert ns("h100 80gb hbm3", int8=4096) == pytest.approx(ns("h100 80gb hbm3", bf16=4096) / 2)
    # An A100 has no fp8, and a 3060 no figure for fp64.
    assert ns("a100-sxm4-80gb", fp8=4096) is None
    assert ns("rtx 3060", fp64=4096, bf16=4096) is None


def test_an_unrolled_loop_costs_what_one_of_its_passes_costs():
    single, unrolled = loop(100, 4), loop(400, 16, start=0x2000)
    card = cards.CARDS["rtx 3060"]
    found = reading(unrolled, single)
    assert (found.main_loop, found.unrolled, found.loaded_share) == (unrolled, 4, 1.0)
    assert static.predict(found, card) == static.predict(reading(single), card)
    # The code alone does not say it: here a pass of the source takes in all that the long loop loads.
    found = reading(unrolled, single, loop_bytes=4 * 8192)
    assert (found.unrolled, found.loaded_share) == (1, 1.0)


def test_loads_beyond_the_bytes_of_a_pass_show():
    assert reading(loop(copies=8)).loaded_share == 2.0
    assert reading(loop()._replace(bulk_copies=1)).loaded_share is None


@pytest.mark.parametrize(
    ("kernel", "name"),
    [({"loop_bytes": None}, "rtx 3060"), ({"warps": None}, "rtx 3060"), ({}, "rtx 4060"), ({}, "apple m1")],
)
def test_no_prediction_without_its_figures(kernel, name):
    assert static.predict(reading(**kernel), cards.CARDS[name]) is None


def test_a_wrong_choice_of_the_main_loop_is_refused():
    with pytest.raises(ValueError, match=r"decode: main_loop is 'most', expected one of loads, fast path"):
        reading(main_loop="most")


def test_cards_for_predictions_are_complete_and_their_rates_are_the_product():
    names = cards.predictable()
    assert tuple(names[:2]) == ("rtx 3060", "rtx 4060")
    assert len(set(names)) == len(names) >= 16
    assert {cards.CARDS[name].architecture for name in cards.REPRESENTATIVES} == set(static.ARCHITECTURES)
    for name in names:
        card = cards.CARDS[name]
        assert card.rate == pytest.approx(2e-3 * card.sms * card.clock * card.tensor["bf16"], rel=0.01), name


# Tables --------------------------------------------------------------------------------------------------------------


def cells(text, name, number):
    """The cells of the `number`th table's row for kernel `name`, by heading."""
    tables = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    head, _, *body = tables[number]
    (row,) = [row for row in body if row[1] == name]
    return dict(zip(head, row, strict=True))


def test_a_row_of_code_and_a_row_of_what_follows():
    found = static.Collection([("attention", reading(loop(1000, macs={"bf16": 8192}), loop_macs=8192))], [], [])
    text = static_tables.render(found)
    assert text.startswith("Derived from machine code and data sheets; nothing was measured.")
    assert cells(text, "decode", 0) == {
        "family": "attention", "kernel": "decode", "arch": "sm_86", "registers": "40", "stack": "16", "shared": "3072",
        "spills": "2", "instr.": "300", "main loop": "990 to 1000", "unrolled": "1", "branches": "1", "loops": "0",
        "loads per warp": "4 x 16 B async", "loaded / pass": "1.00", "MMA": "4", "LDS, STS": "7", "MUFU": "3",
    }  # fmt: skip
    assert cells(text, "decode", 1) == {
        "family": "attention", "kernel": "decode", "card": "rtx 3060", "instr. per 128 B": "61.9 to 62.5",
        "card can issue": "70.8", "issue ns": "0.3109 to 0.3140", "tensor ns": "0.0402", "DRAM ns": "0.3556", "binds": "memory",
        "x DRAM": "1.00", "useful MACs": "25 %",
    }  # fmt: skip


def test_other_forms_carry_the_same_numbers():
    found = static.Collection([("attention", reading(loop(2000))), ("linear", reading(warps=None))], [], [])
    on_card, without = json.loads(static_tables.render(found, "json"))
    assert on_card["instructions_per_128"] == 125.0
    assert on_card["over_dram"] == pytest.approx(on_card["issue_ns"] / on_card["dram_ns"])
    assert (on_card["card"], on_card["binding"]) == ("rtx 3060", "issue slots")
    assert (without["card"], without["loaded_bytes"], without["loop_instructions"]) == (None, None, 100)
    sheet = list(csv.DictReader(io.StringIO(static_tables.render(found, "csv"))))
    assert [row["kernel"] for row in sheet] == ["decode", "decode"]
    assert float(sheet[0]["issue_ns"]) == on_card["issue_ns"]
    assert list(sheet[0]) == list(on_card) == list(static_tables.COLUMNS)


def test_each_card_of_the_architecture_has_a_row():
    found = static.Collection([("attention", reading())], [], [])
    rows = static_tables.rows(found, cards.predictable())
    assert [row["card"] for row in rows] == ["rtx 3060", "rtx 3060 laptop gpu", "rtx 3090"]


def test_cards_of_a_kernel_stand_together_in_the_order_asked_for():
    readings = [("attention", reading(architecture=architecture)) for architecture in ("sm_80", "sm_86", "sm_90")]
    text = static_tables.render(static.Collection(readings, [], []))
    found = [line.split("|")[3].strip() for line in text.split("Predicted")[1].splitlines() if "decode" in line]
    assert found == ["rtx 3060", "a100-sxm4-80gb", "h100 80gb hbm3"]


def test_widths_are_said_from_wide_to_narrow():
    found = static_tables.widths(loop()._replace(loads={2: 3, 8: 1}, copies={4: 2, 16: 48}))
    assert found == "48 x 16 B async, 2 x 4 B async, 1 x 8 B, 3 x 2 B"
    assert static_tables.widths(loop()._replace(copies={}, bulk_copies=2)) == "2 x bulk"
    assert static_tables.widths(loop()._replace(copies={})) == "none"


def test_a_version_without_compiled_kernels_says_so(monkeypatch):
    monkeypatch.setattr(static, "_providers", {})
    text = static_tables.render(static.collect())
    assert "0 compiled kernels." in text
    assert "No family of this version has compiled kernels" in text


# Compiled kernels ----------------------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sass.cuobjdump() is None or triton_interprets(),
    reason="needs Triton, not interpreted, and cuobjdump",
)


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setattr(static, "_providers", {})
    return static.register


@compiles
def test_kernels_are_compiled_and_read_without_a_gpu(provider):
    provider("tests", "static_kernels:provide")
    found = static.collect(["sm_86", "sm_89"])
    assert (found.failures, found.remarks) == ([], [])
    assert [(family, each.kernel.name, each.kernel.architecture) for family, each in found.readings] == [
        ("tests", "summed_rows", "sm_86"), ("tests", "products 16", "sm_86"),
        ("tests", "summed_rows", "sm_89"), ("tests", "products 16", "sm_89"),
    ]  # fmt: skip
    assert all(8 <= each.registers <= 64 and each.spill_instructions == 0 for _, each in found.readings)
    text = static_tables.render(found)
    assert "4 compiled kernels." in text
    predicted = [line.split("|")[2:4] for line in text.splitlines() if "rtx" in line]
    assert [(kernel.strip(), card.strip()) for kernel, card in predicted] == [
        ("summed_rows", "rtx 3060"), ("summed_rows", "rtx 4060"), ("products 16", "rtx 3060"), ("products 16", "rtx 4060"),
    ]  # fmt: skip


@compiles
def test_only_the_kernels_asked_for_are_compiled(provider, monkeypatch):
    import static_kernels

    provider("tests", "static_kernels:provide_one_bad")
    found = static.collect(["sm_86"], ["16"])
    assert found.failures == []
    assert [each.kernel.name for _, each in found.readings] == ["products 16"]
    monkeypatch.setattr(static_kernels, "multiplied", None)
    assert static.collect(["sm_86"], ["nothing"]) == static.Collection([], [], [])


@compiles
def test_a_kernel_that_cannot_be_compiled_hides_no_other(provider):
    provider("tests", "static_kernels:provide_one_bad")
    provider("broken", "static_kernels:provide_nothing_good")
    provider("absent", "no_such_module:provide")
    found = static.collect(["sm_86"])
    assert [each.kernel.name for _, each in found.readings] == ["products 16"]
    assert found.failures[0] == "tests, bad for sm_86: RuntimeError: the compiler is on strike"
    assert found.failures[1] == "broken for sm_86: RuntimeError: the compiler is on strike"
    assert found.failures[2].startswith("absent for sm_86: ModuleNotFoundError")
    assert "FAILED broken for sm_86" in static_tables.render(found)


@compiles
def test_what_ptxas_refuses_is_said_in_its_words_and_not_on_stdout(provider, capsys):
    provider("tests", "static_kernels:provide_too_few_registers")
    found = static.collect(["sm_86"])
    (failure,) = found.failures
    assert failure.startswith("tests, products for sm_86: PTXASError: ")
    assert "Insufficient registers (24)" in failure
    assert capsys.readouterr().out == ""


@compiles
def test_machine_code_that_cannot_be_read_hides_no_other(provider):
    provider("tests", "static_kernels:provide_damaged")
    found = static.collect(["sm_86"])
    assert [each.kernel.name for _, each in found.readings] == ["products 16"]
    (failure,) = found.failures
    assert failure.startswith("tests, damaged for sm_86: RuntimeError: cuobjdump failed")


def test_without_cuobjdump_it_says_so(provider, monkeypatch):
    provider("tests", "static_kernels:provide")
    monkeypatch.setattr(sass, "cuobjdump", lambda: None)
    assert static.collect(["sm_86"]).failures == [
        "cuobjdump is missing: it comes with the CUDA toolkit and with Triton."
    ]
