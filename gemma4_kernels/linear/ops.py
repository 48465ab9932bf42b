"""The ops of quantised linear layers: torch.library schemas, fakes, what a call needs, and the table of implementations.

A weight is three arguments of an op: its scheme, [N, K, group_size], and its tensors in the order of `weight.TENSORS`. What
serves an op gets the `QuantizedWeight` again. x is (M, K), token ids are (T,).

Every op is opaque to torch.compile, and serves inference: its backward raises, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.linear import cuda
from gemma4_kernels.linear.weight import TENSORS, QuantizedWeight
from gemma4_kernels.op_support import DECODE_ROWS, fp32_sums, refuse_backward
from gemma4_kernels.triton_common import support

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNLIKE_WEIGHTS = "gate and up of different schemes, groups, dtypes of scales or orders of columns"


def _weight(name: str) -> str:
    return f"str {name}_scheme, int[] {name}_sizes, Tensor?[] {name}_tensors"


SCHEMAS = {
    "quantized_linear": f"(Tensor x, {_weight('weight')}, Tensor? bias, Tensor? residual) -> Tensor",
    "quantized_geglu": f"(Tensor x, {_weight('gate')}, {_weight('up')}) -> Tensor",
    "quantized_argmax": f"(Tensor x, {_weight('weight')}) -> Tensor",
    "quantized_embedding": f"(Tensor token_ids, {_weight('weight')}, ScalarType dtype) -> Tensor",
}


def weight_arguments(weight: QuantizedWeight) -> tuple[str, list[int], list[Tensor | None]]:
    """A weight as the ops take it."""
    return weight.scheme, [*weight.shape, weight.group_size], [getattr(weight, name) for name in TENSORS]


def _weights_again(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of an op, each three that are a weight as one `QuantizedWeight`."""
    found: list[Any] = []
    remaining = iter(arguments)
    for argument in remaining:
        if isinstance(argument, str):
            (N, K, group_size), tensors = next(remaining), next(remaining)
            argument = QuantizedWeight.from_checked(argument, (N, K), group_size, tensors)
        found.append(argument)
    return found


# What a call needs --------------------------------------------------------------------------------------------------


def describe(
    op: str, x: Tensor, weight: QuantizedWeight, *, up: QuantizedWeight | None = None, dtype: torch.dtype | None = None
) -> Call:
    """x or token ids, the weight, which of a GeGLU is the gate, and what an embedding's rows become."""
    is_product = dtype is None
    rows = "decode" if x.shape[0] <= DECODE_ROWS else "prefill"
    differ = up is not None and not weight.is_stored_like(up)
    return Call(
        op=op,
        device_type=x.device.type,
        architecture=backends.architecture_of(x.device),
        dtype=dtype or x.dtype,
        shape_class=f"{rows}, {weight.scheme}" if is_product else weight.scheme,
        scheme=weight.scheme,
        group_size=weight.group_size,
        features=frozenset({UNLIKE_WEIGHTS} if differ else ()),
        sizes=(min(x.shape[0], DECODE_ROWS + 1), *weight.shape) if is_product else (),
        multiprocessors=cuda_support.multiprocessors(x.device),
    )


# Registration -------------------------------------------------------------------------------------------------------


def _run(op: str, *arguments: Any) -> Tensor:
    """Check what the host can see, then let the chosen backend do it."""
    x, weight, *rest = _weights_again(arguments)
    if op == "quantized_embedding":
        checks.values_within(op, "token_ids", x, 0, weight.shape[0] - 1)
        call = describe(op, x, weight, dtype=rest[0])
    else:
        call = describe(op, x, weight, up=rest[0] if op == "quantized_geglu" else None)
    with fp32_sums(x.device.type):
        out: Tensor = backends.dispatch(call)(x, weight, *rest)
    return out


def _fake_outputs(x: Tensor, scheme: str, sizes: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], sizes[0]))


def _fake_argmax(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.int64)


def _fake_embedding(token_ids: Tensor, scheme: str, sizes: Sequence[int], tensors: Any, dtype: torch.dtype) -> Tensor:
    return token_ids.new_empty((token_ids.shape[0], sizes[1]), dtype=dtype)


FAKES: dict[str, Callable[..., Tensor]] = {
    "quantized_linear": _fake_outputs,
    "quantized_geglu": _fake_outputs,
    "quantized_argmax": _fake_argmax,
    "quantized_embedding": _fake_embedding,
}

for _op, _schema in SCHEMAS.items():
    _name = f"gemma4_kernels::{_op}"
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "CompositeExplicitAutograd", partial(_run, _op))
    torch.library.register_fake(_name, FAKES[_op])
    torch.library.register_autograd(_name, refuse_backward(_op))
    backends.register(
        Implementation(
            op=_op,
            backend="eager",
            entry=f"gemma4_kernels.linear.eager:{_op}",
            dtypes=frozenset(DTYPES),
            features=frozenset({UNLIKE_WEIGHTS}),
        )
    )
    _entry = f"gemma4_kernels.linear.triton.backend:{_op}"
    backends.register(support.implementation(_op, _entry, frozenset({UNLIKE_WEIGHTS})))

for _op in SCHEMAS:
    backends.register(
        Implementation(
            op=_op,
            backend="cuda",
            entry=f"gemma4_kernels.linear.cuda:{_op}",
            dtypes=frozenset({torch.bfloat16, torch.float16, *(DTYPES if _op == "quantized_embedding" else ())}),
            features=frozenset(),
            refuses=cuda.refuses,
            only_by_name=cuda_support.only_by_name,
            serves=f"up to {DECODE_ROWS} rows",
        )
    )
