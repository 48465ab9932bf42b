"""Values of a full layer in 8 bits: half the bytes of a bf16 cache, for who wants them.

    float8_e4m3fn   code * values_scale[h]; one fp32 scale a KV head, chosen once: (Hkv,)
    int8            code * values_scale[row, h]; one fp32 scale for each row and KV head, chosen by the row: values.shape[:-1]

v_norm gives rows of root mean square 1, whose numbers are at most sqrt(head_dim), so one scale serves every row of a float8
cache, and `FLOAT8_SCALE` is one that cannot overflow. What the 8 bits cost is in docs/attention.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_kernels import checks

FLOAT8_MAX = 448.0
"""The largest number of e4m3 without infinities (OCP 8-bit Floating Point Specification 1.0, table 1)."""
INT8_MAX = 127
FLOAT8_SCALE = 1 / 16
"""sqrt(512) / FLOAT8_MAX is a little less. A power of two, so that a value is rounded once."""
FEATURES = {torch.float8_e4m3fn: "float8_values", torch.int8: "int8_values"}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Codes (..., Hkv, D) of zeros, and their scale: `FLOAT8_SCALE`, or zeros for rows to come."""
    if dtype == torch.float8_e4m3fn:
        scale = torch.full(shape[-2:-1], FLOAT8_SCALE, device=device)
    else:
        scale = torch.zeros(shape[:-1], device=device)
    return torch.zeros(shape, dtype=dtype, device=device), scale


def feature(values: Tensor) -> dict[str, bool]:
    """What a call with these values wants of a backend, for `Call.features`."""
    name = FEATURES.get(values.dtype)
    return {} if name is None else {name: True}


def check(name: str, values: Tensor, values_scale: Tensor | None, dtype: torch.dtype) -> None:
    """values of the dtype of the other tensors, or of 8 bits with the scale that goes with them."""
    checks.has_dtype(name, "values", values, (dtype, *FEATURES))
    checks.is_dense(name, "values", values)
    if values.dtype not in FEATURES:
        if values_scale is not None:
            raise ValueError(f"{name}: values_scale must be None for values of {str(dtype).removeprefix('torch.')}")
        return
    if values_scale is None:
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: values_scale must be given with values of {kind}, got None")
    shape = values.shape[2:3] if values.dtype == torch.float8_e4m3fn else values.shape[:-1]
    checks.has_shape(name, "values_scale", values_scale, tuple(shape))
    checks.has_dtype(name, "values_scale", values_scale, (torch.float32,))


def encode(values: Tensor, dtype: torch.dtype, values_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """values (..., Hkv, D) -> codes of the dtype, and their scale.

    float8: values / values_scale (Hkv,), to nearest, what lies beyond the range as its largest number. int8: the scale
    (..., Hkv) is the row's largest magnitude / 127; a row of zeros has scale 0, a row with a NaN or infinity NaN.
    """
    wide = values.float()
    if dtype == torch.float8_e4m3fn:
        assert values_scale is not None
        return (wide / values_scale[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(dtype), values_scale
    largest = wide.abs().amax(dim=-1)  # (..., Hkv)
    scale = torch.where(largest.isfinite(), largest / INT8_MAX, float("nan"))
    steps = wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def decode(codes: Tensor, values_scale: Tensor) -> Tensor:
    """(..., Hkv, D) fp32, each product rounded once."""
    return codes.float() * values_scale.unsqueeze(-1)
