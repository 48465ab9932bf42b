"""RMSNorm's factor in Triton, with the roundings of PyTorch's CPU kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_rms(sum_of_squares, COUNT: tl.constexpr, eps):
    """(mean + eps)^-0.5 of COUNT numbers with this sum of squares, fp32; a tensor of sums."""
    mean = tl.div_rn(sum_of_squares, tl.full(sum_of_squares.shape, COUNT, tl.float32))
    # PyTorch's CPU kernel takes pow(m, -0.5) as 1 / sqrt(m), both rounded to nearest, and this gives its bits. Its CUDA
    # kernel takes rsqrt, whose last bits are left to the card: nothing could equal it on every one.
    return tl.div_rn(tl.full(sum_of_squares.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))
