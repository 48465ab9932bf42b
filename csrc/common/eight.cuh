// Eight neighbours of a row: 16 bytes of a 16-bit type, 32 of fp32. Loaded, rounded and stored as any of the three types,
// computed with as fp32.
#pragma once

#include "../include/gemma4_kernels.h"
#include "device.cuh"

namespace gemma4 {

using ptx::Bf16;
using ptx::Fp16;
struct Fp32 {};

constexpr int kEight = 8;

__host__ __device__ __forceinline__ int bytes_of(int dtype) { return dtype == GEMMA4_FP32 ? 4 : 2; }

template <class Type>
struct Stored {
  using Bits = uint16_t;
};
template <>
struct Stored<Fp32> {
  using Bits = float;
};
template <class Type>
using Bits = typename Stored<Type>::Bits;

__device__ __forceinline__ float widened(uint16_t bits, Bf16) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float widened(uint16_t bits, Fp16) { return ptx::fp16_to_float(bits); }
__device__ __forceinline__ float widened(float number, Fp32) { return number; }
__device__ __forceinline__ uint16_t narrowed(float number, Bf16) { return ptx::round_to_bf16(number); }
__device__ __forceinline__ uint16_t narrowed(float number, Fp16) { return ptx::round_to_fp16(number); }
__device__ __forceinline__ float narrowed(float number, Fp32) { return number; }

// The number after a rounding to Type, still as fp32.
template <class Type>
__device__ __forceinline__ float rounded(float number) {
  return widened(narrowed(number, Type()), Type());
}

// Numbers first to first + 7 of a row of `count`; zeros beyond its end. `whole`: there are eight or none, at multiples of 16
// bytes.
template <class Type>
__device__ __forceinline__ void load_eight(float (&out)[kEight], const void* row, int first, int count, bool whole) {
  const auto* from = static_cast<const Bits<Type>*>(row) + first;
  if (!whole || first >= count) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) out[i] = first + i < count ? widened(from[i], Type()) : 0;
    return;
  }
  if constexpr (sizeof(Bits<Type>) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = reinterpret_cast<const float4*>(from)[half];
      out[4 * half] = four.x, out[4 * half + 1] = four.y, out[4 * half + 2] = four.z, out[4 * half + 3] = four.w;
    }
  } else {
    const uint4 eight = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < kEight; ++i) out[i] = widened(uint16_t(words[i / 2] >> 16 * (i % 2)), Type());
  }
}

// The same of a weight, whose gemma4_dtype is its own.
__device__ __forceinline__ void load_eight(float (&out)[kEight], const void* row, int dtype, int first, int count, bool whole) {
  if (dtype == GEMMA4_BF16) {
    load_eight<Bf16>(out, row, first, count, whole);
  } else if (dtype == GEMMA4_FP16) {
    load_eight<Fp16>(out, row, first, count, whole);
  } else {
    load_eight<Fp32>(out, row, first, count, whole);
  }
}

template <class Type>
__device__ __forceinline__ void store_eight(void* row, const float (&numbers)[kEight], int first, int count, bool whole) {
  auto* to = static_cast<Bits<Type>*>(row) + first;
  if (!whole || first >= count) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (first + i < count) to[i] = narrowed(numbers[i], Type());
    }
    return;
  }
  if constexpr (sizeof(Bits<Type>) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* four = numbers + 4 * half;
      reinterpret_cast<float4*>(to)[half] = make_float4(four[0], four[1], four[2], four[3]);
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = narrowed(numbers[2 * i], Type()) | uint32_t(narrowed(numbers[2 * i + 1], Type())) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace gemma4
