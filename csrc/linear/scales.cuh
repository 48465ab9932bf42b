// Scales and shifts of a stage, on their way from a weight's tensors to the fp32 that the main loop knows.
//
// A thread brings the slots of half a row of a stage. `load` asks for them, a stage ahead; `scale` and `shift` make of what has
// come the words that lie in shared memory: fp32 scales, and offsets in fp32 or the pairs of numbers that take zero points away.
#pragma once

#include "stage.cuh"

namespace gemma4::linear {

// The group of the 32 columns `block`, for groups of 32 * d columns: block / d as a multiplication. inverse = ceil(2^31 / d) is
// exact for block * d < 2^31, and the C interface lets k go to 2^20.
__device__ __forceinline__ uint32_t group_of(uint32_t block, uint32_t inverse) { return __umulhi(2 * block, inverse); }

struct Fp16Scale {
  using Raw = uint16_t;
  static __device__ __forceinline__ float value(Raw raw) { return ptx::fp16_to_float(raw); }
};
struct Bf16Scale {
  using Raw = uint16_t;
  static __device__ __forceinline__ float value(Raw raw) { return __uint_as_float(uint32_t(raw) << 16); }
};
// A power of two, 2^(e - 128), by its exponent; the two smallest are subnormal.
struct E8m0Scale {
  using Raw = unsigned char;
  static __device__ __forceinline__ float value(Raw raw) {
    return __uint_as_float(raw < 2 ? 0x200000u << raw : uint32_t(raw - 1) << 23);
  }
};
struct Fp32Scale {
  using Raw = float;
  static __device__ __forceinline__ float value(Raw raw) { return raw; }
};

// One number for each group of any multiple of 32 columns; zero points as bytes, offsets as the scales.
template <class Element, Values VALUES, int SLOTS = 4>
struct PlainScales {
  using Raw = typename Element::Raw;
  const Raw* scales;
  const Raw* offsets;
  const unsigned char* zeros;
  Raw raw[SLOTS], raw_offset[SLOTS];
  uint32_t raw_zero[SLOTS];

  __device__ PlainScales(const Parameters& p, int row) {
    const int64_t first = int64_t(row) * p.groups;
    scales = ptx::kept(static_cast<const Raw*>(p.scales) + first);
    if (VALUES == kOffsets) offsets = ptx::kept(static_cast<const Raw*>(p.shifts) + first);
    if (VALUES == kZeros) zeros = ptx::kept(static_cast<const unsigned char*>(p.shifts) + first);
  }

  // Slots from `slot` on; those from `present` on are zero.
  __device__ __forceinline__ void load(const Parameters& p, int slot, int present) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const uint32_t group = group_of(slot + i, p.group_inverse);
      raw[i] = i < present ? __ldg(scales + group) : Raw(0);
      if (VALUES == kOffsets) raw_offset[i] = i < present ? __ldg(offsets + group) : Raw(0);
      if (VALUES == kZeros) raw_zero[i] = i < present ? __ldg(zeros + group) : 0;
    }
  }

  __device__ __forceinline__ float scale(int i) const { return Element::value(raw[i]); }

  template <class Type>
  __device__ __forceinline__ uint32_t shift(int i) const {
    return VALUES == kOffsets ? __float_as_uint(Element::value(raw_offset[i])) : minus<Type>(raw_zero[i]);
  }
};

// Q4_K and Q5_K: 256 columns, which are a stage, have two fp16 numbers and 6-bit codes of 8 scales and 8 offsets in three words.
// Products of the two are exact in fp32.
struct SixBitScales {
  const uint16_t* outer;
  const uint16_t* outer_offset;
  const uint32_t* codes;
  int first;  // of the four slots within the 256 columns
  uint16_t raw, raw_offset;
  uint32_t words[3];

