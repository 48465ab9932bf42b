// The arithmetic of a softmax, fp32 throughout, that all attention kernels share.
#pragma once

#include <cmath>

#include "attention.h"

namespace gemma4::attention {

constexpr float kLog2E = 1.44269504088896340736f;

__device__ __forceinline__ uint16_t rounded(float value, Bf16) { return ptx::round_to_bf16(value); }
__device__ __forceinline__ uint16_t rounded(float value, Fp16) { return ptx::round_to_fp16(value); }

// e^x for x <= 0. Who calls it has subtracted the maximum before log2(e) comes in: scores near it keep all of their digits.
__device__ __forceinline__ float exponential(float x) { return ptx::exp2_fast(x * kLog2E); }

// The largest and the sum over the four lanes that hold a row of an mma's result.
__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, ptx::from_lane_across(value, 1));
  return fmaxf(value, ptx::from_lane_across(value, 2));
}
__device__ __forceinline__ float sum_of_row(float value) {
  value += ptx::from_lane_across(value, 1);
  return value + ptx::from_lane_across(value, 2);
}

// What is subtracted from scores: a row that has seen no key yet keeps -inf, which from itself would be NaN.
__device__ __forceinline__ float safe_maximum(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// max + log(sum); -inf for a row that saw nothing.
__device__ __forceinline__ float log_sum(float highest, float sum) { return sum == 0 ? -INFINITY : highest + logf(sum); }

// softcap * tanh(score / softcap).
__device__ __forceinline__ float capped(float score, float softcap, float inverse_softcap) {
  const float x = score * inverse_softcap, x2 = x * x;
  // Near zero the closed form would lose the digits that it subtracts: there, five terms of the series.
  const float near = x * fmaf(x2, fmaf(x2, fmaf(x2, fmaf(x2, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3), 1.0f);
  const float shrunk = exponential(-2 * fabsf(x));
  const float far = copysignf((1 - shrunk) / (1 + shrunk), x);
  return softcap * (fabsf(x) < 0.3f ? near : far);
}

}  // namespace gemma4::attention
