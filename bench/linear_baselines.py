"""Other ways to the result of a quantised linear layer: what the same call costs without this package's kernels.

    dense       torch.nn.functional.linear with the weight in the case's dtype, made before the clock starts
    dequantize  the weight written out in the case's dtype in every call, then the same
    torch_int4  PyTorch's own 4-bit product, where it can hold the weight exactly

Each gives `out`. Where there is none the reason is a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemma4_kernels.linear import eager_int4
from gemma4_kernels.linear.weight import QuantizedWeight

Baseline = Callable[[], Tensor]

NAMES = ("dense", "dequantize", "torch_int4")
MAX_DENSE_BYTES = 1 << 32


def linear(op: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Baseline | str]:
    """The baselines of one call: name -> ready to run, or why not.

    Args:
        op: name of the public function.
        arguments: its keyword arguments.
        dtype: in which others keep the weight.
    """
    if op != "quantized_linear":
        return dict.fromkeys(NAMES, "only quantized_linear is compared")
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    if weight.shape[0] * weight.shape[1] * dtype.itemsize > MAX_DENSE_BYTES:
        return dict.fromkeys(NAMES, f"a dense weight would be larger than {MAX_DENSE_BYTES >> 30} GiB")
    dense = weight.dequantize(dtype)
    return {
        "dense": lambda: functional.linear(x, dense, bias),
        "dequantize": lambda: functional.linear(x, weight.dequantize(dtype), bias),
        "torch_int4": _torch_int4(x, weight, bias),
    }


def _torch_int4(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Baseline | str:
    if x.device.type != "cpu":
        return "its layout for CUDA is not compared yet"
    reason = eager_int4.refusal(x, weight, bias is not None)
    if reason is not None:
        return f"it {reason}"
    if weight.columns is not None:
        return "it has no order of columns"
    return lambda: eager_int4.product(x, weight)
