"""exp, log and tanh in fp32, out of operations that every backend rounds alike.

A token is an argmax over noise and scores, so backends agree on it only if they agree on every bit. Library functions
differ in the last one; these are Cephes' polynomials, written as single additions, multiplications and divisions, each
rounded to nearest and none of them fused. They are good to two units in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
LOG2_E = 1.44269504088896341
# ln 2 in two parts, the first of which has so few bits that its product with an exponent is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF = 0.707106781186547524
SMALLEST_EXPONENT = -87.0
"""exp of less is 0: no result is subnormal, which some devices would flush."""
LARGEST_EXPONENT = 88.0
TANH_SERIES_BELOW = 0.625
FP32_LARGEST = 3.4028234663852886e38


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, one rounding for each operation."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def exp(x: Tensor) -> Tensor:
    """e**x of fp32 x <= 88; 0 below -87, -inf included."""
    bounded = x.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT)
    exponent = torch.floor(bounded * LOG2_E + 0.5)
    rest = bounded - exponent * LN2_HIGH - exponent * LN2_LOW
    value = _polynomial(rest, EXP) * (rest * rest) + rest + 1.0
    power = ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < SMALLEST_EXPONENT, 0.0, value * power)


def log(x: Tensor) -> Tensor:
    """ln x of fp32 x that is positive, finite and not subnormal."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)  # [0.5, 1)
    low = mantissa < SQRT_HALF
    exponent = exponent - low.to(torch.int32)
    return log_of_parts(torch.where(low, mantissa + mantissa, mantissa) - 1.0, exponent.to(torch.float32))


def log_of_parts(fraction: Tensor, exponent: Tensor) -> Tensor:
    """ln((1 + fraction) * 2**exponent), fraction from sqrt(1/2) - 1 to sqrt(2) - 1."""
    square = fraction * fraction
    value = _polynomial(fraction, LOG) * fraction * square
    value = value + exponent * LN2_LOW - square * 0.5
    return fraction + value + exponent * LN2_HIGH


def tanh(x: Tensor) -> Tensor:
    """tanh of fp32 x, NaN for NaN."""
    square = x * x
    series = _polynomial(square, TANH) * square * x + x
    size = x.abs()
    # Where it rounds to 1, exp need not overflow.
    large = 1.0 - 2.0 / (exp((size + size).clamp(max=LARGEST_EXPONENT)) + 1.0)
    large = torch.where(x < 0, -large, large)
    return torch.where(size < TANH_SERIES_BELOW, series, torch.where(x != x, x, large))
