"""compressed-tensors, "pack-quantized" with 4 bits: Google's own w4a16 files, llm-compressor's, vLLM's.

Codes are packed along K, element i of a row at bits 4 * (i % 8) of word i / 8, and stored as q + 8. Zero points are packed
the same way along N. W = (q - zero) * scale; the zero is 8 where the file is symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import ShapeError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.formats import groups
from gemma4_kernels.linear.schemes import ANY, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_compressed_tensors"


def read(
    weight_packed: Tensor, weight_scale: Tensor, weight_shape: Tensor | tuple[int, int], group_size: int | None,
    weight_zero_point: Tensor | None, weight_g_idx: Tensor | None,
) -> Parts:  # fmt: skip
    """See `QuantizedWeight.from_compressed_tensors`."""
    shape = _shape(weight_shape)
    N, K = shape
    if group_size is None or group_size == -1:
        group_size = K
    group_size = checks.whole_number(FUNCTION, "group_size", group_size, minimum=1)
    scheme = "W4A16" if weight_zero_point is None else "W4A16_ASYM"
    check_sizes(FUNCTION, scheme, shape, group_size)
    checks.has_shape(FUNCTION, "weight_packed", weight_packed, (N, K // 8))
    checks.has_dtype(FUNCTION, "weight_packed", weight_packed, (torch.int32,))
    checks.has_shape(FUNCTION, "weight_scale", weight_scale, (N, K // group_size))
    checks.has_dtype(FUNCTION, "weight_scale", weight_scale, ANY)
    if weight_zero_point is not None:
        checks.has_shape(FUNCTION, "weight_zero_point", weight_zero_point, (-(-N // 8), K // group_size))
        checks.has_dtype(FUNCTION, "weight_zero_point", weight_zero_point, (torch.int32,))
    checks.same_device(
        FUNCTION, weight_packed=weight_packed, weight_scale=weight_scale, weight_zero_point=weight_zero_point,
        weight_g_idx=weight_g_idx,
    )  # fmt: skip
    columns = groups.grouped_columns(FUNCTION, "weight_g_idx", weight_g_idx, K, group_size)

    def convert(first: int, last: int) -> dict[str, Tensor]:
        codes = groups.nibbles_in_order(weight_packed[first:last])
        return planes.split(codes if columns is None else codes[:, columns.long()], 4)

    tensors = {**planes.by_rows(N, 4 * K, convert), "scales": weight_scale}
    if weight_zero_point is not None:
        tensors["zeros"] = groups.nibbles_in_order(weight_zero_point.T)[:, :N].T
    if columns is not None:
        tensors["columns"] = columns
    return Parts(scheme, shape, group_size, tensors)


def _shape(weight_shape: Tensor | tuple[int, int]) -> tuple[int, int]:
    if isinstance(weight_shape, Tensor):
        checks.has_dtype(FUNCTION, "weight_shape", weight_shape, checks.INTEGERS)
        sizes = weight_shape.flatten().tolist() if weight_shape.numel() <= 8 else []
    else:
        sizes = [checks.whole_number(FUNCTION, "weight_shape", size) for size in weight_shape]
    if len(sizes) != 2:
        raise ShapeError(f"{FUNCTION}: weight_shape must hold two sizes (N, K), got {weight_shape}")
    return sizes[0], sizes[1]
