"""`gemma4-kernels bench`: tables, records, comparisons, and what it refuses. No test here looks at a time."""

from __future__ import annotations

import json

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
    assert len(quick) <= 16


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


def test_a_picture_is_written_beside_the_table(command, tmp_path):
    pytest.importorskip("matplotlib")
    answer = command(f"{BENCH} --plot {tmp_path}/a.png")
    assert answer.status == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote " in answer.err