  __device__ SixBitScales(const Parameters& p, int row) {
    const int64_t first_super = int64_t(row) * (p.k / kSuperColumns);
    outer = ptx::kept(static_cast<const uint16_t*>(p.scales) + first_super);
    outer_offset = ptx::kept(static_cast<const uint16_t*>(p.shifts) + first_super);
    codes = ptx::kept(static_cast<const uint32_t*>(p.group_scales) + 3 * first_super);
  }

  __device__ __forceinline__ void load(const Parameters&, int slot, int present) {
    const uint32_t super = uint32_t(slot) / 8;
    first = slot % 8;
    const bool here = present > 0;
    raw = here ? __ldg(outer + super) : uint16_t(0);
    raw_offset = here ? __ldg(outer_offset + super) : uint16_t(0);
#pragma unroll
    for (int i = 0; i < 3; ++i) words[i] = here ? __ldg(codes + 3 * super + i) : 0;
  }

  __device__ __forceinline__ float six_bits(uint32_t low, uint32_t high, int i) const {
    return float((low >> 4 * (first + i) & 15) | (high >> 2 * (first + i) & 3) << 4);
  }

  __device__ __forceinline__ float scale(int i) const { return ptx::fp16_to_float(raw) * six_bits(words[0], words[2], i); }

  template <class Type>
  __device__ __forceinline__ uint32_t shift(int i) const {
    return __float_as_uint(-(ptx::fp16_to_float(raw_offset) * six_bits(words[1], words[2] >> 16, i)));
  }
};

// IQ4_XS and Q6_K: 256 columns have one fp16 number, and a signed byte for each 32 or 16 of them. The product is exact in fp32.
template <int SLOTS>
struct Int8Scales {
  const uint16_t* outer;
  const uint32_t* inner;
  uint16_t raw;
  uint32_t fours[SLOTS / 4];

  __device__ Int8Scales(const Parameters& p, int row) {
    outer = ptx::kept(static_cast<const uint16_t*>(p.scales) + int64_t(row) * (p.k / kSuperColumns));
    inner = ptx::kept(static_cast<const uint32_t*>(p.group_scales) + int64_t(row) * (p.groups / 4));
  }

  __device__ __forceinline__ void load(const Parameters&, int slot, int present) {
    raw = present > 0 ? __ldg(outer + uint32_t(slot) / (2 * SLOTS)) : uint16_t(0);
#pragma unroll
    for (int i = 0; i < SLOTS / 4; ++i) fours[i] = present > 0 ? __ldg(inner + uint32_t(slot) / 4 + i) : 0;
  }

  __device__ __forceinline__ float scale(int i) const {
    return ptx::fp16_to_float(raw) * float(int32_t(fours[i / 4] << (24 - 8 * (i % 4))) >> 24);
  }
};

// NF4 and FP4 nested: a byte for each group, the place of a number in a table. The number times that of 256 groups, which lie in
// order across rows, plus a number of the whole weight. The table is looked up last, when the bytes have come; it stays in L1.
struct NestedScales {
  const unsigned char* scales;
  const float* outer;
  const float* table;
  uint32_t first;  // of the row's groups, counted from the first that shares its outer number
  float offset;
  unsigned char raw[4];
  float raw_outer[4];

  __device__ NestedScales(const Parameters& p, int row) : table(p.scale_table), offset(__ldg(p.scale_offset)) {
    const int64_t first_group = int64_t(row) * p.groups;
    scales = ptx::kept(static_cast<const unsigned char*>(p.scales) + first_group);
    outer = ptx::kept(p.scale_scales + first_group / 256);
    first = uint32_t(first_group % 256);
  }

  __device__ __forceinline__ void load(const Parameters& p, int slot, int present) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t group = group_of(slot + i, p.group_inverse);
      raw[i] = i < present ? __ldg(scales + group) : 0;
      raw_outer[i] = i < present ? __ldg(outer + (first + group) / 256) : 0;
    }
  }

  __device__ __forceinline__ float scale(int i) const { return fmaf(__ldg(table + raw[i]), raw_outer[i], offset); }
};

}  // namespace gemma4::linear
