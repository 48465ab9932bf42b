"""Quantised products by the compiled kernels of csrc/linear, plain and fused: up to 16 rows, every scheme. Rows by token id.

x is (M, K) with a dense last dim, M may be 0, and shapes and dtypes have been checked before; `refuses` has said that the
weight is one of those that the kernels read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends
from gemma4_kernels.backends import Call
from gemma4_kernels.cuda_common import support
from gemma4_kernels.cuda_common.arguments import address, run, stream_of
from gemma4_kernels.linear import cuda_table
from gemma4_kernels.linear.schemes import SCHEMES
from gemma4_kernels.linear.weight import QuantizedWeight

# gemma4_values and gemma4_scales, by what a layout calls them.
_VALUES = {"centred": 0, "zeros": 1, "offsets": 2, "table": 3}
_SCALES = {"plain": 0, "six_bit": 1, "int8": 2, "e8m0": 3, "nested": 4}
_ALIGNMENT = 16  # bytes: the copies of a kernel

# (scheme, reason): what the kernels read.
SERVED = {
    "Q4_0": "4-bit codes around 8, a scale for 32 columns",
    "W4A16": "the same with groups of any multiple of 32",
    "W4A16_ASYM": "zero points leave the code in the same addition that takes its base away",
    "GPTQ": "as W4A16_ASYM; columns in another order are gathered from x first",
    "AWQ": "as W4A16_ASYM",
    "Q4_1": "offsets are multiplied with sums of x, which the warps of a block make for each other",
    "MLX": "as Q4_1, with groups of 32, 64 or 128",
    "Q4_K": "as Q4_1; six-bit scales become fp32 on their way to shared memory",
    "NF4": "a table of 16 numbers in registers, looked up four codes at a time",
    "FP4": "as NF4",
    "IQ4_NL": "as NF4",
    "IQ4_XS": "as NF4; scales as in Q4_K",
    "MXFP4": "as NF4; scales are powers of two",
    "NF4_NESTED": "as NF4; the bytes of scales become fp32 on their way to shared memory",
    "FP4_NESTED": "as NF4_NESTED",
    "Q5_0": "as Q4_0; fifth bits are a word for 32 columns, in shared memory beside their scale",
    "Q5_1": "as Q5_0, with the offsets of Q4_1",
    "Q5_K": "as Q5_1, with the scales of Q4_K",
    "Q6_K": "upper bits as in Q5_0, for 16 columns; lanes deal out the codes so that a product takes one group",
    "Q8_0": "half the columns at a time; all 8 bits are exact in bf16",
}
MOST_ROWS = cuda_table.MOST_ROWS


def refuses(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if reason := support.refuses(call):
        return reason
    if call.scheme is None:  # `info` asks for no weight in particular
        return None
    if call.scheme not in SERVED:
        return f"reads {', '.join(SERVED)}, not {call.scheme}"
    if call.group_size % 32 and not SCHEMES[call.scheme].group_sizes:
        return f"takes groups of a multiple of 32 columns, the weight has {call.group_size}"
    # Without sizes it is a question about all calls of a class.
    M, N, K = call.sizes or (MOST_ROWS + call.shape_class.startswith("prefill"), 0, 0)
    choice = cuda_table.choice(M, _outputs(call.op, N), K, call.multiprocessors, call.architecture)
    return None if choice.compiled else choice.reason


def describe_choice(call: Call) -> str:
    """What the table says of a call that it gives to the kernels, for `explain`."""
    assert call.scheme is not None
    M, N, K = call.sizes
    place = (_outputs(call.op, N), K, call.multiprocessors, call.architecture)
    schedule = cuda_table.schedule(*place, bits=SCHEMES[call.scheme].bits)
    return f"{cuda_table.choice(M, *place).reason}; {schedule}"


def _outputs(op: str, N: int) -> int:
    """What the table counts: a block of GeGLU owns 32 outputs of each weight, so to the card it is a product of both."""
    return 2 * N if op == "quantized_geglu" else N


def _pieces(op: str, weight: QuantizedWeight, device: torch.device) -> int:
    """Of K, without a look at x. An argmax has those of the product, or its logits would have other bits."""
    N, K = weight.shape
    return cuda_table.pieces(_outputs(op, N), K, support.multiprocessors(device), backends.architecture_of(device))


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x @ W.T (+ bias) (+ residual): (M, N) in x's dtype."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    x = _operand(x, weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _with_rows_apart(residual)
    weight = _aligned(weight)
    _call(
        "linear", "LinearArguments", x, weight=_fields(weight, x.device),
        pieces=_pieces("quantized_linear", weight, x.device), out=out.data_ptr(), out_stride=out.shape[1],
        bias=address(bias), bias_dtype=0 if bias is None else support.DTYPE_CODES[bias.dtype],
        residual=address(residual), residual_stride=out.shape[1] if residual is None else _step(residual),
    )  # fmt: skip
    return out


def quantized_geglu(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> Tensor:
    """gelu(x @ gate.T) * (x @ up.T), GeLU by its tanh approximation: (M, N) in x's dtype."""
    out = x.new_empty((x.shape[0], gate.shape[0]))
    x = _operand(x, gate)
    gate, up = _aligned(gate), _aligned(up)
    _call(
        "linear_geglu", "LinearGegluArguments", x, gate=_fields(gate, x.device),
        up=_fields(up, x.device), pieces=_pieces("quantized_geglu", gate, x.device),
        out=out.data_ptr(), out_stride=out.shape[1],
    )  # fmt: skip
    return out


