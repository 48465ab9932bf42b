"""Quantised products on Triton: plain, as the two halves of a GeGLU, as the argmax of a head; and rows by token id.

Every x is (M, K) with a dense last dim, M may be 0, and shapes and dtypes have been checked before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.linear.triton import argmax, embedding, geglu, linear, tables
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.triton_common.devices import card_of


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x @ W.T (+ bias) (+ residual): (M, N) in x's dtype."""
    return _product(x, weight, bias, x.dtype, residual)


def quantized_geglu(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> Tensor:
    """gelu(x @ gate.T) * (x @ up.T), GeLU by its tanh approximation: (M, N) in x's dtype."""
    out = x.new_empty((x.shape[0], gate.shape[0]))
    if not (_written_out(x, gate) or _written_out(x, up)):
        launches = geglu.plan(_stored_order(x, gate), gate, up, out, _multiprocessors(x))
        if launches is not None:
            for launch in launches:
                launch.run()
            return out
        dtype = torch.float32
    else:  # the library rounds each product to x's dtype
        dtype = x.dtype
    geglu.plan_combine(_product(x, gate, None, dtype), _product(x, up, None, dtype), out).run()
    return out


def quantized_argmax(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The lowest index of each row's largest logit of x @ W.T, rounded to x's dtype: (M,) int64; -1 for a row with a NaN.

    Never through the weight written out, which for a head of 262144 outputs takes 2 GB: a row's answer is that of
    `linear`'s tiles, whatever the number of rows.
    """
    out = x.new_empty((x.shape[0],), dtype=torch.int64)
    x = _stored_order(x, weight)
    for part, result in zip(x.split(tables.ARGMAX_ROWS), out.split(tables.ARGMAX_ROWS), strict=True):
        launches = argmax.plan(part, weight, result, _multiprocessors(x))
        if launches is None:
            logits = x.new_empty((part.shape[0], weight.shape[0]))
            for launch in linear.plan(part, weight, None, logits, _multiprocessors(x)):
                launch.run()
            result.copy_(torch.where(logits.isnan().any(-1), -1, logits.argmax(-1)))
            continue
        for launch in launches:
            launch.run()
    return out


def quantized_embedding(ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The rows of the weight that ids (T,) name: (T, K) in dtype. NaN for an id that is no row."""
    out = weight.codes.new_empty((ids.shape[0], weight.shape[1]), dtype=dtype)
    embedding.plan(ids.contiguous(), weight, out).run()
    return out


def _product(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    """x @ W.T (+ bias) (+ residual), rounded to x's dtype or not at all: dtype is x's or, where the weight is not written
    out, fp32. Where it is, the library rounds before the residual is added."""
    written_out = _written_out(x, weight)
    x = _stored_order(x, weight)
    bias = None if bias is None else bias.contiguous()  # a kernel steps over it one by one
    if written_out:
        dense = x.new_empty(weight.shape)
        linear.plan_dequantize(weight, dense).run()
        product = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return product if residual is None else product.add_(residual)
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    for launch in linear.plan(x, weight, bias, out, _multiprocessors(x), residual):
        launch.run()
    return out


def _written_out(x: Tensor, weight: QuantizedWeight) -> bool:
    return x.shape[0] >= tables.dequantize_from_rows(*weight.shape, _multiprocessors(x))


def _stored_order(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return x if weight.columns is None else x.index_select(1, weight.columns)


def _multiprocessors(x: Tensor) -> int:
    return card_of(x.device).multiprocessors
