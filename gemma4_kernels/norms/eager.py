"""The norms between sublayers on plain PyTorch, with the order and the roundings of transformers' decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.rms_norm import rms_norm


def sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden (M, N), and normed (M, N), or (0, N) without pre_weight."""
    hidden = residual + rms_norm(x, post_weight, eps)
    if layer_scalar is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        hidden = (hidden.to(wide) * layer_scalar.to(wide)).to(x.dtype)
    hidden = hidden.contiguous()
    return hidden, hidden.new_empty((0, x.shape[1])) if pre_weight is None else rms_norm(hidden, pre_weight, eps)
