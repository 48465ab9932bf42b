"""Gemma 4's RMSNorm in plain PyTorch, with the roundings of transformers' modeling_gemma4_unified, for the eager backends."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * (mean(x^2) + eps)^-0.5 (* weight) over the last dim, in fp32 (fp64 for fp64 tensors), rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # pow, not rsqrt: transformers writes it so, and the two need not have the same last bit.
    normed = wide * torch.pow(wide.pow(2).mean(dim=-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return normed.to(x.dtype)
