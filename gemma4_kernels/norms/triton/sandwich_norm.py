"""What stands between two sublayers, in one launch: norm, residual sum, layer scalar, and the next norm.

    x, residual  (M, N)            post_weight, pre_weight  (N,)            layer_scalar  one number
    hidden, normed  (M, N)

One program owns one row and holds it in registers: x and residual are read once, hidden and normed written once. Sums are
fp32; every rounding of transformers' modules is made where they make it, and multiply-adds are not fused. What may differ from
PyTorch is the order of the sums of squares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.norms.ops import outputs
from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.triton_common.norm import inverse_rms
from gemma4_kernels.triton_common.rounding import round_to, rounded, to_fp32

# Numbers of a thread: two loads of 16 bytes in bf16, and no more of a row than fits in its registers.
THREAD_NUMBERS = 16
MOST_WARPS = 16  # a row of 16384 then has 32 numbers a thread


@triton.jit
def sandwich_norm_kernel(
    x_ptr, residual_ptr, post_weight_ptr, pre_weight_ptr, layer_scalar_ptr, hidden_ptr, normed_ptr,
    stride_x, stride_residual, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets of a long prefill go beyond 32 bits
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = column < N
    x = to_fp32(tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0))
    residual = to_fp32(tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0))
    x = _normed(x, post_weight_ptr + column, mask, eps, N, DTYPE)
    hidden = rounded(residual + x, DTYPE)
    if layer_scalar_ptr is not None:
        hidden = rounded(hidden * to_fp32(tl.load(layer_scalar_ptr)), DTYPE)
    tl.store(hidden_ptr + row * N + column, round_to(hidden, DTYPE), mask=mask)
    if pre_weight_ptr is not None:
        normed = _normed(hidden, pre_weight_ptr + column, mask, eps, N, DTYPE)
        tl.store(normed_ptr + row * N + column, round_to(normed, DTYPE), mask=mask)


@triton.jit
def _normed(x, weight_ptrs, mask, eps, N: tl.constexpr, DTYPE: tl.constexpr):
    """x * (mean(x^2) + eps)^-0.5 * weight, rounded once; x [1, BLOCK] holds zeros where the mask does."""
    inverse = inverse_rms(tl.sum(x * x, axis=1), N, eps)[:, None]  # [1, 1]
    weight = to_fp32(tl.load(weight_ptrs, mask=mask, other=0.0))
    return rounded(x * inverse * weight, DTYPE)


# The launcher -------------------------------------------------------------------------------------------------------

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def plan(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float,
    hidden: Tensor, normed: Tensor,
) -> Launch:  # fmt: skip
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    return Launch(
        kernel=sandwich_norm_kernel,
        grid=(rows,),
        arguments={
            "x_ptr": x, "residual_ptr": residual, "post_weight_ptr": post_weight, "pre_weight_ptr": pre_weight,
            "layer_scalar_ptr": layer_scalar, "hidden_ptr": hidden, "normed_ptr": normed, "stride_x": x.stride(0),
            "stride_residual": residual.stride(0), "eps": eps,
        },
        constants={"N": columns, "BLOCK": block, "DTYPE": _DTYPES[x.dtype]},
        num_warps=min(MOST_WARPS, max(1, block // (32 * THREAD_NUMBERS))),
        enable_fp_fusion=False,
    )  # fmt: skip


def sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden (M, N), and normed (M, N), or (0, N) without pre_weight."""
    hidden, normed = outputs(x, pre_weight)
    plan(x, residual, post_weight, pre_weight, layer_scalar, eps, hidden, normed).run()
    return hidden, normed
