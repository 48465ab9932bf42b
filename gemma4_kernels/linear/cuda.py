"""Quantised products by the compiled kernels of csrc/linear: up to 16 rows, 4-bit codes.

x is (M, K) with a dense last dim, M may be 0, and shapes and dtypes have been checked before; `refuses` has said that the
weight is one of those that the kernels read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import backends
from gemma4_kernels.backends import Call
from gemma4_kernels.cuda_common import support
from gemma4_kernels.linear import cuda_table
from gemma4_kernels.linear.schemes import SCHEMES
from gemma4_kernels.linear.weight import QuantizedWeight

# gemma4_values and gemma4_scales, by what a layout calls them.
_VALUES = {"centred": 0, "zeros": 1, "offsets": 2, "table": 3}
_SCALES = {"plain": 0, "six_bit": 1, "int8": 2, "e8m0": 3}
_ALIGNMENT = 16  # bytes: the copies of a kernel

# (scheme, reason): what the kernels read. Everything else is Triton's.
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
    if call.group_size % 32:
        return f"takes groups of a multiple of 32 columns, the weight has {call.group_size}"
    # Without sizes it is a question about all calls of a class.
    M, N, K = call.sizes or (MOST_ROWS + call.shape_class.startswith("prefill"), 0, 0)
    choice = cuda_table.choice(M, N, K, call.multiprocessors, call.architecture)
    return None if choice.compiled else choice.reason


def describe_choice(call: Call) -> str:
    """What the table says of a call that it gives to the kernels, for `explain`."""
    M, N, K = call.sizes
    place = (N, K, call.multiprocessors, call.architecture)
    return f"{cuda_table.choice(M, *place).reason}; {cuda_table.schedule(*place)}"


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x @ W.T (+ bias): (M, N) in x's dtype."""
    N, K = weight.shape
    out = x.new_empty((x.shape[0], N))
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    x = _aligned_rows(x)
    codes = _aligned(weight.codes)
    bias = None if bias is None else bias.contiguous()
    layout = SCHEMES[weight.scheme]
    module = support.module_for(x.device)
    arguments = module.LinearArguments(
        x=x.data_ptr(), x_stride=x.stride(0) if x.shape[0] > 1 else K, out=out.data_ptr(), out_stride=N, m=x.shape[0],
        dtype=support.DTYPE_CODES[x.dtype], bias=_address(bias),
        bias_dtype=0 if bias is None else support.DTYPE_CODES[bias.dtype], n=N, k=K, group_size=weight.group_size,
        codes=codes.data_ptr(), scales=weight.scales.data_ptr(), scale_dtype=support.DTYPE_CODES.get(weight.scales.dtype, 0),
        zeros=_address(weight.zeros), offsets=_address(weight.offsets), group_scales=_address(weight.group_scales),
        table=_address(weight.table),
        values=_VALUES[layout.values], scale_kind=_SCALES[layout.scales], zero=layout.zero,
        pieces=cuda_table.pieces(N, K, support.multiprocessors(x.device), backends.architecture_of(x.device)),
    )  # fmt: skip
    on_gpu = x.device.type == "cuda"
    with torch.cuda.device(x.device if on_gpu else -1):
        nbytes = module.linear_workspace(arguments)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream if on_gpu else 0
        module.linear(arguments, workspace.data_ptr(), nbytes, stream)
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned_rows(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes; itself wherever they do, as in any tensor of its own."""
    step = x.stride(0) * x.element_size()
    apart = x.shape[0] <= 1 or (step % _ALIGNMENT == 0 and x.stride(0) >= x.shape[1])
    return x if apart and x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: Tensor) -> Tensor:
    """A weight that lies in a mapped file on the CPU may begin anywhere; on a GPU it never does."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
