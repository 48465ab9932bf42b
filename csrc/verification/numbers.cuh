// exp, ln and tanh in fp32 and the noise, bit for bit those of gemma4_kernels/verification/{portable_math,noise}.py: Cephes'
// polynomials in single operations, each rounded to nearest and none of them fused, and Philox4x32-10.
#pragma once

#include <cstdint>

#include "../common/device.cuh"

namespace gemma4::verification {

// nvcc would fuse a * b + c, which rounds once where every other backend rounds twice.
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float minus(float a, float b) { return __fadd_rn(a, -b); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float over(float a, float b) { return __fdiv_rn(a, b); }

__device__ __forceinline__ int bits_of(float value) { return int(__float_as_uint(value)); }
__device__ __forceinline__ float float_of(int bits) { return __uint_as_float(uint32_t(bits)); }

constexpr float kLn2High = 0.693359375;  // so few bits that its product with an exponent is exact
constexpr float kLn2Low = -2.12194440e-4;
constexpr float kSmallestExponent = -87.0f;  // exp of less is 0
constexpr float kLargestExponent = 88.0f;
constexpr float kLargestNumber = 3.4028234663852886e38;
constexpr float kTanhSeriesBelow = 0.625;

// Horner's rule from value * x + next on.
__device__ __forceinline__ float horner(float, float value) { return value; }
template <class... Rest>
__device__ __forceinline__ float horner(float x, float value, double next, Rest... rest) {
  return horner(x, plus(times(value, x), float(next)), rest...);
}

// e^x of x <= 88; 0 below -87, -inf included.
__device__ __forceinline__ float exponential_of(float x) {
  const float bounded = fminf(fmaxf(x, kSmallestExponent), kLargestExponent);
  const float exponent = floorf(plus(times(bounded, float(1.44269504088896341)), 0.5f));
  const float rest = minus(minus(bounded, times(exponent, kLn2High)), times(exponent, kLn2Low));
  const float series =
      horner(rest, float(1.9875691500e-4), 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1);
  const float value = plus(plus(times(series, times(rest, rest)), rest), 1.0f);
  return x < kSmallestExponent ? 0.0f : times(value, float_of((int(exponent) + 127) << 23));
}

// ln((1 + fraction) * 2^exponent), fraction from sqrt(1/2) - 1 to sqrt(2) - 1.
__device__ __forceinline__ float logarithm_of_parts(float fraction, float exponent) {
  const float square = times(fraction, fraction);
  const float series = horner(fraction, float(7.0376836292e-2), -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1,
                              1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1);
  const float value = minus(plus(times(times(series, fraction), square), times(exponent, kLn2Low)), times(square, 0.5f));
  return plus(plus(fraction, value), times(exponent, kLn2High));
}

struct Parts {
  float fraction, exponent;
};

// x = (1 + fraction) * 2^exponent, of x that is positive, finite and not subnormal.
__device__ __forceinline__ Parts parts_of(float x) {
  const int bits = bits_of(x);
  const float mantissa = float_of((bits & 0x7FFFFF) | 0x3F000000);  // [0.5, 1)
  const bool low = mantissa < float(0.707106781186547524);
  return {minus(low ? plus(mantissa, mantissa) : mantissa, 1.0f), float((bits >> 23) - 126 - int(low))};
}

__device__ __forceinline__ float logarithm_of(float x) {
  const Parts parts = parts_of(x);
  return logarithm_of_parts(parts.fraction, parts.exponent);
}

// NaN for NaN.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = times(x, x), size = fabsf(x);
  const float polynomial = horner(square, float(-5.70498872745e-3), 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
                                  -3.33332819422e-1);
  const float series = plus(times(times(polynomial, square), x), x);
  // Where it rounds to 1, exp need not overflow.
  const float large = minus(1.0f, over(2.0f, plus(exponential_of(fminf(plus(size, size), kLargestExponent)), 1.0f)));
  return size < kTanhSeriesBelow ? series : x != x ? x : x < 0.0f ? -large : large;
}

// Noise ---------------------------------------------------------------------------------------------------------------

enum Stream { kTarget = 0, kAcceptance = 1, kResidual = 2, kDraft = 3 };

struct Words {
  uint32_t word[4];
};

// Philox4x32-10: the words of tokens 4 block to 4 block + 3.
__device__ __forceinline__ Words words_of_block(uint32_t block, uint64_t seed, uint64_t position, uint32_t stream) {
  uint32_t c0 = block, c1 = uint32_t(position), c2 = stream, c3 = uint32_t(position >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(second >> 32) ^ c1 ^ k0;
    c1 = uint32_t(second);
    c2 = uint32_t(first >> 32) ^ c3 ^ k1;
    c3 = uint32_t(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ uint32_t word_of(int token, uint64_t seed, uint64_t position, uint32_t stream) {
  const Words words = words_of_block(uint32_t(token) >> 2, seed, position, stream);
  const int index = token & 3;
  return index < 2 ? (index == 0 ? words.word[0] : words.word[1]) : (index == 2 ? words.word[2] : words.word[3]);
}

// Strictly between 0 and 1.
__device__ __forceinline__ float uniform_of(uint32_t word) { return times(float(word >> 8 | 1u), 5.9604644775390625e-8f); }

// -ln(1 - v), v = (word + 1/2) / 2^32: one conversion, one logarithm.
//
// Above v = 1/4 it comes from 1 - v = (2 u + 1) / 2^33 with u = 2^32 - 1 - word. Where 2 u + 1 has more than 31 bits, u | 1 is
// its half rounded to whole, and rounds to the same fp32: neither is a tie, and they lie on one side of all ties.
__device__ __forceinline__ float exponential_noise(uint32_t word) {
  const uint32_t rest = ~word;  // u
  const bool is_near = word < 1u << 30, is_short = rest < 1u << 30;
  const float number = float(is_near ? word * 2 + 1 : is_short ? rest * 2 + 1 : rest | 1u);
  const float unit = float(1.0 / 8589934592.0);  // 2^-33
  Parts parts = parts_of(times(number, is_short ? unit : 2 * unit));
  if (is_near) parts = {times(number, -unit), 0.0f};
  return -logarithm_of_parts(parts.fraction, parts.exponent);
}

__device__ __forceinline__ float gumbel_noise(uint32_t word) { return -logarithm_of(exponential_noise(word)); }

// A number that gumbel_noise is not above: -ln v, by a logarithm that is straight between powers of two and so too small; six
// instructions instead of seventy. The margin is for the roundings of both.
__device__ __forceinline__ float gumbel_bound(uint32_t word) {
  constexpr float kLn2 = 0.69314718f, kMargin = 1e-3f;
  const float log2_of_word = float(bits_of(float(word))) * (1.0f / 8388608.0f);  // + 127; 0 for a word of 0
  return kLn2 * (32.0f + 127.0f) + kMargin - log2_of_word * kLn2;
}

}  // namespace gemma4::verification
