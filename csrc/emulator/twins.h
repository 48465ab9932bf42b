// The helpers of common/ptx.cuh for the CPU, by the same names. Reasons are given there.
#pragma once

#include "device.h"

namespace gemma4::ptx {

struct Bf16 {};
struct Fp16 {};

namespace twin {

// Word by word, never by memset or memcpy: GCC does not tell ThreadSanitizer of one that it expands in place.
GEMMA4_UNCOUNTED inline void store_words(void* target, const void* data, size_t bytes) {
  auto* to = static_cast<volatile uint32_t*>(target);
  for (size_t i = 0; i < bytes / 4; ++i) to[i] = static_cast<const uint32_t*>(data)[i];
}

GEMMA4_UNCOUNTED inline void load_words(void* target, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes / 4; ++i) static_cast<uint32_t*>(target)[i] = static_cast<const volatile uint32_t*>(data)[i];
}

// NaN goes to the target at once, and the data when they are waited for: who reads too early, or still reads what the target held,
// gets NaN. Source and target are both touched here, where AddressSanitizer looks.
GEMMA4_COUNTED_INLINE void copy(void* shared, const void* global, uint32_t size, uint32_t bytes) {
  emulator::count_load("cp.async", global, bytes);
  emulator::count_store("cp.async", shared, size);
  uint32_t data[4] = {0, 0, 0, 0};
  load_words(data, global, bytes);
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 || reinterpret_cast<uintptr_t>(global) % size != 0) {
    emulator::fail("cp.async at an address that is no multiple of its bytes");
  }
  const uint32_t poison[4] = {~0u, ~0u, ~0u, ~0u};
  store_words(shared, poison, size);
  emulator::issue_copy(shared, data, size);
}

template <class Type>
inline float to_float(uint16_t bits);
template <>
inline float to_float<Bf16>(uint16_t bits) {
  return emulator::bf16_to_float(bits);
}
template <>
inline float to_float<Fp16>(uint16_t bits) {
  return emulator::fp16_to_float(bits);
}

}  // namespace twin

inline uint64_t evict_first_policy() { return 0; }
GEMMA4_COUNTED_INLINE void copy_16_once(void* shared, const void* global, uint32_t bytes, uint64_t) {
  twin::copy(shared, global, 16, bytes);
}
GEMMA4_COUNTED_INLINE void copy_16(void* shared, const void* global, uint32_t bytes) { twin::copy(shared, global, 16, bytes); }
GEMMA4_COUNTED_INLINE void copy_4_once(void* shared, const void* global, uint32_t bytes, uint64_t) {
  twin::copy(shared, global, 4, bytes);
}
inline void commit() { emulator::commit_copies(); }
template <int GROUPS>
inline void wait() {
  emulator::wait_copies(GROUPS, twin::store_words);
}

// Each lane reads the row whose address it gives, so a race with it has the right thread's name.
GEMMA4_COUNTED_INLINE void load_matrices(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix of a row whose address is no multiple of 16");
  uint32_t mine[4];
  emulator::count_load("ldmatrix", row, 16);
  twin::load_words(mine, row, 16);
  emulator::distribute_matrices(mine, out, line);
}

GEMMA4_COUNTED_INLINE void load_matrices_turned(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix of a row whose address is no multiple of 16");
  uint32_t mine[4];
  emulator::count_load("ldmatrix", row, 16);
  twin::load_words(mine, row, 16);
  emulator::distribute_turned_matrices(mine, out, line);
}

template <class Type>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                     int line = __builtin_LINE());
template <>
inline void multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], int line) {
  emulator::multiply(d, a, b, c, true, line);
}
template <>
inline void multiply<Fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], int line) {
  emulator::multiply(d, a, b, c, false, line);
}

inline uint16_t round_to_bf16(float value) { return emulator::float_to_bf16(value); }
inline uint16_t round_to_fp16(float value) { return emulator::float_to_fp16(value); }
inline float fp16_to_float(uint16_t bits) { return emulator::fp16_to_float(bits); }

inline void prefetch(const void*) {}

inline uint32_t round_pair(float low, float high, Bf16) { return round_to_bf16(low) | uint32_t(round_to_bf16(high)) << 16; }
inline uint32_t round_pair(float low, float high, Fp16) { return round_to_fp16(low) | uint32_t(round_to_fp16(high)) << 16; }

// More exact than the instruction: what tests find holds for the arithmetic around it, not for its last bits.
inline float exp2_fast(float x) { return std::exp2(x); }

inline float from_lane_across(float value, int mask, int line = __builtin_LINE()) {
  return __uint_as_float(emulator::shuffle(__float_as_uint(value), emulator::lane() ^ mask, line));
}

inline uint32_t from_lane_across(uint32_t value, int mask, int line = __builtin_LINE()) {
  return emulator::shuffle(value, emulator::lane() ^ mask, line);
}

inline uint4 load_16_once(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("a load of 16 bytes at no multiple of 16");
  return *static_cast<const uint4*>(global);
}

inline float from_lane(float value, int lane, int line = __builtin_LINE()) {
  return __uint_as_float(emulator::shuffle(__float_as_uint(value), lane, line));
}
inline int64_t from_lane(int64_t value, int lane, int line = __builtin_LINE()) {
  const uint64_t low = emulator::shuffle(uint32_t(value), lane, line);
  const uint64_t high = emulator::shuffle(uint32_t(value >> 32), lane, line);
  return int64_t(high << 32 | low);
}

template <class Target>
inline const Target* kept(const Target* pointer) {
  return pointer;
}

inline uint32_t masked_with(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

inline uint32_t add_pair(uint32_t pair, uint32_t addend, Bf16) {
  const auto sum = [](uint16_t a, uint16_t b) {
    return emulator::float_to_bf16(emulator::bf16_to_float(a) + emulator::bf16_to_float(b));
  };
  return sum(uint16_t(pair), uint16_t(addend)) | uint32_t(sum(pair >> 16, addend >> 16)) << 16;
}
inline uint32_t add_pair(uint32_t pair, uint32_t addend, Fp16) {
  const auto sum = [](uint16_t a, uint16_t b) {
    return emulator::float_to_fp16(emulator::fp16_to_float(a) + emulator::fp16_to_float(b));
  };
  return sum(uint16_t(pair), uint16_t(addend)) | uint32_t(sum(pair >> 16, addend >> 16)) << 16;
}

inline int warp_largest(int value, int line = __builtin_LINE()) { return emulator::reduce(emulator::kLargest, value, line); }
inline int warp_smallest(int value, int line = __builtin_LINE()) { return emulator::reduce(emulator::kSmallest, value, line); }
inline int warp_sum(int value, int line = __builtin_LINE()) { return emulator::reduce(emulator::kSum, value, line); }
inline bool warp_any(bool value, int line = __builtin_LINE()) { return emulator::reduce(emulator::kLargest, value, line) != 0; }

}  // namespace gemma4::ptx
