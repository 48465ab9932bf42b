"""AWQ (AutoAWQ, version "gemm") with 4 bits.

Codes stand in (K, N/8) and zero points in (G, N/8), both packed along N: nibble i of word c is column 8c + ORDER[i].
W = (q - zero) * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import ShapeError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.formats import groups
from gemma4_kernels.linear.schemes import ANY, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Parts:
    """See `QuantizedWeight.from_awq`."""
    checks.has_shape(FUNCTION, "qweight", qweight, ("K", "N/8"))
    checks.has_dtype(FUNCTION, "qweight", qweight, (torch.int32,))
    K, N = qweight.shape[0], 8 * qweight.shape[1]
    checks.has_shape(FUNCTION, "scales", scales, ("G", N))
    checks.has_dtype(FUNCTION, "scales", scales, ANY)
    num_groups = scales.shape[0]
    if num_groups == 0 or K % num_groups:
        raise ShapeError(f"{FUNCTION}: scales has {num_groups} groups, which do not divide K = {K}")
    check_sizes(FUNCTION, "AWQ", (N, K), K // num_groups)
    checks.has_shape(FUNCTION, "qzeros", qzeros, (num_groups, N // 8))
    checks.has_dtype(FUNCTION, "qzeros", qzeros, (torch.int32,))
    checks.same_device(FUNCTION, qweight=qweight, qzeros=qzeros, scales=scales)

    def convert(first: int, last: int) -> dict[str, Tensor]:
        """Eight rows of W for each column of words."""
        return {"codes": planes.pack(_rows(qweight[:, first:last]), 4).view(last - first, 8, K // 8)}

    codes = planes.by_rows(N // 8, 32 * K, convert)["codes"].flatten(0, 1)
    tensors = {"codes": codes, "scales": scales.T, "zeros": _rows(qzeros)}
    return Parts("AWQ", (N, K), K // num_groups, tensors)


def _rows(words: Tensor) -> Tensor:
    """int32 (R, W) as uint8 (8 * W, R): rows of W, in their own order."""
    R = words.shape[0]
    nibbles = groups.nibbles_in_order(words).view(R, -1, 8)
    position = torch.tensor([ORDER.index(column) for column in range(8)], device=words.device)
    return nibbles[:, :, position].flatten(1).T
