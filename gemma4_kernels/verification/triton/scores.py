"""What a logit becomes: a score, an integer that orders it, a weight; `verification.filters` in Triton's words.

score    softcap(logit) / temperature, fp32; -inf where there is no token
key      int32 in the order of scores, zeros of either sign alike
place    int64 (key + 2**31) * 2**24 + token: the ascending order in which top-k and top-p drop tokens; of equal scores
         the lowest id goes first. No two tokens of a row share a place.
prize    int64 (key + 2**31) * 2**24 + (2**24 - 1 - token): the largest has the largest score, and of these the lowest id
mass     int64 exp(score - largest score) in multiples of 2**-38, rounded down
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_kernels.triton_common.rounding import to_fp32
from gemma4_kernels.verification import filters
from gemma4_kernels.verification import portable_math as numbers
from gemma4_kernels.verification.triton.portable_math import exp, tanh

TOKEN_BITS = tl.constexpr(24)
LAST_TOKEN = tl.constexpr(2**24 - 1)
BEYOND = tl.constexpr(2**56)
"""Above all places."""
NEXT_KEY = tl.constexpr(2**24)
"""From the places of one key to those of the next."""
_KEY_BIAS = tl.constexpr(2**31)
_FP32_LARGEST = tl.constexpr(numbers.FP32_LARGEST)
_WEIGHT = tl.constexpr(2.0**filters.WEIGHT_BITS)
_UNIT = tl.constexpr(2.0**-filters.WEIGHT_BITS)
_CUT = tl.constexpr(2.0**filters._CUT_BITS)
_CUT_WHOLE = tl.constexpr(2**filters._CUT_BITS)
_CUT_BITS = tl.constexpr(filters._CUT_BITS)
_CUT_ROUNDING = tl.constexpr(filters._CUT_ROUNDING)


@triton.jit
def score_of(logit, softcap, divisor):
    """fp32 logit -> score. divisor is the temperature, 1 for greedy."""
    if softcap > 0:
        logit = tanh(tl.div_rn(logit, tl.full(logit.shape, 0.0, tl.float32) + softcap)) * softcap
    if divisor != 1.0:
        logit = tl.div_rn(logit, tl.full(logit.shape, 0.0, tl.float32) + divisor)
    return tl.minimum(logit, _FP32_LARGEST)


@triton.jit
def scores_at(row_ptr, token, V, softcap, divisor):
    """Scores of tokens (int32); -inf for what is no token, and for NaN, whose row is refused anyway."""
    is_token = token < V
    logit = to_fp32(tl.load(row_ptr + token, mask=is_token, other=0.0))
    score = score_of(logit, softcap, divisor)
    return tl.where(is_token & (score == score), score, float("-inf"))


@triton.jit
def key_of(score):
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key, token):
    return ((key.to(tl.int64) + _KEY_BIAS) << TOKEN_BITS) | token.to(tl.int64)


@triton.jit
def prize_of(key, token):
    return place_of(key, token ^ LAST_TOKEN)


@triton.jit
def key_in(place):
    """int32, of a place or a prize."""
    return ((place >> TOKEN_BITS) - _KEY_BIAS).to(tl.int32)


@triton.jit
def token_of_place(place):
    return (place & LAST_TOKEN).to(tl.int32)


@triton.jit
def token_of_prize(prize):
    return ((prize & LAST_TOKEN) ^ LAST_TOKEN).to(tl.int32)


@triton.jit
def best_of(value, token, live):
    """The prize of the largest fp32 value (rows, columns), the lowest of tokens that tie; -1 where nothing is alive."""
    value = tl.where(live, value, float("-inf"))
    largest = tl.max(tl.max(value, axis=1), axis=0)
    lowest = tl.min(tl.min(tl.where(live & (value == largest), token, LAST_TOKEN), axis=1), axis=0)
    some = tl.max(tl.max(live.to(tl.int32), axis=1), axis=0)
    return tl.where(some > 0, prize_of(key_of(largest), lowest), -1)


@triton.jit
def weight_of(score, largest):
    """fp32 exp(score - largest score)."""
    return exp(score - largest)


@triton.jit
def fixed(x):
    """fp32 in [0, 1] as a whole number of 2**-38, rounded down."""
    return (x * _WEIGHT).to(tl.int64)


@triton.jit
def from_fixed(total):
    return total.to(tl.float32) * _UNIT


@triton.jit
def limit_of(cut, total):
    """What sums up to this, ascending, is removed by top-p. The last token always stays, as it does below the total."""
    fraction = (tl.minimum(tl.maximum(cut, 0.0), 1.0) * _CUT).to(tl.int64) + _CUT_ROUNDING
    fraction = tl.minimum(fraction, _CUT_WHOLE)
    # The product has up to 93 bits.
    limit = ((total >> 32) * fraction << (32 - _CUT_BITS)) + ((total & 0xFFFFFFFF) * fraction >> _CUT_BITS)
    return tl.minimum(limit, total - 1)
