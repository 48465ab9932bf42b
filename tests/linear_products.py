"""Drawn tensors, and a product with a quantised weight held against the error rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from gemma4_kernels import QuantizedWeight, quantized_linear
from gemma4_kernels.bench.errors import judge


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    got = quantized_linear(x, weight, bias, residual=residual)
    wide = None if bias is None else bias.double()
    exact = linear(x.double(), weight.dequantize(torch.float32).double(), wide)
    plain = linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    if residual is not None:
        exact, plain = exact + residual.double(), plain + residual
    assert got.dtype == x.dtype
    assert (verdict := judge(got, exact, plain)).ok, str(verdict)
