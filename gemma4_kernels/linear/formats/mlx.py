"""MLX, affine with 4 bits: uint32 (N, K/8), the first of 8 codes in the lowest bits. W = scale * q + bias."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.formats import groups
from gemma4_kernels.linear.schemes import ANY, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_mlx"


def read(weight: Tensor, scales: Tensor, biases: Tensor, group_size: int) -> Parts:
    """See `QuantizedWeight.from_mlx`."""
    checks.has_shape(FUNCTION, "weight", weight, ("N", "K/8"))
    checks.has_dtype(FUNCTION, "weight", weight, (torch.uint32, torch.int32))
    N, K = weight.shape[0], 8 * weight.shape[1]
    group_size = checks.whole_number(FUNCTION, "group_size", group_size, minimum=1)
    check_sizes(FUNCTION, "MLX", (N, K), group_size)
    checks.has_shape(FUNCTION, "scales", scales, (N, K // group_size))
    checks.has_dtype(FUNCTION, "scales", scales, ANY)
    checks.has_shape(FUNCTION, "biases", biases, (N, K // group_size))
    checks.has_dtype(FUNCTION, "biases", biases, (scales.dtype,))
    checks.same_device(FUNCTION, weight=weight, scales=scales, biases=biases)
    words = weight.view(torch.int32)

    def convert(first: int, last: int) -> dict[str, Tensor]:
        return planes.split(groups.nibbles_in_order(words[first:last]), 4)

    tensors = {**planes.by_rows(N, 4 * K, convert), "scales": scales, "offsets": biases}
    return Parts("MLX", (N, K), group_size, tensors)
