"""Tensors as the functions of the C interface take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.cuda_common.support import DTYPE_CODES


def address(tensor: Tensor | None) -> int:
    """0 for one that is absent."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(tensor: Tensor | None) -> int:
    """Its gemma4_dtype; of one that is absent, any."""
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def readable(weight: Tensor | None) -> Tensor | None:
    """A weight of a dtype that kernels read: fp64 becomes the fp32 in which every backend computes."""
    return weight if weight is None or weight.dtype in DTYPE_CODES else weight.to(torch.float32)


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """The current stream of a device, which is made the current device: 0 on a CPU."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def run(function: Any, workspace_bytes: Any, arguments: Any, device: torch.device) -> None:
    """A pair of functions of a compiled module, on the device's current stream, with the workspace that it asks for."""
    with stream_of(device) as stream:
        nbytes = workspace_bytes(arguments)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
        function(arguments, workspace.data_ptr(), nbytes, stream)
