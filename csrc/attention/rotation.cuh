// Rotations of pairs by a position, to the last bits of fp32 wherever the position is.
#pragma once

#include <cmath>

#include "../common/device.cuh"

namespace gemma4::attention {

struct Angle {
  float cos, sin;
};

// Turns per position, times 2^64, for a frequency in radians: products with a position overflow by whole turns, which is what
// one wants. In fp32 the angle itself would be off by 0.008 at position 262144.
__device__ __forceinline__ uint64_t turns_of(double frequency) {
  const double turn = frequency * 0.15915494309189533577;  // 1 / (2 pi)
  return uint64_t(int64_t((turn - floor(turn + 0.5)) * 18446744073709551616.0));
}

// The angle after `position` steps. The rest of the product is a quarter turn and at most an eighth more, for which Taylor's
// series reach 1e-7.
__device__ __forceinline__ Angle angle_at(uint32_t position, uint64_t turns) {
  const uint32_t turn = __umulhi(position, uint32_t(turns)) + position * uint32_t(turns >> 32);  // in 2^-32 turns
  const uint32_t quarter = (turn + 0x20000000u) >> 30;
  const float angle = float(int32_t(turn - (quarter << 30))) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  const float square = angle * angle;
  const float cos = fmaf(square, fmaf(square, fmaf(square, fmaf(square, 1.0f / 40320, -1.0f / 720), 1.0f / 24), -0.5f), 1.0f);
  const float sin =
      angle * fmaf(square, fmaf(square, fmaf(square, fmaf(square, 1.0f / 362880, -1.0f / 5040), 1.0f / 120), -1.0f / 6), 1.0f);
  const bool is_odd = quarter & 1;
  const uint32_t cos_sign = (quarter + 1) << 30 & 0x80000000u, sin_sign = quarter << 30 & 0x80000000u;
  return {__uint_as_float(__float_as_uint(is_odd ? sin : cos) ^ cos_sign),
          __uint_as_float(__float_as_uint(is_odd ? cos : sin) ^ sin_sign)};
}

// One rotation after another. Sums are written as fused multiply-adds, so that every instantiation rounds alike.
__device__ __forceinline__ Angle together(Angle a, Angle b) {
  return {fmaf(a.cos, b.cos, -(a.sin * b.sin)), fmaf(a.sin, b.cos, a.cos * b.sin)};
}

}  // namespace gemma4::attention
