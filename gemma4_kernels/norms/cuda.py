"""The norms between sublayers by the compiled kernel of csrc/norms: a block for each row.

x and residual are (M, N) with a dense last dim, shapes and dtypes have been checked before.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_kernels.cuda_common import support
from gemma4_kernels.cuda_common.arguments import address, dtype_code, readable, stream_of
from gemma4_kernels.norms.ops import outputs


def sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden (M, N), and normed (M, N), or (0, N) without pre_weight."""
    hidden, normed = outputs(x, pre_weight)
    post, pre, scalar = (readable(each) for each in (post_weight, pre_weight, layer_scalar))
    module = support.module_for(x.device)
    arguments = module.SandwichNormArguments(
        m=x.shape[0], n=x.shape[1], eps=eps, dtype=dtype_code(x),
        x=address(x), x_stride=_step(x), residual=address(residual), residual_stride=_step(residual),
        hidden=address(hidden), hidden_stride=x.shape[1],
        normed=address(None if pre is None else normed), normed_stride=x.shape[1],
        post_weight=address(post), post_weight_dtype=dtype_code(post),
        pre_weight=address(pre), pre_weight_dtype=dtype_code(pre),
        layer_scalar=address(scalar), layer_scalar_dtype=dtype_code(scalar),
    )  # fmt: skip
    with stream_of(x.device) as stream:
        module.sandwich_norm(arguments, stream)
    return hidden, normed


def _step(rows: Tensor) -> int:
    """From row to row; of one row it means nothing, and may be anything."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]
