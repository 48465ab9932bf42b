// Values of 8 bits, as `attention/value_codes.py` makes them: a number over a scale, to the nearest code.
//
// float8 is e4m3 without infinities. Only sm_89 and later have an instruction for it, so it is made by integer arithmetic, the
// same everywhere; a layer writes a few rows a step.
#pragma once

#include "../common/eight.cuh"

namespace gemma4::prologue {

constexpr float kMostInt8 = 127;  // symmetric: -128 stays unused

__device__ __forceinline__ float largest_of(const float (&numbers)[kEight]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kEight; ++i) largest = fmaxf(largest, fabsf(numbers[i]));
  return largest;
}

// The largest over LANES neighbouring lanes of a warp: all 32 lanes must come here.
template <int LANES>
__device__ __forceinline__ float largest_of_lanes(float own) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) own = fmaxf(own, ptx::from_lane_across(own, apart));
  return own;
}

// The scale of a row of this largest magnitude: NaN where there is none.
__device__ __forceinline__ float int8_scale(float largest) {
  return largest <= 3.402823466e38f ? __fdiv_rn(largest, kMostInt8) : NAN;
}

__device__ __forceinline__ uint32_t int8_code(float number) {
  if (number != number) return 0;  // NaN: its scale is NaN too, and so is what is read
  return uint32_t(int(fminf(fmaxf(rintf(number), -kMostInt8), kMostInt8))) & 255;
}

// To nearest, ties to even; 448 is the largest number, 0x7F NaN.
__device__ __forceinline__ uint32_t float8_code(float number) {
  const uint32_t bits = __float_as_uint(number), magnitude = bits & 0x7FFFFFFF, sign = bits >> 24 & 0x80;
  if (magnitude > 0x7F800000) return 0x7F;
  if (magnitude < 0x3C800000) {  // below 2^-6: multiples of 2^-9, which is the last place of 2^14
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - 0x46800000);
  }
  // Three bits behind the point, and the exponent counted from 2^-7 instead of 2^-127; a carry goes into the exponent.
  const uint32_t code = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return sign | (code < 0x7E ? code : 0x7E);
}

// The codes of eight numbers, rounded to Type before, four to a word.
template <class Type>
__device__ __forceinline__ uint2 codes_of(const float (&numbers)[kEight], float scale, bool is_int8) {
  const float by = !is_int8 || scale > 0 ? scale : 1;  // a row of zeros, or of what has no code, is as it is
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const float steps = __fdiv_rn(rounded<Type>(numbers[i]), by);
    words[i / 4] |= (is_int8 ? int8_code(steps) : float8_code(steps)) << 8 * (i % 4);
  }
  return uint2{words[0], words[1]};
}

// Codes first to first + 7 of a row of `count`; `whole`: there are eight or none, at multiples of 8 bytes.
__device__ __forceinline__ void store_codes(unsigned char* row, uint2 codes, int first, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<uint2*>(row + first) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (first + i < count) row[first + i] = static_cast<unsigned char>((i < 4 ? codes.x : codes.y) >> 8 * (i % 4));
  }
}

}  // namespace gemma4::prologue
