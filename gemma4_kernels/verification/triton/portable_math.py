"""exp, log and tanh of `verification.portable_math`, bit for bit, and the uniform and Gumbel noise of `verification.noise`.

Launches set enable_fp_fusion=False: every addition and multiplication is rounded by itself. Divisions are div_rn. Zeros
keep their sign: what PyTorch negates is multiplied by -1 here, because Triton's minus is 0 - x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.verification import noise, portable_math

_EXP = tl.constexpr(portable_math.EXP)
_LOG = tl.constexpr(portable_math.LOG)
_TANH = tl.constexpr(portable_math.TANH)
_LOG2_E = tl.constexpr(portable_math.LOG2_E)
_LN2_HIGH = tl.constexpr(portable_math.LN2_HIGH)
_LN2_LOW = tl.constexpr(portable_math.LN2_LOW)
_SQRT_HALF = tl.constexpr(portable_math.SQRT_HALF)
_SMALLEST = tl.constexpr(portable_math.SMALLEST_EXPONENT)
_LARGEST = tl.constexpr(portable_math.LARGEST_EXPONENT)
_TANH_SERIES_BELOW = tl.constexpr(portable_math.TANH_SERIES_BELOW)
_ROUNDS = tl.constexpr(noise.ROUNDS)
_MULTIPLIERS = tl.constexpr(noise._MULTIPLIERS)
_KEY_STEPS = tl.constexpr(noise._KEY_STEPS)
_MASK = tl.constexpr(0xFFFFFFFF)


# Functions ------------------------------------------------------------------------------------------------------------


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    value = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for index in tl.static_range(2, COUNT):
        value = value * x + COEFFICIENTS[index]
    return value


@triton.jit
def exp(x):
    """e**x of fp32 x <= 88; 0 below -87, -inf included."""
    bounded = tl.minimum(tl.maximum(x, _SMALLEST), _LARGEST)
    exponent = tl.floor(bounded * _LOG2_E + 0.5)
    rest = bounded - exponent * _LN2_HIGH - exponent * _LN2_LOW
    value = _polynomial(rest, _EXP, 6) * (rest * rest) + rest + 1.0
    power = ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _SMALLEST, 0.0, value * power)


@triton.jit
def _parts(x):
    """(fraction, exponent), x = (1 + fraction) * 2**exponent, for `_log_of_parts`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # [0.5, 1)
    low = mantissa < _SQRT_HALF
    exponent = exponent - low.to(tl.int32)
    return tl.where(low, mantissa + mantissa, mantissa) - 1.0, exponent.to(tl.float32)


@triton.jit
def _log_of_parts(fraction, exponent):
    square = fraction * fraction
    value = _polynomial(fraction, _LOG, 9) * fraction * square
    value = value + exponent * _LN2_LOW - square * 0.5
    return fraction + value + exponent * _LN2_HIGH


@triton.jit
def log(x):
    """ln x of fp32 x that is positive, finite and not subnormal."""
    fraction, exponent = _parts(x)
    return _log_of_parts(fraction, exponent)


@triton.jit
def tanh(x):
    """tanh of fp32 x, NaN for NaN."""
    square = x * x
    series = _polynomial(square, _TANH, 5) * square * x + x
    size = tl.abs(x)
    large = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), exp(tl.minimum(size + size, _LARGEST)) + 1.0)
    large = tl.where(x < 0, large * -1.0, large)
    return tl.where(size < _TANH_SERIES_BELOW, series, tl.where(x != x, x, large))


# Noise ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32."""
    for _ in tl.static_range(_ROUNDS):
        first, second = c0, c2
        c0 = tl.umulhi(second, _MULTIPLIERS[1]) ^ c1 ^ k0
        c1 = tl.mul(second, _MULTIPLIERS[1], sanitize_overflow=False)
        c2 = tl.umulhi(first, _MULTIPLIERS[0]) ^ c3 ^ k1
        c3 = tl.mul(first, _MULTIPLIERS[0], sanitize_overflow=False)
        k0 = tl.add(k0, _KEY_STEPS[0], sanitize_overflow=False)
        k1 = tl.add(k1, _KEY_STEPS[1], sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _words(block, seed, position, stream):
    """Four uint32 words for each token div 4 of block (int32); seed and position are int64 scalars, stream any number."""
    return _philox(
        block.to(tl.uint32), (position & _MASK).to(tl.uint32), (position * 0 + stream).to(tl.uint32),
        ((position >> 32) & _MASK).to(tl.uint32), (seed & _MASK).to(tl.uint32), ((seed >> 32) & _MASK).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def words_of_blocks(block, seed, position, stream):
    """uint32 (BLOCKS, 4): the words of tokens 4 block to 4 block + 3, of each of block (BLOCKS,), int32."""
    w0, w1, w2, w3 = _words(block, seed, position, stream)
    # The last dim of a join tells its operands apart, so the words come to lie in order.
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCKS, 2, 2]
    return tl.reshape(joined, [block.shape[0], 4])


@triton.jit
def words_of(token, seed, position, stream):
    """The uint32 word of each token (int32)."""
    w0, w1, w2, w3 = _words(token >> 2, seed, position, stream)
    index = token & 3
    return tl.where(index < 2, tl.where(index == 0, w0, w1), tl.where(index == 2, w2, w3))


@triton.jit
def uniform(word):
    """fp32 strictly between 0 and 1."""
    return ((word >> 8) | 1).to(tl.float32) * 2.0**-24


@triton.jit
def exponential(word):
    """fp32 -ln(1 - v), v = (word + 1/2) / 2**32: one conversion, one logarithm.

    Above v = 1/4 it comes from 1 - v = (2 u + 1) / 2**33 with u = 2**32 - 1 - word. Where 2 u + 1 has more than 31 bits,
    u | 1 is its half rounded to whole, and rounds to the same fp32: neither is a tie, and they lie on one side of all ties.
    """
    is_near = word < 2**30
    rest = word ^ _MASK  # u
    is_short = rest < 2**30
    whole = tl.where(is_near, word * 2 + 1, tl.where(is_short, rest * 2 + 1, rest | 1))
    number = whole.to(tl.float32)
    fraction, exponent = _parts(number * tl.where(is_short, 2.0**-33, 2.0**-32))
    fraction = tl.where(is_near, number * -(2.0**-33), fraction)
    return _log_of_parts(fraction, tl.where(is_near, 0.0, exponent)) * -1.0


@triton.jit
def gumbel(word):
    """fp32 -ln(E)."""
    return log(exponential(word)) * -1.0
