"""The emulator catches what it claims to catch, in the build that claims it, and finds nothing in kernels that are right."""

from __future__ import annotations

import os
import subprocess

import pytest
from cuda_build import FOLDER, build, skip_without_compiler

skip_without_compiler()

RIGHT = (
    "barrier", "warp-barrier", "copy", "ring", "divergence", "collective", "global", "shared", "global-copy", "fragments",
    "matrices",
)  # fmt: skip
CHECKS = ("linear_check", "linear_fused_check", "norms_check", "verification_check")
# (kernel, build that catches it, what it says)
CAUGHT = [
    ("barrier-missing", "thread", "data race"),
    ("warp-barrier-missing", "thread", "data race"),
    ("copy-barrier-missing", "thread", "data race"),
    ("ring-short", "thread", "data race"),
    ("ring-short", "plain", "wrong result"),
    ("copy-wait-missing", "plain", "wrong result"),
    ("copy-wait-missing", "thread", "wrong result"),
    ("divergence-some", "plain", "waits in __syncthreads"),
    ("divergence-places", "plain", "came to __syncthreads"),
    ("collective-some", "plain", "waits in shfl"),
    ("global-beyond", "address", "heap-buffer-overflow"),
    ("global-copy-beyond", "address", "heap-buffer-overflow"),
    ("shared-beyond", "address", "heap-buffer-overflow"),
    ("fragments-wrong", "plain", "wrong result"),
    ("matrices-wrong", "plain", "wrong result"),
]


@pytest.fixture(scope="module")
def programs():
    return build.checks(FOLDER, ("faults", *CHECKS))


def run(program, *arguments: str) -> tuple[int, str]:
    # A launch that fails leaves its fibers where they are, and with them what they held.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_kernel_that_is_right_is_clean(programs, name, sanitizer):
    assert run(programs["faults", sanitizer], name) == (0, "right\n")


@pytest.mark.parametrize(("name", "sanitizer", "said"), CAUGHT)
def test_a_planted_fault_is_caught(programs, name, sanitizer, said):
    status, text = run(programs["faults", sanitizer], name)
    assert status != 0
    assert said in text


def test_a_race_is_named_by_its_line(programs):
    _, text = run(programs["faults", "thread"], "barrier-missing")
    assert "faults.cpp:" in text


def test_every_planted_fault_is_in_these_lists(programs):
    _, names = run(programs["faults", "plain"])
    assert set(names.split()) == {*RIGHT, *(name for name, _, _ in CAUGHT)}


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_are_right_and_clean(programs, name, sanitizer):
    status, text = run(programs[name, sanitizer])
    assert status == 0, text


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
@pytest.mark.parametrize("name", CHECKS)
def test_bad_arguments_of_the_c_interface_are_refused_in_words(programs, name, sanitizer):
    status, text = run(programs[name, sanitizer], "fuzz", "2000")
    assert status == 0, text


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_the_verification_kernels_are_right_and_clean(programs, sanitizer):
    status, text = run(programs["verification_check", sanitizer])
    assert status == 0, text


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_bad_arguments_of_verification_are_refused_in_words(programs, sanitizer):
    status, text = run(programs["verification_check", sanitizer], "fuzz", "2000")
    assert status == 0, text