def quantized_argmax(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The lowest index of each row's largest output, of those that `quantized_linear` gives: (M,) int64; -1 for a NaN."""
    out = x.new_empty((x.shape[0],), dtype=torch.int64)
    x = _operand(x, weight)
    weight = _aligned(weight)
    _call(
        "linear_argmax", "LinearArgmaxArguments", x, weight=_fields(weight, x.device),
        pieces=_pieces("quantized_argmax", weight, x.device), indices=out.data_ptr(),
    )  # fmt: skip
    return out


def quantized_embedding(ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The rows of the weight that ids (T,) name: (T, K) in dtype. NaN for an id that is no row."""
    out = weight.codes.new_empty((ids.shape[0], weight.shape[1]), dtype=dtype)
    ids, weight = ids.contiguous(), _aligned(weight)
    module = support.module_for(ids.device)
    arguments = module.EmbeddingArguments(
        weight=_fields(weight, ids.device), ids=ids.data_ptr(), ids_are_64_bit=ids.dtype == torch.int64, m=ids.shape[0],
        columns=address(weight.columns), out=out.data_ptr(), out_stride=out.shape[1],
        dtype=support.DTYPE_CODES[dtype],
    )  # fmt: skip
    with stream_of(ids.device) as stream:
        module.embedding(arguments, stream)
    return out


def _call(name: str, arguments_class: str, x: Tensor, **rest: Any) -> None:
    """Run a function of the C interface on x (M, K), and on whatever tensors the caller keeps alive."""
    module = support.module_for(x.device)
    arguments = getattr(module, arguments_class)(
        x=x.data_ptr(), x_stride=_step(x), m=x.shape[0], dtype=support.DTYPE_CODES[x.dtype], **rest
    )
    run(getattr(module, name), getattr(module, f"{name}_workspace"), arguments, x.device)


def _fields(weight: QuantizedWeight, device: torch.device) -> Any:
    """A weight as the C interface takes it."""
    (N, K), layout = weight.shape, SCHEMES[weight.scheme]
    return support.module_for(device).Weight(
        n=N, k=K, group_size=weight.group_size, codes=weight.codes.data_ptr(), high=address(weight.high),
        scales=weight.scales.data_ptr(),
        scale_dtype=support.DTYPE_CODES.get(weight.scales.dtype, 0), zeros=address(weight.zeros),
        offsets=address(weight.offsets), group_scales=address(weight.group_scales), table=address(weight.table),
        scale_table=address(weight.scale_table), scale_scales=address(weight.scale_scales),
        scale_offset=address(weight.scale_offset), bits=layout.bits,
        values=_VALUES[layout.values], scale_kind=_SCALES[layout.scales], zero=layout.zero,
    )  # fmt: skip


def _operand(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x with its columns in the order of the stored ones, and rows that begin at multiples of 16 bytes."""
    return _aligned_rows(x if weight.columns is None else x.index_select(1, weight.columns))


def _step(rows: Tensor) -> int:
    """Elements from row to row; PyTorch gives a single row any stride."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _with_rows_apart(rows: Tensor) -> Tensor:
    """Itself, unless its rows overlap, as those of an expanded tensor do."""
    return rows if _step(rows) >= rows.shape[1] else rows.contiguous()


def _aligned_rows(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes; itself wherever they do, as in any tensor of its own."""
    step = x.stride(0) * x.element_size()
    apart = x.shape[0] <= 1 or (step % _ALIGNMENT == 0 and x.stride(0) >= x.shape[1])
    return x if apart and x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def _aligned(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight that lies in a mapped file on the CPU may begin anywhere; on a GPU it never does."""
    if all(plane is None or plane.data_ptr() % _ALIGNMENT == 0 for plane in (weight.codes, weight.high)):
        return weight
    return replace(weight, codes=weight.codes.clone(), high=None if weight.high is None else weight.high.clone())
