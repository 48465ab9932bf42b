"""Conversions between fp32 and the tensors' dtypes, rounded as PyTorch rounds, on a card and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.triton_common.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_fp32(x):
    """Exact. The interpreter's own conversion of bf16 is wrong for subnormals, so there the bits are moved by hand."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 to the nearest number of DTYPE, ties to even. The interpreter cuts bf16 off instead of rounding it."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN's bits into infinity
        return tl.where(x != x, quiet_nan, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x (fp32) after a rounding to DTYPE, still as fp32."""
    return to_fp32(round_to(x, DTYPE))


@triton.jit
def operand(x, DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """fp32 x rounded to DTYPE, as a product takes it."""
    if DOT_DTYPE == tl.float32:
        return to_fp32(round_to(x, DTYPE))
    else:
        return round_to(x, DTYPE)
