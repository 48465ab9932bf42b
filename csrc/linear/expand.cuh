// From the codes of eight columns to four pairs of 16-bit numbers, in registers.
#pragma once

#include "codes.cuh"

namespace gemma4::linear {

// A code under the exponent of MAGIC is a number; one addition takes away what is too much. Bits above the fourth stand in a word of
// their own; it is turned so that a short shift for each pair brings them above the other four.
template <class Type, Values VALUES, int BITS>
struct Expander {
  uint32_t minus_zero, turned_by;

  __device__ explicit Expander(const Parameters& p)
      : minus_zero(minus<Type>(p.zero)), turned_by(first_high_bit<BITS>(threadIdx.x % 4) - 4) {}

  // The group's zero point where there is one; an offset is not of the code.
  __device__ __forceinline__ void pairs_of(const Codes<BITS>& codes, uint32_t shift, uint32_t (&pairs)[4]) const {
    uint32_t high[Codes<BITS>::kSlots] = {};
#pragma unroll
    for (int i = 0; Columns<BITS>::kHasHigh && i < Codes<BITS>::kSlots; ++i) {
      high[i] = __funnelshift_r(codes.high[i], codes.high[i], turned_by);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t numbers = ptx::masked_with(codes.words[0] >> 4 * i, 0x000F000Fu, Numbers<Type>::kMagic);
      if constexpr (BITS == 5) numbers |= high[0] >> i & 0x00100010u;
      if constexpr (BITS == 6) numbers |= high[i / 2] >> 2 * (i % 2) & 0x00300030u;
      pairs[i] = ptx::add_pair(numbers, VALUES == kZeros ? shift : minus_zero, Type());
    }
  }
};

// Signed bytes 2 i and 2 i + 1. The 7 bits behind the exponent of 128 hold all but the sign, which stands where it doubles the
// 128 that is taken away.
__device__ __forceinline__ uint32_t pair_of_bytes(uint32_t bytes, int i, Bf16) {
  const uint32_t pair = __byte_perm(bytes, 0x43434343u, i == 0 ? 0x4140 : 0x4342);
  return ptx::add_pair(pair & 0xFF7FFF7Fu, ptx::masked_with(pair, 0x00800080u, 0xC300C300u), Bf16());
}
// Under the exponent of 1024 there is room for 128 more than the byte, which is never negative.
__device__ __forceinline__ uint32_t pair_of_bytes(uint32_t bytes, int i, Fp16) {
  return ptx::add_pair(__byte_perm(bytes ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342), 0xE480E480u, Fp16());
}

template <class Type>
struct Expander<Type, kCentred, 8> {
  __device__ explicit Expander(const Parameters&) {}

  __device__ __forceinline__ void pairs_of(const Codes<8>& codes, uint32_t, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair_of_bytes(codes.words[i / 2], i % 2, Type());
  }
};

// A table of 16 numbers in 8 registers, as planes of their low and high bytes: a byte permutation looks four codes up at once, where
// shared memory would take a load for each pair and meet banks at random.
template <class Type>
struct Expander<Type, kTable, 4> {
  uint32_t low[4] = {}, high[4] = {};  // byte b of register r is of entry 4 r + b

  __device__ explicit Expander(const Parameters& p) {
#pragma unroll
    for (int entry = 0; entry < 16; ++entry) {
      const uint32_t bits = rounded(__ldg(p.table + entry), Type());
      low[entry / 4] |= (bits & 255) << 8 * (entry % 4);
      high[entry / 4] |= (bits >> 8) << 8 * (entry % 4);
    }
  }

  // A permutation chooses among 8 bytes by 3 bits of a nibble, so it is made for each half of the table; the codes' fourth bits
  // then choose between the halves.
  static __device__ __forceinline__ uint32_t look_up(const uint32_t (&plane)[4], uint32_t entries, uint32_t halves) {
    return __byte_perm(__byte_perm(plane[0], plane[1], entries), __byte_perm(plane[2], plane[3], entries), halves);
  }

  __device__ __forceinline__ void pairs_of(const Codes<4>& all, uint32_t, uint32_t (&pairs)[4]) const {
    uint32_t numbers[2][2];  // of the even codes, in the lower half of the word, and of the odd ones: 0 and 1, 2 and 3
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t codes = all.words[0] >> 16 * odd, entries = codes & 0x7777;
      const uint32_t halves = ptx::masked_with(codes >> 1, 0x4444, 0x3210);
      const uint32_t lower = look_up(low, entries, halves), upper = look_up(high, entries, halves);
      numbers[odd][0] = __byte_perm(lower, upper, 0x5140);
      numbers[odd][1] = __byte_perm(lower, upper, 0x7362);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = __byte_perm(numbers[0][i / 2], numbers[1][i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

}  // namespace gemma4::linear
