"""The K-equals-V kernel through the C interface, in builds that watch memory and races."""

from __future__ import annotations

import pytest
from cuda_build import FOLDER, build, skip_without_compiler
from test_emulator import run

skip_without_compiler()


@pytest.fixture(scope="module")
def programs():
    return build.checks(FOLDER, ("k_eq_v_check",))


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_the_k_eq_v_kernel_is_right_and_clean(programs, sanitizer):
    status, text = run(programs["k_eq_v_check", sanitizer])
    assert status == 0, text


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_bad_arguments_of_k_eq_v_decode_are_refused_in_words(programs, sanitizer):
    status, text = run(programs["k_eq_v_check", sanitizer], "fuzz", "3000")
    assert status == 0, text
