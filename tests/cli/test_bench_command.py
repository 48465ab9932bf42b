"""`gemma4-kernels bench`: tables, records, comparisons, and what it refuses. No test here looks at a time."""

from __future__ import annotations

import json
import sys
import types

import pytest
from bench_helpers import SMALL, kernel, record, row, spoiled

from gemma4_kernels.bench import ceilings, records

BENCH = f'gemma4-kernels bench --only "{SMALL}" --device cpu --rounds 1'


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 64)


def test_a_table_on_stdout_and_progress_on_stderr(command):
    answer = command(BENCH)
    assert answer.status == 0
    assert answer.out.startswith("| case ")
    assert f"| `{SMALL}` | eager " in answer.out
    assert f"| `{SMALL}` | sdpa " in answer.out
    assert "* triton, " in answer.out
    assert "validating" in answer.err
    assert "validating" not in answer.out


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_a_saved_record_has_the_rows_of_the_table(command, tmp_path, form):
    answer = command(f"{BENCH} -o {form} --save {tmp_path}/a.json")
    assert answer.status == 0
    saved = records.load(tmp_path / "a.json")
    shown = command(f"gemma4-kernels bench show {tmp_path}/a.json -o {form}")
    assert shown.out == answer.out
    assert {found["by"] for found in saved["rows"]} == {"cuda", "triton", "eager", "sdpa", "transformers"}
    assert saved["command"] == f"gemma4-kernels bench --only '{SMALL}' --device cpu --rounds 1"


