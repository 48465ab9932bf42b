"""The public functions on quantised weights: documented, checked, the same on every backend.

Each function checks its arguments and turns them into those of the op of its name (`ops.SCHEMAS`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call
from gemma4_kernels.linear import cuda, eager_int4, ops
from gemma4_kernels.linear.weight import QuantizedWeight


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    """x @ W.T + bias + residual, from the codes of W: what `torch.nn.functional.linear` gives for the weight's own values.

    Sums are fp32, rounded once. (On a CPU, PyTorch's 4-bit kernel may take fp16 scales as two products, each rounded to
    bf16: `explain` names it.) The bits of a row do not depend on the other rows of x where there are at most 16 in all.

    Args:
        x: (..., K) bf16, fp16 or fp32, with a dense last dim.
        weight: N x K, on x's device.
        bias: (N,) bf16, fp16 or fp32, added before the result is rounded.
        residual: (..., N) in x's dtype, with a dense last dim; added last, before the result is rounded (of more than 16 rows,
            where PyTorch multiplies, after a rounding of its own).
    Returns: (..., N) in x's dtype, contiguous. No gradient flows through it.
    Raises: ShapeError, StrideError, DeviceError, DTypeError, TypeError before anything runs; BackendError where the backend
        asked for by name cannot do it.
    """
    name = "quantized_linear"
    _check(name, x, weight=weight)
    if bias is not None:
        checks.has_shape(name, "bias", bias, (weight.shape[0],))
        checks.has_dtype(name, "bias", bias, ops.DTYPES)
        checks.same_device(name, x=x, bias=bias)
    if residual is not None:
        checks.has_shape(name, "residual", residual, (*x.shape[:-1], weight.shape[0]))
        checks.has_dtype(name, "residual", residual, (x.dtype,))
        checks.is_dense(name, "residual", residual)
        checks.same_device(name, x=x, residual=residual)
        residual = _rows(residual)
    out = torch.ops.gemma4_kernels.quantized_linear(_rows(x), *ops.weight_arguments(weight), bias, residual)
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def quantized_geglu(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> Tensor:
    """gelu(x @ gate.T) * (x @ up.T): the first half of Gemma's feed-forward layer, in one pass over both weights.

    gelu is the one with tanh, 0.5 * a * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a^3))) (PyTorch's "gelu_pytorch_tanh"). The
    bits of a row do not depend on the other rows of x where there are at most 16 in all.

    Args:
        x: (..., K) bf16, fp16 or fp32, with a dense last dim.
        gate, up: N x K, on x's device. Weights of different schemes are taken one after the other.
    Returns: (..., N) in x's dtype, contiguous. No gradient flows through it.
    Raises: as `quantized_linear`.
    """
    name = "quantized_geglu"
    _check(name, x, gate=gate, up=up)
    if up.shape != gate.shape:
        raise checks.ShapeError(f"{name}: up must have shape {gate.shape} like gate, got {up.shape}")
    out = torch.ops.gemma4_kernels.quantized_geglu(_rows(x), *ops.weight_arguments(gate), *ops.weight_arguments(up))
    return out.view(*x.shape[:-1], gate.shape[0])  # type: ignore[no-any-return]


def quantized_argmax(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The output that is largest: quantized_linear(x, weight).argmax(-1), with no logits written where a kernel fuses it.

    For greedy drafts, whose logits nobody else needs. Logits are rounded to x's dtype first, and the lowest of equals is taken.
    A softcap changes no order, so it is left out. Of more than 16 rows the logits may be summed in another order than those
    of `quantized_linear`, and two that are equal but for rounding may change places.

    Args:
        x: (..., K) bf16, fp16 or fp32, with a dense last dim. For at most 16 rows in all, the choice of a row does not
            depend on the others.
        weight: N x K, on x's device: the head.
    Returns: (...) int64; -1 for a row with a logit that is NaN.
    Raises: as `quantized_linear`.
    """
    _check("quantized_argmax", x, weight=weight)
    out = torch.ops.gemma4_kernels.quantized_argmax(_rows(x), *ops.weight_arguments(weight))
    return out.view(x.shape[:-1])  # type: ignore[no-any-return]


def quantized_embedding(token_ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of a quantised embedding: weight.dequantize(dtype)[token_ids], bit for bit, without the other rows.

    Args:
        token_ids: (...) int32 or int64, each in 0 .. N - 1.
        weight: N x K, on the ids' device.
        dtype: bf16, fp16 or fp32.
    Returns: (..., K) in dtype, contiguous. (Gemma multiplies it by sqrt(K); that is the caller's.)
    Raises: TypeError, DTypeError, DeviceError; ValueError for ids out of range on a CPU. On other devices nobody looks at
        them before the launch: an id out of range gives a row of NaN.
    """
    name = "quantized_embedding"
    checks.has_dtype(name, "token_ids", token_ids, checks.INTEGERS)
    _check_weight(name, "weight", weight, token_ids)
    if dtype not in ops.DTYPES:
        raise checks.DTypeError(f"{name}: dtype must be bfloat16, float16 or float32, got {dtype}")
    ids = token_ids.reshape(-1)
    out = torch.ops.gemma4_kernels.quantized_embedding(ids, *ops.weight_arguments(weight), dtype)
    return out.view(*token_ids.shape, weight.shape[1])  # type: ignore[no-any-return]


# Checks -------------------------------------------------------------------------------------------------------------


def _check(name: str, x: Tensor, **weights: QuantizedWeight) -> None:
    checks.has_dtype(name, "x", x, ops.DTYPES)
    for argument, weight in weights.items():
        _check_weight(name, argument, weight, x)
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise checks.ShapeError(
                f"{name}: x must have shape (..., {weight.shape[1]}) for {argument} {weight.shape}, got {tuple(x.shape)}"
            )
    checks.is_dense(name, "x", x)


def _check_weight(name: str, argument: str, weight: object, other: Tensor) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name}: {argument} must be a QuantizedWeight, got {type(weight).__name__}")
    if weight.device != other.device:
        raise checks.DeviceError(f"{name}: {argument} must be on {other.device}, got {weight.device}; call .to(device)")


def _rows(x: Tensor) -> Tensor:
    """(M, K); a view wherever the leading dims allow it."""
    return x.reshape(-1, x.shape[-1])


# What `explain` says ------------------------------------------------------------------------------------------------


def _describe_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Call:
    return _describe("quantized_linear", x, bias is not None or residual is not None, weight=weight)


def _describe_geglu(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> Call:
    return _describe("quantized_geglu", x, False, gate=gate, up=up)


def _describe_argmax(x: Tensor, weight: QuantizedWeight) -> Call:
    return _describe("quantized_argmax", x, False, weight=weight)


def _describe_embedding(token_ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> Call:
    _check_weight("quantized_embedding", "weight", weight, token_ids)
    return ops.describe("quantized_embedding", token_ids, weight, dtype=dtype)


def _describe(op: str, x: Tensor, has_addend: bool, **weights: QuantizedWeight) -> Call:
    _check(op, x, **weights)
    rows, (weight, *_) = _rows(x), weights.values()
    refusals: list[Any] = [eager_int4.refusal(rows, each, has_addend) for each in weights.values()]
    reason = next((refusal for refusal in refusals if refusal is not None), None)
    how = "PyTorch's own 4-bit kernel, on a packed copy" if reason is None else "weights made a few rows at a time"
    because = "" if reason is None or x.device.type != "cpu" else f" (PyTorch's own 4-bit kernel {reason})"
    call = ops.describe(op, rows, weight, up=weights.get("up")).noting("eager", how + because)
    return call.noting("cuda", cuda.describe_choice(call))


backends.register_describer("quantized_linear", "quantized_linear", _describe_linear)
backends.register_describer("quantized_geglu", "quantized_geglu", _describe_geglu)
backends.register_describer("quantized_argmax", "quantized_argmax", _describe_argmax)
backends.register_describer("quantized_embedding", "quantized_embedding", _describe_embedding)
