"""bitsandbytes NF4 and FP4, with or without nested (double) quantisation.

Codes are those of the flattened weight, two to a byte, the even one in the high nibble. W = table[q] * absmax of its block,
with quant_map as table. Nested, absmax is a byte itself:

    absmax[i] = nested_quant_map[byte[i]] * nested_absmax[i // 256] + nested_offset

The table, the bytes and the floats are kept as they are.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import FormatError, ShapeError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.schemes import SUPER_BLOCK, Parts, check_sizes

FUNCTION = "QuantizedWeight.from_bitsandbytes"
SCHEMES = {"nf4": "NF4", "fp4": "FP4"}
STATE_BYTES = 1 << 16


def read(
    weight: Tensor, absmax: Tensor, quant_map: Tensor, quant_state: Tensor | dict[str, Any],
    nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
) -> Parts:  # fmt: skip
    """See `QuantizedWeight.from_bitsandbytes`."""
    state = parse_state(quant_state)
    N, K = shape = state_shape(state)
    scheme = SCHEMES.get(str(state.get("quant_type")))
    if scheme is None:
        raise FormatError(f"{FUNCTION}: quant_type must be nf4 or fp4, got {state.get('quant_type')!r}")
    block = checks.whole_number(FUNCTION, "blocksize of quant_state", state.get("blocksize"), minimum=1)
    if K % block:
        raise ShapeError(
            f"{FUNCTION}: K = {K} must be a multiple of the block size {block}: blocks that cross rows are not read"
        )
    check_sizes(FUNCTION, scheme, shape, block)
    checks.has_dtype(FUNCTION, "weight", weight, (torch.uint8,))
    if weight.numel() != N * K // 2:
        raise ShapeError(f"{FUNCTION}: weight has {weight.numel()} bytes, {scheme} of ({N}, {K}) needs {N * K // 2}")
    blocks = N * K // block
    checks.has_shape(FUNCTION, "absmax", absmax, (blocks,))
    checks.has_shape(FUNCTION, "quant_map", quant_map, (16,))
    checks.has_dtype(FUNCTION, "quant_map", quant_map, (torch.float32,))
    if (nested_absmax is None) != (nested_quant_map is None):
        given = "nested_absmax" if nested_quant_map is None else "nested_quant_map"
        raise ValueError(f"{FUNCTION}: nested_absmax and nested_quant_map must be given together, got only {given}")
    checks.same_device(
        FUNCTION, weight=weight, absmax=absmax, quant_map=quant_map, nested_absmax=nested_absmax,
        nested_quant_map=nested_quant_map,
    )  # fmt: skip
    if nested_absmax is None or nested_quant_map is None:
        checks.has_dtype(FUNCTION, "absmax", absmax, (torch.float32,))
        nested: dict[str, Tensor] = {}
    else:
        scheme += "_NESTED"
        nested = _nested(state, absmax, nested_absmax, nested_quant_map, blocks)
    rows = weight.reshape(N, K // 2)

    def convert(first: int, last: int) -> dict[str, Tensor]:
        low, high = planes.nibbles(rows[first:last])
        return planes.split(torch.stack((high, low), dim=2).flatten(1), 4)

    tensors = {**planes.by_rows(N, 4 * K, convert), "scales": absmax.view(N, -1), "table": quant_map, **nested}
    return Parts(scheme, shape, block, tensors)


def _nested(
    state: dict[str, Any], absmax: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, blocks: int
) -> dict[str, Tensor]:
    checks.has_dtype(FUNCTION, "absmax", absmax, (torch.uint8,))
    if state.get("nested_blocksize") != SUPER_BLOCK:
        raise FormatError(
            f"{FUNCTION}: nested_blocksize of quant_state must be {SUPER_BLOCK}, got {state.get('nested_blocksize')!r}"
        )
    checks.has_shape(FUNCTION, "nested_absmax", nested_absmax, (-(-blocks // SUPER_BLOCK),))
    checks.has_shape(FUNCTION, "nested_quant_map", nested_quant_map, (SUPER_BLOCK,))
    for name, tensor in (("nested_absmax", nested_absmax), ("nested_quant_map", nested_quant_map)):
        checks.has_dtype(FUNCTION, name, tensor, (torch.float32,))
    offset = checks.real_number(FUNCTION, "nested_offset of quant_state", state.get("nested_offset"))
    if not math.isfinite(offset):
        raise ValueError(f"{FUNCTION}: nested_offset of quant_state must be finite, got {offset}")
    constant = torch.tensor([offset], dtype=torch.float32, device=absmax.device)
    return {"scale_table": nested_quant_map, "scale_scales": nested_absmax, "scale_offset": constant}


def parse_state(quant_state: Tensor | dict[str, Any]) -> dict[str, Any]:
    """The JSON object that a file keeps as a tensor of bytes."""
    if isinstance(quant_state, dict):
        return quant_state
    checks.has_shape(FUNCTION, "quant_state", quant_state, ("bytes",))
    checks.has_dtype(FUNCTION, "quant_state", quant_state, (torch.uint8,))
    if quant_state.numel() > STATE_BYTES:
        raise ValueError(f"{FUNCTION}: quant_state must have at most {STATE_BYTES} bytes, got {quant_state.numel()}")
    try:
        state = json.loads(bytes(quant_state.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FUNCTION}: quant_state is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{FUNCTION}: quant_state must be a JSON object, got {type(state).__name__}")
    return state


def state_shape(state: dict[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or any(type(size) is not int for size in shape):
        raise ShapeError(f"{FUNCTION}: shape of quant_state must be two sizes [N, K], got {shape!r}")
    return shape[0], shape[1]
