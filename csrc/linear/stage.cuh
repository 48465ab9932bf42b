// What the parts of the product share: its parameters, the two 16-bit types, and the map of a stage in shared memory.
#pragma once

#include "../common/device.cuh"

namespace gemma4::linear {

using ptx::Bf16;
using ptx::Fp16;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kOutputs = 16 * kWarps;      // of a block
constexpr int kCodeBytes = 128;            // of a row in a stage
constexpr int kTileRows = 8;               // rows of x that one mma takes
constexpr int kSuperColumns = 256;         // that share the outer one of two scales
// Of two blocks on a multiprocessor of sm_86, which has 100 KiB and keeps 1 KiB of them for each block.
constexpr int kMostBlockBytes = 49 * 1024;

// The tensors of a weight.
struct Weight {
  const unsigned char* codes;    // (n, k / 2); of 8 bits (n, k)
  const unsigned char* high;     // of 5 bits uint32 (n, k / 32), of 6 bits uint32 (n, k / 16), else null
  const void* scales;            // (n, groups); six-bit and int8: (n, k / 256) fp16; nested: uint8 (n, groups)
  const void* shifts;            // offsets as scales, or zeros uint8 (n, groups), or null
  const void* group_scales;      // six-bit: uint32 (n, k / 256, 3); int8: (n, groups)
  const float* table;            // 16 numbers, or null
  const float* scale_table;      // nested: 256 numbers,
  const float* scale_scales;     // one for 256 groups, which may be of two rows,
  const float* scale_offset;     // and one for all
};

// What becomes of a block's sums: the product, GeLU of one weight's times the other's, or the largest of each row of x.
enum Result { kProduct = 0, kGeglu = 1, kArgmax = 2 };

// A logit, rounded, and which it is. Of NaN it says infinity and -1, so that nothing comes before it.
struct Candidate {
  float value;
  int index;
};

struct Parameters : Weight {
  Weight up;                     // beside the gate, for kGeglu
  const unsigned char* x;
  void* out;                     // for kArgmax int64 (m)
  const void* bias;              // (n), or null
  const void* residual;          // (m, n) as out, or null
  float* partial;                // (pieces, weights, m, n) fp32, or null where there is one piece
  Candidate* candidates;         // (m, blocks), for kArgmax where there is one piece
  int64_t x_stride;              // bytes
  int64_t out_stride;            // elements
  int64_t residual_stride;       // elements
  int n, k, m, groups;
  int piece_stages;              // stages of a piece; the last may have fewer
  uint32_t group_inverse;        // see `group_of`
  uint32_t zero;                 // of the whole weight
  int bias_dtype;                // gemma4_dtype
  Result result;
};

// Outputs of a block: the rows of its stages, or half of them where the other half is up's.
constexpr int kPairs = kOutputs / 2;
inline int64_t blocks_of(int64_t n, Result result) {
  const int outputs = result == kGeglu ? kPairs : kOutputs;
  return (n + outputs - 1) / outputs;
}

// How a code becomes a value, in the numbers of gemma4_values.
enum Values { kCentred = 0, kZeros = 1, kOffsets = 2, kTable = 3 };

// What the two 16-bit types differ in. A code in the lowest bits of MAGIC is the number BASE + code, exactly.
template <class Type>
struct Numbers;
template <>
struct Numbers<Bf16> {
  static constexpr uint32_t kMagic = 0x43004300;     // 128, whose last place counts ones
  static constexpr uint32_t kMinusBase = 0xC3000000;  // -128; the same holds for its last place
  static constexpr uint32_t kOnes = 0x3F803F80;
};
template <>
struct Numbers<Fp16> {
  static constexpr uint32_t kMagic = 0x64006400;  // 1024
  static constexpr uint32_t kMinusBase = 0xE4000000;
  static constexpr uint32_t kOnes = 0x3C003C00;
};

__device__ __forceinline__ uint16_t rounded(float value, Bf16) { return ptx::round_to_bf16(value); }
__device__ __forceinline__ uint16_t rounded(float value, Fp16) { return ptx::round_to_fp16(value); }
__device__ __forceinline__ float number_of(uint16_t bits, Bf16) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float number_of(uint16_t bits, Fp16) { return ptx::fp16_to_float(bits); }

// The pair of numbers that takes base and zero point from a pair of codes with MAGIC: -(base + zero), twice.
template <class Type>
__device__ __forceinline__ uint32_t minus(uint32_t zero) {
  return (Numbers<Type>::kMinusBase >> 16 | zero) * 0x10001u;
}

// The columns of a stage, by the bits of a code. A slot is what shares a scale at least.
template <int BITS>
struct Columns {
  static constexpr int kColumns = BITS == 8 ? 128 : 256;
  static constexpr int kSlotColumns = BITS == 6 ? 16 : 32;
  static constexpr int kSlots = kColumns / kSlotColumns;
  static constexpr int kChunkColumns = BITS == 8 ? 16 : 32;  // of 16 bytes of codes
  static constexpr bool kHasHigh = BITS == 5 || BITS == 6;   // bits above the fourth: a word for each slot
};

// The columns of a stage at run time.
inline int stage_columns(int bits) { return bits == 8 ? Columns<8>::kColumns : Columns<4>::kColumns; }

// Where things lie in a stage, and how many stages there are.
template <int TILES, Values VALUES, int BITS>
struct Stage : Columns<BITS> {
  using Columns<BITS>::kColumns;
  using Columns<BITS>::kSlots;
  static constexpr int kRowBytes = kColumns * 2;            // of x
  static constexpr int kSlotBytes = kOutputs * kSlots * 4;  // of a word for each slot
  static constexpr int kHigh = kOutputs * kCodeBytes;
  static constexpr int kX = kHigh + (Columns<BITS>::kHasHigh ? kSlotBytes : 0);
  static constexpr int kScales = kX + TILES * kTileRows * kRowBytes;
  static constexpr int kShifts = kScales + kSlotBytes;
  static constexpr bool kHasShifts = VALUES == kZeros || VALUES == kOffsets;
  static constexpr int kBytes = kShifts + (kHasShifts ? kSlotBytes : 0);
  // Behind the ring: sums of x over the columns of a slot, one for each row of x.
  static constexpr int kSumRow = TILES * kTileRows * 4;
  static constexpr int kSumBytes = VALUES == kOffsets ? kSlots * kSumRow : 0;
  static constexpr int kStages = (kMostBlockBytes - kSumBytes) / kBytes;
  static constexpr int kRingBytes = kBytes * kStages;
  static constexpr int kSharedBytes = kRingBytes + kSumBytes;
  static_assert(kStages >= 2, "one stage is filled while another is used");

  // Chunks of 16 bytes of a row, in the order in which they lie: see the map in decode.cuh.
  static __device__ __forceinline__ int code_chunk(int chunk, int row) {
    return chunk ^ (BITS == 8 ? 2 * (row % 4) : row % 8);
  }
  static __device__ __forceinline__ int x_chunk(int chunk, int row) {
    return chunk ^ (BITS == 6 ? 2 * (row % 4) : 4 * (row % 2));
  }
  // The place of four slots of a row among the words of slots.
  static constexpr int kQuads = kSlots / 4;
  static __device__ __forceinline__ int quad_place(int quad, int row) {
    return row * kSlots * 4 + (quad ^ row / (8 / kQuads) % kQuads) * 16;
  }
};

}  // namespace gemma4::linear
