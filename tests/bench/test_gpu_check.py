"""The script behind `make gpu-check`: it goes on after a failure, says so, and its exit status tells."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_kernels import backends
from gemma4_kernels.bench.cases import all_cases, parse

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def python(code):
    return [sys.executable, "-c", code]


def test_it_goes_on_after_a_failure_and_the_table_says_which(gpu_check, monkeypatch, capfd):
    stages = [
        gpu_check.Stage("first", [python("print('one')")]),
        gpu_check.Stage(
            "second", [python("raise SystemExit(7)"), python("print('never')")], what_exit_codes_mean={7: "seven"}
        ),
        gpu_check.Stage(
            "third", [python("import os; print(os.environ['GREETING'])")], environment={"GREETING": "hello"}
        ),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda device, record: stages)
    assert gpu_check.main(["--record", "card.json"]) == 1
    printed = capfd.readouterr().out
    table = printed.strip().split("\n\n")[-2].splitlines()
    assert [line.split()[:2] for line in table] == [["first", "passed"], ["second", "FAILED"], ["third", "passed"]]
    assert "seven: see logs/2-second.log" in table[1]
    assert "hello" in printed
    assert "never" not in printed
    assert (gpu_check.LOGS / "1-first.log").read_text().endswith("one\n")


def test_all_stages_passing_is_success(gpu_check, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "stages", lambda device, record: [gpu_check.Stage("only", [python("pass")])])
    assert gpu_check.main(["--record", "card.json"]) == 0
    assert "record: " in capfd.readouterr().out


def test_a_missing_tool_is_a_failure_in_words(gpu_check):
    outcome = gpu_check.run(gpu_check.Stage("sanitize", [python("pass")], tool="no-such-tool"), 1)
    assert (outcome.passed, outcome.sentence) == (False, "no-such-tool is not installed or not on the PATH")


def test_a_program_that_does_not_start_is_a_failure(gpu_check):
    assert not gpu_check.run(gpu_check.Stage("gone", [["/nowhere/program"]]), 1).passed


def test_the_stages_are_those_of_the_documentation(gpu_check):
    names = [stage.name for stage in gpu_check.stages("cuda", Path("card.json"))]
    assert names == [
        "device", "install", "compiled kernels", "info", "gpu tests", "validate --full", "compute-sanitizer", "bench"
    ]  # fmt: skip
    page = (SCRIPT.parents[1] / "docs" / "validating-a-gpu.md").read_text()
    assert all(f"| {name} |" in page for name in names)


def test_installing_needs_no_registry(gpu_check):
    install = gpu_check.stages("cuda", Path("card.json"))[1]
    assert {"--no-build-isolation", "--no-deps"} <= set(install.commands[0])


def test_what_stops_a_compiler_does_not_stop_the_installation(gpu_check):
    install, kernels = gpu_check.stages("cuda", Path("card.json"))[1:3]
    assert install.environment == {"GEMMA4_CUDA": "0", "GEMMA4_EMULATOR": "0"}
    assert Path(kernels.commands[0][1]).name == "gpu_modules.py"
    assert "what follows" in kernels.what_exit_codes_mean[1]


def test_a_missing_compiler_is_a_sentence():
    script = SCRIPT.with_name("gpu_modules.py")
    done = subprocess.run(
        [sys.executable, script, "cpu"],
        env={**os.environ, "GEMMA4_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("_C cannot be built here: ")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_each_sanitizer_runs_cases_of_every_family_on_compiled_kernels(gpu_check, tool):
    sanitize = next(stage for stage in gpu_check.stages("cuda", Path("card.json")) if stage.name == "compute-sanitizer")
    cases, tests = [command for command in sanitize.commands if tool in command]
    families = {parse(text).family for text in cases if "(" in text}
    assert families == {case.family for case in all_cases()}
    assert "cuda" in cases[cases.index("--backend") :]
    assert Path(tests[-1]).is_file()  # of the prologue, which has no cases


def test_the_compiled_kernels_serve_the_sanitized_cases(gpu_check):
    served = {case.op for case in map(parse, gpu_check.SANITIZED)}
    compiled = {op for op, backend in backends._implementations if backend == "cuda"}
    names = {name for name, (op, _) in backends._describers.items() if op in compiled}
    assert served == names - {"qkv_norm_rope_append", "k_eq_v_norm_rope_append"}


def test_sanitized_cases_are_cases(gpu_check):
    assert [str(parse(text)) for text in gpu_check.SANITIZED] == list(gpu_check.SANITIZED)
    assert all(parse(text).operations() < 1e8 for text in gpu_check.SANITIZED)
