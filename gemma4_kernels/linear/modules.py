"""Modules on quantised weights, for models that were written with `torch.nn.Linear` and `torch.nn.Embedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_kernels import checks
from gemma4_kernels.linear import eager_int4, planes
from gemma4_kernels.linear.api import quantized_embedding, quantized_linear
from gemma4_kernels.linear.ops import DTYPES
from gemma4_kernels.linear.weight import TENSORS, QuantizedWeight

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


class QuantizedTensors(nn.Module):
    """A `QuantizedWeight` whose tensors are buffers: they move and are saved with a model, bit for bit.

    Modules that use one weight (a head tied to its embedding) share one of these, so that it stays one in memory.
    A change of a model's dtype leaves it as it is: its scales are no weights, and rounding them would change all weights.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.scheme, self.shape, self.group_size, self.name = (
            weight.scheme,
            weight.shape,
            weight.group_size,
            weight.name,
        )
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> QuantizedWeight:
        tensors = [getattr(self, name) for name in TENSORS]
        return QuantizedWeight.from_checked(self.scheme, self.shape, self.group_size, tensors, self.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedTensors:
        def of_bits(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            # As integers of the same bits: `fn` may move those, and has no dtype for them.
            moved = fn(tensor.view(_INTEGER_OF_SIZE[tensor.element_size()]))
            return moved.view(tensor.dtype)

        super()._apply(of_bits, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name in TENSORS:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is None or given is None:
                continue
            if given.dtype != own.dtype:  # copying would round it
                error_msgs.append(f"{prefix}{name} must be {own.dtype} as in {self.scheme}, got {given.dtype}")
                return
            state_dict[prefix + name] = planes.dense(given)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        eager_int4.forget(self.codes)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return repr(self.weight)


class QuantizedLinear(nn.Module):
    """`torch.nn.Linear` for a quantised weight: x @ W.T + bias, see `quantized_linear`.

    Args:
        weight: N x K; or the `QuantizedTensors` of another module, to share its weight.
        bias: (N,), or None.
    `weight` gives the QuantizedWeight, `in_features` and `out_features` are K and N. The state_dict holds the weight's
    tensors under "quantized.". It takes a state_dict of a weight of the same scheme, shape and group size.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight | QuantizedTensors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.quantized = _tensors_of("QuantizedLinear", weight)
        self.out_features, self.in_features = self.quantized.shape
        if bias is not None:
            checks.has_shape("QuantizedLinear", "bias", bias, (self.out_features,))
            checks.has_dtype("QuantizedLinear", "bias", bias, DTYPES)
            bias = bias.detach()
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> QuantizedWeight:
        return self.quantized.weight

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """`torch.nn.Embedding` for a quantised weight, see `quantized_embedding`.

    Args:
        weight: N x K; or the `QuantizedTensors` of another module, to share its weight.
        dtype: of the rows that it gives: bf16, fp16 or fp32. It follows the dtype of the model.
        embed_scale: what rows are multiplied with, in their dtype: sqrt(K) in Gemma.
    """

    _like: Tensor

    def __init__(
        self, weight: QuantizedWeight | QuantizedTensors, dtype: torch.dtype = torch.bfloat16, embed_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.quantized = _tensors_of("QuantizedEmbedding", weight)
        self.num_embeddings, self.embedding_dim = self.quantized.shape
        self.scalar_embed_scale = float(embed_scale)
        # The factor is rounded first, as transformers rounds it; a plain number is nothing to copy to a device.
        self._rounded = {dtype: float(torch.tensor(self.scalar_embed_scale, dtype=dtype)) for dtype in DTYPES}
        # Empty: a buffer, because a model's change of dtype reaches buffers.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=self.weight.device), persistent=False)

    @property
    def weight(self) -> QuantizedWeight:
        return self.quantized.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = quantized_embedding(token_ids, self.weight, self._like.dtype)
        return rows if self.scalar_embed_scale == 1.0 else rows * self._rounded[rows.dtype]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, embed_scale={self.scalar_embed_scale:g}"


def _tensors_of(name: str, weight: Any) -> QuantizedTensors:
    if isinstance(weight, QuantizedTensors):
        return weight
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name}: weight must be a QuantizedWeight, got {type(weight).__name__}")
    return QuantizedTensors(weight)
