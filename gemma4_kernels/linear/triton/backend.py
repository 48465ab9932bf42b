"""`quantized_linear` on Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels.linear.triton import linear, tables
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.triton_common.devices import card_of


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x (M, K) with a dense last dim -> (M, N) in x's dtype."""
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if x.shape[0] >= tables.DEQUANTIZE_FROM_ROWS:
        dense = x.new_empty(weight.shape)
        linear.plan_dequantize(weight, dense).run()
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    for launch in linear.plan(x, weight, bias, out, card_of(x.device).multiprocessors):
        launch.run()
    return out
