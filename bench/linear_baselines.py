"""Other ways to the result of a quantised linear layer: what the same call costs without this package's kernels.

    dense         torch.nn.functional.linear with the weight in the case's dtype, made before the clock starts
    dequantize    the weight written out in the case's dtype in every call, then the same
    torch_int4    PyTorch's own 4-bit product, where its scales hold the weight; on CUDA they are bf16
    gemlite       GemLiteLinearTriton, where installed, on CUDA
    bitsandbytes  NF4 in blocks of 64, where installed, on CUDA: other values from as many bits, so it is outside the rule

Each gives `out`. Where there is none the reason is a sentence. Those for CUDA follow PyTorch's int4mm.cu, gemlite 0.6's
core.py and the documentation of bitsandbytes.functional, and have not run yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemma4_kernels.linear import eager_int4
from gemma4_kernels.linear.weight import QuantizedWeight

Baseline = Callable[[], Tensor]

NAMES = ("dense", "dequantize", "torch_int4", "gemlite", "bitsandbytes")
MAX_DENSE_BYTES = 1 << 32
_INNER_K_TILES = 8  # of PyTorch's layout for CUDA: K must be a multiple of 16 times that
_BITSANDBYTES_BLOCK = 64


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
        "gemlite": _gemlite(x, weight, bias),
        "bitsandbytes": _bitsandbytes(x, dense, bias),
    }


def _torch_int4(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Baseline | str:
    if weight.columns is not None:
        return "it has no order of columns"
    if x.device.type == "cuda":
        return _torch_int4_on_cuda(x, weight, bias)
    reason = eager_int4.refusal(x, weight, bias is not None)
    return f"it {reason}" if reason is not None else lambda: eager_int4.product(x, weight)


def _torch_int4_on_cuda(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Baseline | str:
    (N, K), group = weight.shape, weight.group_size
    if reason := _not_centred(weight):
        return reason
    if x.dtype != torch.bfloat16 or bias is not None or group not in eager_int4.GROUPS or N % 8 or K % 128:
        return "its kernel takes bf16, no bias, groups of 32 to 256, and multiples of 8 outputs and 128 columns"
    codes = weight.unpacked_codes()  # (N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_K_TILES)
    scales = weight.group_scale().T.bfloat16()  # (G, N): fp16 scales lose three bits here
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=2).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)


def _gemlite(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Baseline | str:
    if x.device.type != "cuda":
        return "it runs on CUDA"
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed"
    if reason := _not_centred(weight):
        return reason
    core = importlib.import_module("gemlite.core")
    dtypes = {torch.bfloat16: core.DType.BF16, torch.float16: core.DType.FP16}
    if x.dtype not in dtypes or weight.columns is not None:
        return "it takes bf16 and fp16, and columns in order"
    layer = core.GemLiteLinearTriton(
        W_nbits=4, group_size=weight.group_size, in_features=weight.shape[1], out_features=weight.shape[0],
        input_dtype=dtypes[x.dtype], output_dtype=dtypes[x.dtype],
    )  # fmt: skip
    layer.pack(weight.unpacked_codes(), weight.group_scale().to(x.dtype), weight.layout.zero, bias)
    return lambda: layer(x)  # type: ignore[no-any-return]


def _bitsandbytes(x: Tensor, dense: Tensor, bias: Tensor | None) -> Baseline | str:
    if x.device.type != "cuda":
        return "it runs on CUDA"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    library = importlib.import_module("bitsandbytes")
    packed, state = library.functional.quantize_4bit(dense, blocksize=_BITSANDBYTES_BLOCK, quant_type="nf4")
    return lambda: library.matmul_4bit(x, packed.t(), state, bias=bias)  # type: ignore[no-any-return]


def _not_centred(weight: QuantizedWeight) -> str | None:
    if weight.layout.bits != 4 or weight.layout.values != "centred":
        return f"it has no values like those of {weight.scheme}"
    return None
