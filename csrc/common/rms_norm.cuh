// RMSNorm with the operations and the roundings of PyTorch on a CPU: products and sums one by one, none of them fused.
#pragma once

#include "eight.cuh"

namespace gemma4 {

// The sum of squares of a thread's numbers, in their order.
__device__ __forceinline__ float add_squares(float sum, const float (&numbers)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum = __fadd_rn(sum, __fmul_rn(numbers[i], numbers[i]));
  return sum;
}

// The sum over LANES neighbouring lanes of a warp, the same bits in each of them: all 32 lanes must come here.
template <int LANES>
__device__ __forceinline__ float sum_of_lanes(float own) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) own = __fadd_rn(own, ptx::from_lane_across(own, apart));
  return own;
}

// (mean + eps)^-0.5 as PyTorch's CPU kernels round it: 1 / sqrt.
__device__ __forceinline__ float inverse_rms(float sum_of_squares, int count, float eps) {
  return __fdiv_rn(1, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum_of_squares, float(count)), eps)));
}

// x * inverse * weight, rounded to Type once.
template <class Type>
__device__ __forceinline__ void scale_eight(float (&x)[kEight], float inverse, const float (&weight)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) x[i] = rounded<Type>(__fmul_rn(__fmul_rn(x[i], inverse), weight[i]));
}

}  // namespace gemma4
