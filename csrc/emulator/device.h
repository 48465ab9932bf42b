// What CUDA's own headers give a source file, for g++: the words of the language, the built-in variables and functions that our
// kernels use. Everything that touches a kernel's memory is in here or in twins.h, where the sanitizers see it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "collectives.h"
#include "counts.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

template <class Element>
struct TwoNumbers {
  using Number = Element;
  Element x, y;
};
template <class Element>
struct FourNumbers {
  using Number = Element;
  Element x, y, z, w;
};
// The compiler takes their numbers one by one where it likes; in the counted build a load or store of them is one access, as
// it is for the machine.
template <class Numbers>
struct alignas(sizeof(Numbers)) Vector : Numbers {
#if defined(GEMMA4_COUNTED)
  Vector() = default;
  template <class... Each>
  GEMMA4_COUNTED_INLINE Vector(Each... each) : Numbers{typename Numbers::Number(each)...} {}
  GEMMA4_COUNTED_INLINE Vector(const Vector& other) : Numbers() { emulator::count_copy(this, &other, sizeof other); }
  GEMMA4_COUNTED_INLINE Vector& operator=(const Vector& other) {
    emulator::count_copy(this, &other, sizeof other);
    return *this;
  }
#endif
};
using float2 = Vector<TwoNumbers<float>>;
using uint2 = Vector<TwoNumbers<uint32_t>>;
using float4 = Vector<FourNumbers<float>>;
using uint4 = Vector<FourNumbers<uint32_t>>;
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(int line = __builtin_LINE()) { emulator::block_barrier(line); }
inline void __syncwarp(int line = __builtin_LINE()) { emulator::warp_barrier(line); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> by % 32);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// Four bytes of the eight in (y, x), each by the lowest three bits of its nibble. The fourth bit, which repeats a sign, has no twin.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    if (selector >> 4 * i & 8) emulator::fail("__byte_perm with a selector above 7");
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}
// One operation, rounded to nearest, which nvcc makes part of no other; g++ is told so for the whole build.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

template <class T>
inline T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) emulator::fail("a load whose address is no multiple of its bytes");
  return *address;
}

// Relaxed, as on the device: order comes from barriers and fences. One block runs at a time, so a fence between blocks has
// nothing to do.
template <class Integer>
GEMMA4_UNCOUNTED inline Integer atomicAdd(Integer* address, Integer value) {
#if defined(GEMMA4_COUNTED)  // which has no atomics of its own, and counts none
  const Integer before = *address;
  *address = before + value;
  return before;
#else
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#endif
}
inline void __threadfence() {}
