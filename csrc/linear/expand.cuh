// From a word of eight codes to four pairs of 16-bit numbers, in registers.
#pragma once

#include "stage.cuh"

namespace gemma4::linear {

// A code under the exponent of MAGIC is a number; one addition takes away what is too much.
template <class Type, Values VALUES>
struct Expander {
  uint32_t minus_zero;

  __device__ explicit Expander(const Parameters& p) : minus_zero(minus<Type>(p.zero)) {}

  // The group's zero point where there is one; an offset is not of the code.
  __device__ __forceinline__ void pairs_of(uint32_t word, uint32_t shift, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t numbers = ptx::masked_with(word >> 4 * i, 0x000F000Fu, Numbers<Type>::kMagic);
      pairs[i] = ptx::add_pair(numbers, VALUES == kZeros ? shift : minus_zero, Type());
    }
  }
};

// A table of 16 numbers in 8 registers, as planes of their low and high bytes: a byte permutation looks four codes up at once, where
// shared memory would take a load for each pair and meet banks at random.
template <class Type>
struct Expander<Type, kTable> {
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

  __device__ __forceinline__ void pairs_of(uint32_t word, uint32_t, uint32_t (&pairs)[4]) const {
    uint32_t numbers[2][2];  // of the even codes, in the lower half of the word, and of the odd ones: 0 and 1, 2 and 3
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t codes = word >> 16 * odd, entries = codes & 0x7777, halves = ptx::masked_with(codes >> 1, 0x4444, 0x3210);
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
