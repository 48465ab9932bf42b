"""GPTQ (AutoGPTQ, GPTQModel) with 4 bits.

Codes are packed along K and stand in (K/8, N), zero points along N in (G, N/8), both from the lowest bits of a word.
W = (q - zero) * scale. A file of the first format ("gptq") holds zero - 1, one of the second ("gptq_v2") the zero itself. With
act-order, g_idx names the group of each column; columns are then stored in the order of their groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import ShapeError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.formats import groups
from gemma4_kernels.linear.schemes import ANY, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_gptq"
FORMATS = ("gptq", "gptq_v2")


def read(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, checkpoint_format: str) -> Parts:
    """See `QuantizedWeight.from_gptq`."""
    if checkpoint_format not in FORMATS:
        raise ValueError(
            f"{FUNCTION}: checkpoint_format must be one of {', '.join(FORMATS)}, got {checkpoint_format!r}"
        )
    checks.has_shape(FUNCTION, "qweight", qweight, ("K/8", "N"))
    checks.has_dtype(FUNCTION, "qweight", qweight, (torch.int32,))
    K, N = 8 * qweight.shape[0], qweight.shape[1]
    checks.has_shape(FUNCTION, "scales", scales, ("G", N))
    checks.has_dtype(FUNCTION, "scales", scales, ANY)
    num_groups = scales.shape[0]
    if num_groups == 0 or K % num_groups:
        raise ShapeError(f"{FUNCTION}: scales has {num_groups} groups, which do not divide K = {K}")
    group_size = K // num_groups
    check_sizes(FUNCTION, "GPTQ", (N, K), group_size)
    if N % 8:
        raise ShapeError(f"{FUNCTION}: qweight must have a multiple of 8 columns, got {N}")
    checks.has_shape(FUNCTION, "qzeros", qzeros, (num_groups, N // 8))
    checks.has_dtype(FUNCTION, "qzeros", qzeros, (torch.int32,))
    checks.same_device(FUNCTION, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)
    columns = groups.grouped_columns(FUNCTION, "g_idx", g_idx, K, group_size)

    def convert(first: int, last: int) -> dict[str, Tensor]:
        codes = groups.nibbles_in_order(qweight[:, first:last].T)
        return planes.split(codes if columns is None else codes[:, columns.long()], 4)

    zeros = groups.nibbles_in_order(qzeros).T  # (N, G)
    if checkpoint_format == "gptq":
        zeros = zeros + 1  # up to 16, which is why zero points have a byte
    tensors = {**planes.by_rows(N, 4 * K, convert), "scales": scales.T, "zeros": zeros}
    if columns is not None:
        tensors["columns"] = columns
    return Parts("GPTQ", (N, K), group_size, tensors)
