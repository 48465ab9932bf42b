"""The kernels of verification, compiled for cards that are not here, and held to what those cards have."""

from __future__ import annotations

import re

import pytest
import torch
from budgets import assert_fits

from gemma4_kernels import environment

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 prevents", allow_module_level=True)

from gemma4_kernels.bench import sass, static, verification_kernels
from gemma4_kernels.bench.verification_kernels import READS
from gemma4_kernels.verification.triton import tables

if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_everything_fits(architecture):
    kernels = [lazy.compile() for lazy in verification_kernels.provide(architecture)]
    # Tiles three times, rows twice, decisions four times, match; tiles and match in two more dtypes.
    assert len(kernels) == 14
    for kernel in kernels:
        (reading,) = static.read(kernel)
        assert_fits(kernel.name, reading)


def test_no_operation_is_fused_flushed_or_approximate():
    """Bits are those of single operations, each rounded to nearest."""
    for name, launch in verification_kernels.launches():
        text = launch.compile("sm_86").asm["ptx"]
        # floor flushes subnormal numbers. exp's argument of it is a sum with 1/2, which is 0 or far from them.
        text = text.replace("cvt.rmi.ftz.f32.f32", "")
        found = re.search(r"\bfma\.|\.ftz\.|\bdiv\.(full|approx)|\b(ex2|lg2|rcp|tanh)\.", text)
        assert found is None, f"{name}: {found}"


@pytest.mark.parametrize("vocabulary", [1, 16, 2**20 + 1])
@pytest.mark.parametrize("method", ["match", "block"])
def test_vocabularies_that_the_compiler_sees_otherwise(method, vocabulary):
    """It takes a size of 1 as a constant, knows multiples of 16, and 513 tiles have no lists."""
    for launch in verification_kernels.plan(method, method == "block", torch.float32, vocabulary):
        compiled = launch.compile("sm_86")
        (reading,) = static.read(static.CompiledKernel(launch.name, "sm_86", compiled.asm["cubin"]))
        assert reading.spill_instructions == 0


def test_lists_of_gemmas_vocabulary_fit_into_a_program():
    assert tables.list_length(-(-verification_kernels.VOCABULARY // tables.TILE)) == 16
    assert [tables.list_length(tiles) for tiles in (1, 32, 33, 128, 129, 256, 257, 8192)] == [
        64,
        64,
        32,
        16,
        8,
        8,
        0,
        0,
    ]


def test_static_says_how_often_logits_are_read():
    text = "\n".join(verification_kernels.remarks())
    assert "temperature 0: 1.0\n" in text
    assert "no filter: 1.0\n" in text
    assert "top_k up to 64, with any top_p and min_p: 1.0 to at most 48.0" in text
    assert READS["min_p"].most == 2
