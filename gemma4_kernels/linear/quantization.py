"""Quantising bf16: codes of a lattice where the weights lie on one, the nearest codes with a scale from the maximum elsewhere.

Weights from quantisation-aware training are published in bf16 too, each rounded from scale * (q - 8). A scale derived from the
largest weight of a group is then wrong wherever the largest code is not the one assumed, and with it all codes. Here the
lattice is looked for. If the largest weight of a group has the code c, every weight w has the code round(w * c / largest); then
each weight allows an interval of scales, those whose product with its code rounds to w. Any scale in all of the intervals
gives the group back bit for bit. The coarsest lattice that fits is taken, so |c| rises from 1 to 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import FormatError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.schemes import Parts, check_sizes

FUNCTION = "QuantizedWeight.quantize"
GROUP = 32
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


def quantize(w: Tensor, scheme: str) -> Parts:
    """See `QuantizedWeight.quantize`."""
    checks.has_shape(FUNCTION, "w", w, ("N", "K"))
    checks.has_dtype(FUNCTION, "w", w, (torch.bfloat16, torch.float16, torch.float32))
    if scheme not in QUANTIZERS:
        raise FormatError(f"{FUNCTION}: scheme must be one of {', '.join(QUANTIZERS)}, got {scheme!r}")
    N, K = w.shape
    check_sizes(FUNCTION, scheme, (N, K), GROUP)
    scale_dtype = w.dtype if scheme == "W4A16" else torch.float16

    def convert(first: int, last: int) -> dict[str, Tensor]:
        groups = w[first:last].reshape(last - first, K // GROUP, GROUP)
        if not groups.isfinite().all():
            raise ValueError(f"{FUNCTION}: w must be finite, got infinity or NaN in rows {first} to {last - 1}")
        return QUANTIZERS[scheme](groups, scale_dtype)

    return Parts(scheme, (N, K), GROUP, planes.by_rows(N, 4 * K, convert))


def four_bits(groups: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """groups (rows, G, 32): scale * (q - 8), q = 0 .. 15."""
    scale, codes = from_maximum(groups, scale_dtype)
    on_lattice, lattice_scale, lattice_codes = fit_lattice(groups, scale_dtype)
    scale = torch.where(on_lattice, lattice_scale, scale)
    codes = torch.where(on_lattice[:, :, None], lattice_codes, codes)
    return {**planes.split((codes + 8).to(torch.uint8).flatten(1), 4), "scales": scale}


def eight_bits(groups: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """groups (rows, G, 32): scale * q, q = -127 .. 127."""
    values = groups.float()
    scale = _representable(values.abs().amax(dim=2) / 127, scale_dtype)
    codes = _nearest(values, scale, -127, 127)
    return {"codes": codes.to(torch.int8).flatten(1), "scales": scale}


QUANTIZERS: dict[str, Callable[[Tensor, torch.dtype], dict[str, Tensor]]] = {
    "Q4_0": four_bits,
    "W4A16": four_bits,
    "Q8_0": eight_bits,
}


def from_maximum(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest weight of a group gets the code -8, whatever its sign: scale (rows, G), codes -8 .. 7."""
    values = groups.float()
    scale = _representable(_largest(values) / -8, scale_dtype)
    return scale, _nearest(values, scale, -8, 7)


def fit_lattice(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Which groups lie on a lattice scale * (-8 .. 7) to the rounding of their dtype; its scale, and the codes."""
    weights = groups.flatten(0, 1)  # (rows * G, 32)
    values = weights.float()
    largest = _largest(groups.float()).flatten()
    found = torch.zeros_like(largest, dtype=torch.bool)
    scale = torch.zeros_like(largest).to(scale_dtype)
    codes = torch.zeros_like(values)
    # Both the weight and the largest are rounded, so they may be off by two units in the last place together.
    tolerance = values.abs() * (4 * torch.finfo(weights.dtype).eps)
    for magnitude in range(1, 9):
        # Codes reach from -8 to 7, so only 8 decides the sign of the scale; the others leave it positive.
        code = torch.full_like(largest, -8) if magnitude == 8 else magnitude * largest.sign()
        step = torch.where(largest == 0, 1, largest / code)
        tried = (values / step[:, None]).round_()
        near = ((values - tried * step[:, None]).abs_() <= tolerance).all(dim=1)
        index = (near & ~found & (tried.amax(dim=1) <= 7)).nonzero()[:, 0]
        if len(index) == 0:
            continue
        candidate, fits = _scale_in_all_intervals(weights[index], tried[index], step[index].sign(), scale_dtype)
        index, candidate = index[fits], candidate[fits]
        found[index], scale[index], codes[index] = True, candidate, tried[index]
    shape = groups.shape[:2]
    return found.view(shape), scale.view(shape), codes.view(groups.shape)


def _scale_in_all_intervals(
    weights: Tensor, codes: Tensor, sign: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A scale for each group (M, 32), and whether its products with the codes are the weights."""
    below, above = _rounding_interval(weights)
    magnitudes = codes.abs().double()
    # |w| / |code| bounds the scale from both sides; codes of 0 say nothing.
    low = torch.where(codes == 0, 0, below / magnitudes).amax(dim=1)
    high = torch.where(codes == 0, torch.inf, above / magnitudes).amin(dim=1)
    middle = torch.where(high.isfinite(), (low + high) / 2, 0)
    scale = (middle * sign).to(scale_dtype)
    fits = ((scale.float()[:, None] * codes).to(weights.dtype) == weights).all(dim=1)
    return scale, fits


def _rounding_interval(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes between which a real number rounds to each weight, fp64: half way to both neighbours."""
    magnitude = groups.abs()
    bits = magnitude.view(INTEGER_OF_SIZE[groups.element_size()])
    here = magnitude.double()
    before = (bits - 1).clamp(min=0).view(groups.dtype).double()
    after = (bits + 1).view(groups.dtype).double()
    after = torch.where(after.isfinite(), after, here)
    return (before + here) / 2, (here + after) / 2


def _largest(values: Tensor) -> Tensor:
    """The value of the largest magnitude in each group, with its sign: (rows, G)."""
    return values.gather(2, values.abs().argmax(dim=2, keepdim=True))[:, :, 0]


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in its dtype. A weight beyond the range of fp16 scales cannot be held."""
    rounded = scale.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"{FUNCTION}: w has weights up to {float(scale.abs().amax()):.3g} times the scale's unit, "
                         f"which scales in {str(dtype).removeprefix('torch.')} cannot hold")  # fmt: skip
    return rounded


def _nearest(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The codes whose products with the rounded scale are nearest; 0 where the scale is 0."""
    step = scale.float()[:, :, None]
    return torch.where(step == 0, 0, values / torch.where(step == 0, 1, step)).round().clamp(low, high)
