"""Drawn tensors, and a product with a quantised weight held against the error rule."""

from __future__ import annotations

import math

import torch
from linear_weights import random_weight
from torch import Tensor
from torch.nn.functional import linear

from gemma4_kernels import QuantizedWeight, quantized_linear
from gemma4_kernels.bench.errors import judge


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cancelling(
    scheme: str, shape: tuple[int, int], rows: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[QuantizedWeight, Tensor]:
    """A weight and x of which the second half of the columns takes the first away again.

    What is left are the roundings of the sums, so that any other order of sums shows, which it seldom does in outputs that
    are rounded to 8 or 11 bits. Pieces of K must not end where the halves do, or nothing is left.
    """
    # Large, so that roundings of fp32 are numbers of fp16.
    weight, x = random_weight(scheme, shape), 1024 * drawn(rows, shape[1], dtype=dtype)
    unit = math.lcm(weight.group_size, 256 if weight.layout.scales in ("int8", "six_bit") else 32)
    half = shape[1] // unit // 2 * unit
    for tensor in (weight.codes, weight.high, weight.scales, weight.offsets, weight.zeros, weight.group_scales):
        if tensor is not None:
            places = tensor.shape[1] * half // shape[1]
            tensor[:, places : 2 * places] = tensor[:, :places]
    if weight.scale_scales is not None:  # of 256 groups, which are no half of a row
        weight.scale_scales.fill_(weight.scale_scales[0])
    x[:, half : 2 * half] = -x[:, :half]
    x[:, 2 * half :] = 0
    return weight, x


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
