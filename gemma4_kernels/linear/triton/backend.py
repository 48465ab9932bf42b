"""`quantized_linear` on Triton."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from gemma4_kernels.attention.triton.launch import INTERPRETED
from gemma4_kernels.linear.triton import linear, tables
from gemma4_kernels.linear.weight import QuantizedWeight

_INTERPRETED_MULTIPROCESSORS = 28


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x (M, K) with a dense last dim -> (M, N) in x's dtype."""
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if x.shape[0] >= tables.DEQUANTIZE_FROM_ROWS:
        dense = x.new_empty(weight.shape)
        linear.plan_dequantize(weight, dense).run()
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    for launch in linear.plan(x, weight, bias, out, _multiprocessors(x.device)):
        launch.run()
    return out
