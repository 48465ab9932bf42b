// Every instruction that C++ has no word for, one helper each. emulator/twins.h has the same names for the CPU.
#pragma once

#if defined(GEMMA4_EMULATED)
#include "../emulator/twins.h"
#else

#include <cstdint>

namespace gemma4::ptx {

struct Bf16 {};
struct Fp16 {};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A policy for what is read once a token: it leaves L2 first and so does not push out activations, which all blocks read.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes to shared memory without passing registers, the rest of them zero where `bytes` is less; not kept in L1 (.cg), because
// no other warp of the multiprocessor wants them.
__device__ __forceinline__ void copy_16_once(void* shared, const void* global, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}

// The same for what other blocks will read too.
__device__ __forceinline__ void copy_16(void* shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// 4 bytes, for rows that begin at no multiple of 16; only copies of 16 can leave L1 out.
__device__ __forceinline__ void copy_4_once(void* shared, const void* global, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 4, %2, %3;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}

// Closes a group of copies: they are waited for together.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most so many of this thread's groups are under way. Other threads' copies need a barrier besides.
template <int GROUPS>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four matrices of 8 rows of 16 bytes; a lane gets word lane % 4 of row lane / 4 of each, in one instruction where loads would
// take four.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix turned: a lane gets column lane / 4 of rows 2 (lane % 4) and the next. Values lie in memory by keys,
// and are the second operand of a product over keys.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// D (16 x 8) = A (16 x 16) B (16 x 8) + C with fp32 sums: the only multiplication that keeps pace with memory at several rows of x.
template <class Type>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
template <>
__device__ __forceinline__ void multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                               const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void multiply<Fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                               const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The conversions that the CUDA headers would bring, without their ten thousand lines.
__device__ __forceinline__ uint16_t round_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t round_to_fp16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ float fp16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two numbers rounded into one register, the first in its lower half, as operands of mma want them: one instruction, not three.
__device__ __forceinline__ uint32_t round_pair(float low, float high, Bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, Fp16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x to within 2^-22, one instruction; what is below 2^-126 becomes 0, which no weight of a softmax is told from.
__device__ __forceinline__ float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The value of the lane whose number differs in the bits of a mask: cheaper than shared memory, which would take a store and a
// barrier too.
__device__ __forceinline__ float from_lane_across(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ uint32_t from_lane_across(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

// 16 bytes through registers, past L1 like the copies; volatile, or the compiler would ask for them while registers are short.
__device__ __forceinline__ uint4 load_16_once(const void* global) {
  uint4 data;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
               : "l"(global)
               : "memory");
  return data;
}

// The value of any lane: each finds an address for all.
__device__ __forceinline__ int64_t from_lane(int64_t value, int lane) {
  return __shfl_sync(~0u, static_cast<long long>(value), lane);
}
__device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }

// Asks for the line in L1 and waits for nothing: what is loaded after the next barrier is then on its way before it.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global)); }

// The same pointer, of which the compiler no longer knows how it was made: it would make it again at every use, to save a register.
template <class Target>
__device__ __forceinline__ const Target* kept(const Target* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// (word & mask) | bits: the compiler makes two instructions of it where both are constants, because one instruction holds only one.
__device__ __forceinline__ uint32_t masked_with(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Two additions in one instruction. bf16 has no addition before sm_90: times one, plus.
__device__ __forceinline__ uint32_t add_pair(uint32_t pair, uint32_t addend, Bf16) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(0x3F803F80u), "r"(addend));
  return sum;
}
__device__ __forceinline__ uint32_t add_pair(uint32_t pair, uint32_t addend, Fp16) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(pair), "r"(addend));
  return sum;
}

// Reductions of 32-bit integers over a warp, in one instruction since sm_80, where shuffles take ten.
__device__ __forceinline__ int warp_largest(int value) { return __reduce_max_sync(~0u, value); }
__device__ __forceinline__ int warp_smallest(int value) { return __reduce_min_sync(~0u, value); }
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(~0u, value); }

// Whether a condition holds in any lane: a branch that the whole warp skips together.
__device__ __forceinline__ bool warp_any(bool value) { return __any_sync(~0u, value); }

}  // namespace gemma4::ptx

#endif
