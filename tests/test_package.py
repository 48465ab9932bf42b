"""The package as users get it: a wheel in an environment with nothing but torch and numpy, and an import that is light."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory) -> Path:
    """The bin folder of an environment with torch, numpy, and the wheel built from this tree."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    # From a copy: setuptools leaves a build folder behind and would put its old contents into the next wheel.
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA4_CUDA", "0")  # a minute of nvcc
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("gemma4_kernels-*.whl")
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    run(python, "-m", "pip", "install", "--quiet", torch, "numpy")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    return python.parent


@pytest.mark.slow
def test_info_runs_from_the_wheel_with_only_torch_and_numpy(bare_environment, tmp_path):
    text = run(bare_environment / "gemma4-kernels", "info", cwd=tmp_path)
    assert "-> eager" in text
    found = json.loads(run(bare_environment / "gemma4-kernels", "info", "--json", cwd=tmp_path))
    assert {found["libraries"][name] for name in ("triton", "transformers", "gguf")} == {"not installed"}
    for op in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "k_eq_v_attention"):
        assert [choice["backend"] for choice in found["ops"][op]["cpu"] if choice["taken"]] == ["eager"]


@pytest.mark.slow
def test_validate_runs_from_the_wheel_with_only_torch_and_numpy(bare_environment, tmp_path):
    found = json.loads(run(bare_environment / "gemma4-kernels", "validate", "--quick", "--json", cwd=tmp_path))
    assert found["failed"] == 0
    assert found["held"] > 20
    assert all(check["reasons"] for check in found["checks"] if check["status"] == "skipped")


@pytest.mark.slow
def test_the_wheel_holds_the_reference_and_the_cases(bare_environment, tmp_path):
    code = """if True:
        from gemma4_kernels.bench.cases import attention_cases
        from gemma4_kernels.bench.errors import judge
        case = attention_cases()[0]
        made = case.inputs()
        result = case.run(made)
        for got, exact, plain in zip(result, case.reference(made), case.plain(made)):
            assert judge(got, exact, plain).ok
        print(case)
    """
    assert "flash_attn_func(" in run(bare_environment / "python", "-c", code, cwd=tmp_path)


def test_an_import_loads_neither_triton_nor_transformers_nor_a_compiled_module():
    code = """if True:
        import sys
        import torch
        before = set(sys.modules)
        import gemma4_kernels
        gemma4_kernels.explain("flash_attn_func")
        print(*sorted(set(sys.modules) - before))
    """
    loaded = run(sys.executable, "-c", code).split()
    assert "gemma4_kernels.attention.api" in loaded
    heavy = [
        name for name in loaded if name.split(".")[0] in ("triton", "transformers", "gguf") or name.endswith("._C")
    ]
    assert not heavy
    assert "gemma4_kernels.attention.eager" not in loaded  # a backend is loaded at its first call


def test_info_never_ends_in_a_traceback(monkeypatch, capsys):
    """Whatever the machine lacks or does wrong becomes a sentence."""
    import importlib.metadata

    import torch

    from gemma4_kernels.cli.main import main

    def broken(*_: object) -> None:
        raise RuntimeError("the driver is on holiday\nand so on")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(torch.backends.mps, "is_available", broken)
    monkeypatch.setattr(importlib.metadata, "version", broken)
    monkeypatch.setenv("GEMMA4_BACKEND", "nonsense")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cuda devices could not be listed: RuntimeError: the driver is on holiday" in printed
    assert "GEMMA4_BACKEND must be one of cuda, triton, eager, auto, got 'nonsense'" in printed
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["name"] == "cpu"
