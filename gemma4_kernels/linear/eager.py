"""Quantised linear layers in plain PyTorch: any device, exact weights, no whole dequantised matrix.

The rows of a weight are made a few at a time, in fp32, and used at once. Up to DECODE_ROWS rows of x are multiplied one by
one: then the bits of a row cannot depend on the others. Products and sums are fp32 there; beyond, they are what PyTorch does
with weights in the dtype that is fastest on the device.

Each function here serves the op of its name; x is (M, K), and its leading dims are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import gelu

from gemma4_kernels.linear import eager_int4
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.op_support import DECODE_ROWS

_DECODE_BYTES = 1 << 21  # of fp32 weights at a time: they are read again, from the cache, for every row of x
_PREFILL_BYTES = 1 << 23  # enough outputs at a time for PyTorch's product to be as fast as it gets
_ARGMAX_ROWS = 128  # rows of x whose logits exist at a time


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    if eager_int4.refusal(x, weight, bias is not None or residual is not None) is None:
        return eager_int4.product(_in_stored_order(x, weight), weight)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    for rows, sums in _products(x, weight):
        if bias is not None:
            sums = sums + bias[rows].to(sums.dtype)
        out[:, rows] = sums if residual is None else sums + residual[:, rows].to(sums.dtype)
    return out


def quantized_geglu(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> Tensor:
    if eager_int4.refusal(x, gate) is None and eager_int4.refusal(x, up) is None:
        gated, passed = quantized_linear(x, gate, None), quantized_linear(x, up, None)
        return _geglu(gated, passed)
    out = x.new_empty((x.shape[0], gate.shape[0]))
    # The slices of both are the same: they follow from the shape.
    for (rows, gated), (_, passed) in zip(_products(x, gate), _products(x, up), strict=True):
        out[:, rows] = _geglu(gated, passed)
    return out


def quantized_argmax(x: Tensor, weight: QuantizedWeight) -> Tensor:
    found = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for first in range(0, x.shape[0], _ARGMAX_ROWS):
        logits = quantized_linear(x[first : first + _ARGMAX_ROWS], weight, None)
        highest = logits.argmax(dim=1)
        # argmax takes NaN for the largest, so that is where one would be.
        is_nan = logits.gather(1, highest[:, None]).isnan()[:, 0]
        found[first : first + _ARGMAX_ROWS] = torch.where(is_nan, -1, highest)
    return found


def quantized_embedding(token_ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    N, _ = weight.shape
    ids = token_ids.long()
    exists = (ids >= 0) & (ids < N)  # looked at by the caller on a CPU only; elsewhere others become NaN
    rows = weight.rows(ids.clamp(0, N - 1)).to(dtype)
    return torch.where(exists[:, None], rows, float("nan"))


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    """(M, rows) in fp32, rounded once, to their own dtype."""
    if gate.shape[0] > DECODE_ROWS:
        return (gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)
    # The last elements of a tensor go through other code than the first: row by row each keeps its place.
    out = torch.empty_like(gate)
    for gated, passed, into in zip(gate.float(), up.float(), out, strict=True):
        into.copy_(gelu(gated, approximate="tanh") * passed)
    return out


def _in_stored_order(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return x if weight.columns is None else x.index_select(1, weight.columns)


def _products(x: Tensor, weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the weight, x times these (M, rows)), one slice after the other."""
    N, K = weight.shape
    decoding = x.shape[0] <= DECODE_ROWS
    step = max(1, (_DECODE_BYTES if decoding else _PREFILL_BYTES) // (4 * K))
    dtype = torch.float32 if decoding else _product_dtype(x)
    x = x.to(dtype)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        weights = weight.rows(rows).to(dtype)  # (rows, K)
        if decoding:
            sums = x.new_empty((x.shape[0], weights.shape[0]))
            for row, into in zip(x, sums, strict=True):
                torch.mv(weights, row, out=into)
        else:
            sums = x @ weights.T
        yield rows, sums


def _product_dtype(x: Tensor) -> torch.dtype:
    """CPUs without instructions for 16-bit numbers multiply fp32 several times faster, and more exactly."""
    if x.device.type == "cpu" and x.dtype != torch.float64 and not _multiplies_bf16():
        return torch.float32
    return x.dtype


def _multiplies_bf16() -> bool:
    # Both exist since PyTorch 2.4 or so, and nothing public tells the same.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