def test_a_record_names_no_home_and_no_user(command, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice-the-user"
    home.mkdir(parents=True)
    for name, value in (("HOME", home), ("USER", "alice-the-user"), ("LOGNAME", "alice-the-user")):
        monkeypatch.setenv(name, str(value))

    def fail(*arguments):
        raise OSError(f"cannot read {home}/.triton/cache")

    with kernel("flash_attn", fail):
        command(f"{BENCH} --save {home}/a.json")
    text = (home / "a.json").read_text()
    assert "alice" not in text
    assert "cannot read ~/.triton/cache" in text


def test_a_kernel_that_fails_its_validation_is_not_timed_and_fails_the_command(command):
    with kernel("flash_attn", spoiled(lambda out, lse: out.mul_(2))):
        answer = command(f"{BENCH} -o json --no-baselines")
    assert answer.status == 1
    found = {found["by"]: found for found in json.loads(answer.out)}
    assert (found["triton"]["status"], found["triton"]["median_us"]) == ("failed", None)
    assert found["eager"]["median_us"] > 0


def test_nothing_timed_is_no_success(command):
    answer = command(f"{BENCH} --backend cuda")
    assert answer.status == 3
    assert "nothing was timed" in answer.err


def test_lists(command):
    quick, everything = (command(f"gemma4-kernels bench --list {extent}").out.split() for extent in ("--quick", ""))
    assert set(quick) < set(everything)
    assert len(quick) <= 20


def test_compare(command, tmp_path):
    records.save(record([row()]), tmp_path / "a.json")
    slowed = row(median_us=150.0, quartile_us=145.0, fastest_us=140.0)
    records.save(record([slowed]), tmp_path / "b.json")
    same = command(f"gemma4-kernels bench compare {tmp_path}/a.json {tmp_path}/a.json")
    assert (same.status, same.out.splitlines()[-1]) == (0, "1 SAME, 0 FAST, 0 SLOW.")
    slow = command(f"gemma4-kernels bench compare {tmp_path}/a.json {tmp_path}/b.json")
    assert (slow.status, slow.out.splitlines()[-1]) == (1, "0 SAME, 0 FAST, 1 SLOW.")
    fast = command(f"gemma4-kernels bench compare {tmp_path}/b.json {tmp_path}/a.json")
    assert (fast.status, fast.out.splitlines()[-1]) == (0, "0 SAME, 1 FAST, 0 SLOW.")
    records.save(record([]), tmp_path / "empty.json")
    assert command(f"gemma4-kernels bench compare {tmp_path}/a.json {tmp_path}/empty.json").status == 3


@pytest.mark.parametrize("action", ["show {}", "compare {} {}"])
def test_a_damaged_record_is_one_sentence(command, tmp_path, action):
    path = tmp_path / "a.json"
    path.write_text('{"schema": 1, "rows": [')
    answer = command(f"gemma4-kernels bench {action.format(path, path)}")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("bench: a.json is not JSON")
    assert len(answer.err.splitlines()) == 1


def test_the_folder_of_the_record_is_checked_before_anything_is_timed(command, tmp_path):
    answer = command(f"{BENCH} --save {tmp_path}/nowhere/a.json")
    assert (answer.status, answer.out) == (2, "")
    assert "does not exist" in answer.err


@pytest.mark.parametrize("arguments", ["--only nonsense", "--device cuda:99", "--rounds 0", "-o xml", "--backend x"])
def test_wrong_arguments(command, arguments):
    assert command(f"gemma4-kernels bench {arguments}").status == 2


def test_static_says_honestly_that_there_is_nothing(command, monkeypatch):
    from gemma4_kernels.bench import static

    monkeypatch.setattr(static, "_providers", {})
    answer = command("gemma4-kernels bench --static")
    assert answer.status == 0
    assert "0 compiled kernels." in answer.out


@pytest.fixture
def compiled(monkeypatch):
    """Compiled kernels without a compiler: two of one family, both for every architecture."""
    from gemma4_kernels.bench import sass, static

    def provide(architecture):
        yield static.CompiledKernel("decode", architecture, b"", warps=4, loop_bytes=8192)
        yield static.LazyKernel("prefill", lambda: static.CompiledKernel("prefill", architecture, b""))

    def read(kernel):
        copies = sass.Loop(0, 0x90, 10, 10, {}, {16: 4}, 0, {"bf16": 2048}, 1, 0, 0, 0, 0, 0)
        return [static.Reading(kernel, kernel.name, 40, 0, 0, 0, 20, (copies,))]

    module = types.ModuleType("compiled_kernels")
    module.provide = provide
    monkeypatch.setitem(sys.modules, "compiled_kernels", module)
    monkeypatch.setattr(static, "_providers", {"attention": "compiled_kernels:provide"})
    monkeypatch.setattr(static, "read", read)
    monkeypatch.setattr(sass, "cuobjdump", lambda: "cuobjdump")
    return module


def test_static_reads_every_kernel_for_every_architecture(command, compiled):
    answer = command("gemma4-kernels bench --static")
    assert (answer.status, answer.err) == (0, "")
    assert "10 compiled kernels." in answer.out
    assert [name in answer.out for name in ("rtx 3060", "rtx 4060", "rtx 3090")] == [True, True, False]


def test_static_for_some_architectures_kernels_and_cards(command, compiled):
    arguments = "--architecture sm_86 --architecture sm_90 --kernel dec --card 'rtx 3090' -o json"
    answer = command(f"gemma4-kernels bench --static {arguments}")
    found = json.loads(answer.out)
    assert answer.status == 0
    assert [(row["kernel"], row["architecture"], row["card"]) for row in found] == [
        ("decode", "sm_86", "rtx 3090"),
        ("decode", "sm_90", None),
    ]
    every = json.loads(command("gemma4-kernels bench --static --architecture sm_86 --card all -o json").out)
    assert {row["card"] for row in every} == {"rtx 3060", "rtx 3060 laptop gpu", "rtx 3090", None}


@pytest.mark.parametrize("arguments", ["--architecture sm_1", "--card 'rtx 1'", "--card 'apple m1'"])
def test_static_refuses_what_it_does_not_know(command, compiled, arguments):
    assert command(f"gemma4-kernels bench --static {arguments}").status == 2


def test_static_fails_if_a_kernel_does_not_compile(command, compiled):
    good = compiled.provide

    def provide(architecture):
        if architecture == "sm_120":
            raise RuntimeError("the compiler is on strike")
        yield from good(architecture)

    compiled.provide = provide
    answer = command("gemma4-kernels bench --static")
    assert answer.status == 1
    assert "8 compiled kernels." in answer.out
    assert "FAILED attention for sm_120: RuntimeError: the compiler is on strike" in answer.out
    answer = command("gemma4-kernels bench --static -o csv")
    assert answer.status == 1
    assert "strike" not in answer.out
    assert "attention for sm_120: RuntimeError: the compiler is on strike" in answer.err


def test_static_without_a_kernel_of_that_name_is_no_success(command, compiled):
    answer = command("gemma4-kernels bench --static --kernel nonsense")
    assert answer.status == 3
    assert "no compiled kernel is called nonsense" in answer.err


def test_a_picture_is_written_beside_the_table(command, tmp_path):
    pytest.importorskip("matplotlib")
    answer = command(f"{BENCH} --plot {tmp_path}/a.png")
    assert answer.status == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote " in answer.err
