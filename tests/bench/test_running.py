"""From cases to rows: what is validated is timed, what is not says why, and shares are what the rows make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_helpers import SMALL, kernel, row, spoiled

from gemma4_kernels.attention import eager
from gemma4_kernels.bench import baselines, machine, records, running
from gemma4_kernels.bench.cases import AttentionCase
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.bench.timing import Batch

CPU = torch.device("cpu")


class ConstantClock:
    """Each call runs, and takes a millisecond by this clock."""

    def batches(self, calls):
        return [Batch(call, 1, "script") for call in calls]

    def time(self, batch):
        batch.run()
        return 0.001


def settings(**changes):
    defaults = {
        "device": CPU,
        "backends": ("triton", "eager"),
        "rounds": 4,
        "slice_seconds": 1e-4,
        "ceiling_scale": 1 / 64,
    }
    return running.Settings(**{**defaults, **changes})


def run(cases, **changes):
    said = []
    rows = running.run(cases, settings(**changes), said.append, ConstantClock())
    return {found["by"]: found for found in rows}, said


def test_rows_follow_from_time_bytes_and_ceilings():
    rows, said = run([SMALL])
    assert set(rows) == {"triton", "eager", "sdpa", "transformers"}
    found = rows["eager"]
    assert (found["status"], found["rounds"], found["median_us"], found["timed_with"]) == ("held", 4, 1000.0, "script")
    assert found["bytes"] == SMALL.bytes_moved()
    assert found["gbs"] == pytest.approx(SMALL.bytes_moved() / 1e-3 / 1e9, rel=1e-3)
    shares = {"bytes": found["gbs"] / found["copy_gbs"], "operations": found["tflops"] / found["matmul_tflops"]}
    assert found["share"] == pytest.approx(max(shares.values()), rel=1e-3)
    assert found["bound"] == max(shares, key=shares.get)
    assert found["sheet_share"] is None
    assert said[0] == f"validating {SMALL}"
    assert said[-1].startswith("round 4 of 4")


def test_rows_fit_the_schema_of_a_record(tmp_path):
    rows = running.run([SMALL], settings(), lambda message: None, ConstantClock())
    before = machine.describe(CPU)
    record = running.make_record(rows, settings(), before, ["--only", "f(a=1)", "--device", "cpu"])
    records.save(record, tmp_path / "a.json")
    loaded = records.load(tmp_path / "a.json")
    assert loaded["command"] == "gemma4-kernels bench --only 'f(a=1)' --device cpu"
    assert loaded["rows"][0].keys() == row().keys()


def test_what_cannot_run_is_a_row_with_its_reason():
    rows, _ = run([SMALL])
    assert (rows["triton"]["status"], rows["triton"]["median_us"]) == ("skipped", None)
    assert rows["triton"]["reason"].startswith("runs on cuda, not on cpu")


def test_a_wrong_kernel_is_not_timed():
    with kernel("flash_attn", spoiled(lambda out, lse: out.mul_(1.5))):
        rows, _ = run([SMALL])
    assert (rows["triton"]["status"], rows["triton"]["median_us"]) == ("failed", None)
    assert rows["triton"]["reason"].startswith("out element")
    assert rows["triton"]["worst"] > 1
    assert rows["eager"]["median_us"] == 1000.0


def test_each_kernel_is_timed_on_its_own_backend():
    calls = []
    with kernel("flash_attn", lambda *arguments: calls.append(arguments[0].data_ptr()) or eager.flash_attn(*arguments)):
        rows, _ = run([SMALL], baselines=False)
    assert set(rows) == {"triton", "eager"}
    # Two to validate, then as many as were timed, over several copies of the inputs.
    assert len(calls) == 2 + rows["triton"]["calls"]
    assert len(set(calls[2:])) == min(rows["triton"]["copies"], rows["triton"]["calls"]) > 1


def test_a_kernel_that_runs_out_of_memory_among_its_copies_is_skipped_with_the_reason():
    calls = []

    def function(*arguments):
        calls.append(None)
        if len(calls) > 2:  # two to validate
            raise torch.OutOfMemoryError("no room")
        return eager.flash_attn(*arguments)

    with kernel("flash_attn", function):
        rows, _ = run([SMALL], baselines=False)
    assert (rows["triton"]["status"], rows["triton"]["median_us"]) == ("skipped", None)
    assert rows["triton"]["reason"] == "raised OutOfMemoryError while it was timed"
    assert rows["eager"]["median_us"] == 1000.0


def test_copies_that_do_not_exceed_the_cache_are_warm(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 40)
    rows, _ = run([SMALL], baselines=False)
    assert rows["eager"]["cold"] is False
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 10)
    rows, _ = run([SMALL], baselines=False)
    assert rows["eager"]["cold"] is True


def test_a_case_that_does_not_fit_is_skipped_everywhere(monkeypatch):
    monkeypatch.setattr(running, "too_large", lambda case, device: "needs more")
    rows, _ = run([SMALL])
    assert {found["reason"] for found in rows.values()} == {"needs more"}


def test_groups_keep_to_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(
        machine, "free_memory", lambda device: running.GROUP_MEMORY_SHARE * 5 * SMALL.input_bytes() // 2
    )
    assert [len(group) for group in running._groups([SMALL] * 5, settings())] == [2, 2, 1]


def test_a_path_in_the_command_keeps_its_last_part_only():
    record = running.make_record([], settings(), machine.describe(CPU), ["--save", "/home/alice/secret/a.json"])
    assert record["command"] == "gemma4-kernels bench --save a.json"


# Baselines --------------------------------------------------------------------------------------------------------------

CASES = [
    SMALL,
    replace(SMALL, sq=33),
    replace(SMALL, sq=33, left=7),
    replace(SMALL, sq=1, left=7),
    replace(SMALL, sq=4, left=7, right=2),
    replace(SMALL, d=320, hkv=1),
    replace(SMALL, d=320, hkv=2),
    AttentionCase("k_eq_v_attention", b=2, sq=3, sk=20, hq=4, hkv=1, d=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_baseline_computes_the_same(case, name):
    made = case.inputs()
    ready = case.baselines(made).get(name, "not a baseline of this call, or of this device")
    if isinstance(ready, str):
        pytest.skip(ready)
    expected, plain = case.reference(made)[0], case.plain(made)[0]
    assert (verdict := judge(ready(), expected, plain)).ok, verdict


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(SMALL, softcap=5.0), "softcap"),
        (replace(SMALL, blocks="3-9"), "image blocks"),
        (AttentionCase("k_eq_v_attention", hkv=1, lengths="5+9"), "different lengths"),
        (AttentionCase("k_eq_v_attention", hkv=1, lengths="5+5", page=4), "pages"),
        (AttentionCase("flash_attn_varlen_func", lengths="1:5", hq=4, hkv=2), "no counterpart"),
    ],
    ids=str,
)
def test_where_there_is_no_baseline_there_is_a_reason(case, reason):
    found = case.baselines(case.inputs())
    assert set(found) == set(baselines.NAMES)
    assert all(isinstance(value, str) and reason in value for value in found.values())


def test_a_mask_that_would_fill_the_memory_is_not_made(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_SCORES", 10)
    found = CASES[2].baselines(CASES[2].inputs())
    assert all(isinstance(value, str) and "would hold" in value for value in found.values())
