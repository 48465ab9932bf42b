"""The op of the norms between sublayers: schema, fake, what a call needs, and who serves it.

The same pattern as `linear.ops`. x and residual are (M, N); without pre_weight the second result is (0, N), because an op
returns tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.op_support import DECODE_ROWS, fp32_sums, refuse_backward
from gemma4_kernels.triton_common import support

OP = "sandwich_norm"
SCHEMA = (
    "(Tensor x, Tensor residual, Tensor post_weight, Tensor? pre_weight, Tensor? layer_scalar, float eps) "
    "-> (Tensor, Tensor)"
)
MOST_NUMBERS = 16384
"""Of a row that a kernel holds in the registers of one block; four times that of the 12B."""
LONG_ROWS = f"rows of more than {MOST_NUMBERS} numbers"
"""A feature: no kernel has it."""


def describe(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> Call:
    return Call(
        op=OP,
        device_type=x.device.type,
        architecture=backends.architecture_of(x.device),
        dtype=x.dtype,
        features=frozenset({LONG_ROWS} if x.shape[1] > MOST_NUMBERS else ()),
        shape_class="decode" if x.shape[0] <= DECODE_ROWS else "prefill",
    )


def outputs(x: Tensor, pre_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden (M, N), and normed (M, N) or (0, N), to be written."""
    rows, columns = x.shape
    return x.new_empty((rows, columns)), x.new_empty((0 if pre_weight is None else rows, columns))


# Registration -------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    arguments = (x, residual, post_weight, pre_weight, layer_scalar, eps)
    function = backends.dispatch(describe(*arguments))
    with fp32_sums(x.device.type):
        out: tuple[Tensor, Tensor] = function(*arguments)
    return out


def _fake(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return outputs(x, pre_weight)


torch.library.define(f"gemma4_kernels::{OP}", SCHEMA)
torch.library.impl(f"gemma4_kernels::{OP}", "CompositeExplicitAutograd", _run)
torch.library.register_fake(f"gemma4_kernels::{OP}", _fake)
torch.library.register_autograd(f"gemma4_kernels::{OP}", refuse_backward(OP))
backends.register(
    Implementation(
        op=OP,
        backend="eager",
        entry="gemma4_kernels.norms.eager:sandwich_norm",
        dtypes=frozenset(checks.FLOATS),
        features=frozenset({LONG_ROWS}),
    )
)
backends.register(
    support.implementation(OP, "gemma4_kernels.norms.triton.sandwich_norm:sandwich_norm", features=frozenset())
)
backends.register(
    Implementation(
        op=OP,
        backend="cuda",
        entry="gemma4_kernels.norms.cuda:sandwich_norm",
        dtypes=frozenset(cuda_support.DTYPE_CODES),
        features=frozenset(),
        refuses=cuda_support.refuses,
        only_by_name=cuda_support.only_by_name,
    )
)
