"""The Triton kernel between sublayers, compiled for cards that are not here: no spills, no fused multiply-adds."""

from __future__ import annotations

import pytest
import torch
from budgets import assert_fits

from gemma4_kernels import environment
from gemma4_kernels.bench import sass, static

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 prevents", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)

from gemma4_kernels.norms.triton.sandwich_norm import plan


def launch(dtype, width, both=True, rows=5):
    """A call as data: tensors of the meta device hold no numbers."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(width, dtype=torch.bfloat16)
    x = empty(rows, width)
    return plan(x, x, weight, weight if both else None, empty(1) if both else None, 1e-6, empty(rows, width), x)


def reading(made, architecture):
    done = made.compile(architecture)
    (found,) = static.read(
        static.CompiledKernel(made.name, architecture, done.asm["cubin"], done.metadata.shared, made.num_warps)
    )
    return found, done.asm["ptx"]


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
@pytest.mark.parametrize(("width", "both"), [(3840, True), (3840, False), (16384, True)])
def test_a_row_fits_into_the_registers_of_its_block(architecture, width, both):
    found, ptx = reading(launch(torch.bfloat16, width, both), architecture)
    assert_fits(f"{width}, {both}", found)
    assert "ld.global.v4" in ptx  # 16 bytes at a time
    assert ptx.count("ld.global.b16") == int(both)  # the layer scalar
    assert "st.global.v4" in ptx


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 250, 2560, 16384])
def test_the_other_dtypes_and_sizes_compile(dtype, width):
    found, ptx = reading(launch(dtype, width), "sm_86")
    assert_fits(f"{width}, {dtype}", found)
    # Fused, residual + x * inverse * weight would lose a rounding of fp32.
    assert "fma." not in ptx
