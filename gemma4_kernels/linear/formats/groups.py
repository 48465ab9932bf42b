"""What the safetensors formats share: nibbles of int32 words, and columns put in the order of their groups."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.linear import planes


def nibbles_in_order(words: Tensor) -> Tensor:
    """int32 (N, W), the first of 8 codes in the lowest bits of each word, as uint8 (N, 8 * W)."""
    packed = planes.dense(words).view(torch.uint8)  # (N, 4 * W)
    return torch.stack(planes.nibbles(packed), dim=2).flatten(1)


def grouped_columns(function: str, name: str, g_idx: Tensor | None, K: int, group_size: int) -> Tensor | None:
    """The order of columns in which groups are neighbours: int32 (K,), or None where they are already.

    g_idx (K,) holds the group of each column. Each group must have group_size of them. Columns of a group keep their order.
    """
    if g_idx is None:
        return None
    checks.has_shape(function, name, g_idx, (K,))
    checks.has_dtype(function, name, g_idx, checks.INTEGERS)
    sorted_groups, columns = torch.sort(g_idx, stable=True)
    neighbours = torch.arange(K, device=g_idx.device) // group_size
    if not torch.equal(sorted_groups.long(), neighbours):
        raise ValueError(f"{function}: {name} must name each group from 0 to {K // group_size - 1} {group_size} times")
    if torch.equal(g_idx.long(), neighbours):
        return None
    return columns.int()
