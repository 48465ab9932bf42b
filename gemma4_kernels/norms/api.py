"""The public function on the norms between sublayers: documented, checked, the same on every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call
from gemma4_kernels.norms import ops


def sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None = None, *,
    layer_scalar: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What stands between two sublayers of Gemma 4: the norm after one, the residual sum, the norm before the next.

        hidden = (residual + norm(x, post_weight)) * layer_scalar
        normed = norm(hidden, pre_weight)

    norm is x / sqrt(mean(x^2) + eps) in fp32, times the weight (Gemma 4 adds no 1), rounded once; the sum and the product
    are each rounded to x's dtype. Operations and roundings are those of Gemma4UnifiedTextDecoderLayer in transformers
    (modeling_gemma4_unified.py): a layer is two of these calls, after attention without `layer_scalar`, and after the
    feed-forward part with it and the next layer's `pre_weight`.

    Args:
        x: (..., N) bf16, fp16, fp32 or fp64, with a dense last dim: what the sublayer gave.
        residual: (..., N) like x: what went into the sublayer's norm.
        post_weight: (N,), any float dtype.
        pre_weight: (N,), any float dtype; None: there is no norm to follow.
        layer_scalar: one number in a tensor of any float dtype, () or (1,); None: no product.
        eps: of both norms.
    Returns: hidden (..., N) and normed (..., N), both contiguous, in x's dtype; normed is None without pre_weight. A row's
        bits depend on that row only. No gradient flows through them.
    Raises: ShapeError, StrideError, DeviceError, DTypeError, TypeError, ValueError before anything runs; BackendError where
        the backend asked for by name cannot do it.
    """
    arguments = _plan(x, residual, post_weight, pre_weight, layer_scalar=layer_scalar, eps=eps)
    hidden, normed = torch.ops.gemma4_kernels.sandwich_norm(*arguments)
    return hidden.view(x.shape), None if pre_weight is None else normed.view(x.shape)


def _plan(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None = None, *,
    layer_scalar: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Any, ...]:  # fmt: skip
    """The checked arguments of the op, x and residual as (M, N)."""
    name = "sandwich_norm"
    checks.has_dtype(name, "x", x, checks.FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise checks.ShapeError(f"{name}: x must have shape (..., N) with N at least 1, got {tuple(x.shape)}")
    checks.has_shape(name, "residual", residual, tuple(x.shape))
    checks.has_dtype(name, "residual", residual, (x.dtype,))
    for argument, tensor in (("x", x), ("residual", residual)):
        checks.is_dense(name, argument, tensor)
    weights = {"post_weight": post_weight} | ({} if pre_weight is None else {"pre_weight": pre_weight})
    for argument, weight in weights.items():
        checks.has_shape(name, argument, weight, (x.shape[-1],))
        checks.has_dtype(name, argument, weight, checks.FLOATS)
        checks.is_dense(name, argument, weight)
    if layer_scalar is not None:
        checks.has_dtype(name, "layer_scalar", layer_scalar, checks.FLOATS)
        if layer_scalar.shape not in ((), (1,)):
            raise checks.ShapeError(f"{name}: layer_scalar must have shape () or (1), got {tuple(layer_scalar.shape)}")
    checks.same_device(
        name, x=x, residual=residual, post_weight=post_weight, pre_weight=pre_weight, layer_scalar=layer_scalar
    )
    eps = checks.positive_number(name, "eps", eps)
    rows, residual_rows = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, residual))
    return rows, residual_rows, post_weight, pre_weight, layer_scalar, eps


def _describe(*args: Any, **kwargs: Any) -> Call:
    return ops.describe(*_plan(*args, **kwargs))


backends.register_describer("sandwich_norm", "sandwich_norm", _describe)
