"""`gemma4-kernels validate`: what it says, on which stream, with which exit status, and that a failure can be replayed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from bench_helpers import SMALL, kernel, spoiled

from gemma4_kernels.bench import cases, validation
from gemma4_kernels.bench.cases import AttentionCase

CASE = f'--only "{SMALL}"'


@pytest.fixture
def short_list(monkeypatch):
    """A list of three cases, one of them quick, one of them for benchmarks only."""
    listed = (
        AttentionCase("flash_attn_func", sq=3, sk=9, hq=4, hkv=2, d=64, right=0, tags=frozenset({"quick", "full"})),
        AttentionCase("k_eq_v_attention", sq=2, sk=7, hq=4, hkv=1, d=64),
        AttentionCase("flash_attn_func", sq=1, sk=5, hq=4, hkv=2, d=64, tags=frozenset({"bench"})),
    )
    monkeypatch.setattr(cases, "FAMILIES", {"attention": (lambda: listed,)})
    return listed


def break_one_element(out, lse):
    out[1, 3, 2, 17] += 1.0


def test_a_held_case_is_success_and_says_what_was_skipped_and_why(command):
    answer = command(f"gemma4-kernels validate {CASE} --device cpu")
    assert answer.status == 0
    assert "skipped\n     1 on cuda    runs on cuda, not on cpu" in answer.out
    assert "eager       1       0        0" in answer.out
    assert "1 checks held, 0 failed, 2 were skipped" in answer.out
    assert "[1/1]" in answer.err
    assert "[1/1]" not in answer.out


def test_a_broken_kernel_fails_with_its_worst_element_its_budget_and_a_replay_that_fails_alike(command):
    with kernel("flash_attn", spoiled(break_one_element)):
        first = command(f"gemma4-kernels validate {CASE} --device cpu")
        assert first.status == 1
        assert f"FAILED  {SMALL} on triton" in first.out
        (reason,) = [line.strip() for line in first.out.splitlines() if "element" in line]
        assert reason.startswith("out element (1, 3, 2, 17): got ")
        assert "against a budget of" in reason
        (replay,) = [line.split("replay: ")[1] for line in first.out.splitlines() if "replay: " in line]
        second = command(replay)
    assert second.status == 1
    assert reason in second.out
    assert "eager" not in second.out
    assert command(replay.replace("triton", "eager")).status == 0


def test_json_holds_every_check_and_nothing_else_is_on_stdout(command):
    with kernel("flash_attn", spoiled(lambda out, lse: lse.fill_(float("nan")))):
        answer = command(f"gemma4-kernels validate {CASE} --device cpu --json")
    found = json.loads(answer.out)
    assert (found["status"], found["held"], found["failed"], found["skipped"]) == (1, 1, 1, 1)
    broken = next(check for check in found["checks"] if check["status"] == "failed")
    assert broken["outputs"]["lse"]["got"] == "nan"
    assert broken["outputs"]["out"]["ok"] is True
    assert broken["replay"] == validation.replay_command(str(SMALL), "triton", "cpu")


def test_lists(command, short_list):
    quick, default, full = (
        command(f"gemma4-kernels validate --list {extent}").out.split() for extent in ("--quick", "", "--full")
    )
    assert quick == [str(short_list[0])]
    assert default == [str(case) for case in short_list[:2]]
    assert full == [str(case) for case in short_list]


def test_a_list_runs_on_the_backend_that_is_asked_for(command, short_list):
    answer = command("gemma4-kernels validate --full --backend eager --device cpu")
    assert (answer.status, "3 checks held, 0 failed, 0 were skipped" in answer.out) == (0, True)


def test_skipped_cases_can_be_named(command):
    brief, verbose = (command(f"gemma4-kernels validate {CASE} --device cpu {flag}").out for flag in ("", "-v"))
    assert str(SMALL) not in brief.partition("backend ")[0]
    assert str(SMALL) in verbose.partition("backend ")[0]


def test_nothing_checked_is_no_success(command):
    answer = command(f"gemma4-kernels validate {CASE} --device cpu --backend cuda")
    assert answer.status == 3
    assert "FAILED: nothing was checked." in answer.out


def test_a_required_backend_must_have_checked_something(command):
    answer = command(f"gemma4-kernels validate {CASE} --device cpu --require triton --require eager")
    assert answer.status == 3
    assert "FAILED: triton was required and checked nothing here." in answer.out
    assert command(f"gemma4-kernels validate {CASE} --device cpu --require eager").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only nonsense", "a case looks like"),
        ('--only "flash_attn_func(zz=1)"', "no field 'zz'"),
        ("--device cuda:99 --quick", "no device 'cuda:99'"),
        ("--device quantum --quick", "device must be"),
        ("--backend magic", "invalid choice"),
        ("--quick --full", "not allowed with"),
    ],
)
def test_wrong_arguments_are_a_sentence(command, arguments, message):
    answer = command(f"gemma4-kernels validate {arguments}")
    assert answer.status == 2
    assert message in answer.err
    assert answer.out == ""


def test_the_module_is_the_same_program():
    line = [
        sys.executable,
        "-m",
        "gemma4_kernels",
        "validate",
        "--only",
        str(SMALL),
        "--device",
        "cpu",
        "--backend",
        "eager",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 checks held" in done.stdout


def test_neither_pytest_nor_an_optional_library_is_needed():
    code = (
        "import sys\n"
        "for name in ('pytest', 'triton', 'transformers', 'matplotlib', 'hypothesis', 'pytest_benchmark'):\n"
        "    sys.modules[name] = None\n"
        "from gemma4_kernels.bench import ceilings\n"
        "ceilings.COPY_BYTES['cpu'], ceilings.MATMUL_SIZE['cpu'] = 1 << 16, 64\n"
        "from gemma4_kernels.cli.main import main\n"
        f"assert main(['validate', '--only', '{SMALL}', '--device', 'cpu']) == 0\n"
        f"assert main(['bench', '--only', '{SMALL}', '--device', 'cpu', '--rounds', '1']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
