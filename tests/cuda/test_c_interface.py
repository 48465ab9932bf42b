"""A program in C++ links the C library; the Python modules and the library need no torch."""

from __future__ import annotations

import subprocess

import pytest
from cuda_build import FOLDER, build, skip_without_compiler

from gemma4_kernels.cuda_common import support

skip_without_compiler()


def run(program) -> str:
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_runs_on_the_emulated_library():
    text = run(build.library(FOLDER, emulated=True))
    assert "k must be a multiple of 32" in text
    assert "all as they should be" in text


@pytest.mark.skipif(isinstance(build.find_nvcc(), str), reason="no nvcc")
def test_the_example_links_the_library_for_gpus():
    text = run(build.library(FOLDER, emulated=False))
    assert 'machine code for "' in text


def test_modules_are_there_where_they_can_be_built_and_load_side_by_side():
    """Or every other test of them would skip itself, and nobody would know."""
    found = support.describe()
    for name, obstacle in build.obstacles().items():
        if obstacle is None:
            assert found[name].startswith("built"), found[name]


def symbols(path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def test_the_library_shows_its_interface_and_nothing_else():
    build.library(FOLDER, emulated=True)
    found = symbols(FOLDER / "libgemma4_kernels_emulated.so")
    header = (build.SOURCES / "include" / "gemma4_kernels.h").read_text()
    declared = {word for word in found if word.startswith("gemma4_")}
    assert declared == {
        "gemma4_abi_version", "gemma4_last_error", "gemma4_architectures", "gemma4_check_driver", "gemma4_linear_workspace",
        "gemma4_linear", "gemma4_flash_decode_workspace", "gemma4_flash_decode",
        "gemma4_k_eq_v_decode_workspace", "gemma4_k_eq_v_decode",
    }  # fmt: skip
    assert all(f"{name}(" in header for name in declared)
    assert not {name for name in found - declared if "gemma4" in name or "emulator" in name}
