// The codes of a warp's 16 outputs, from a stage to registers.
//
// Lane 4 g + t of a warp has rows g and g + 8. Of 32 columns it holds eight: 8 t to 8 t + 7, which are word t of 16 bytes. Where groups
// have 16 columns and a product must not take more, it holds four of each group: those from 8 (t % 2) + 4 (t / 2).
#pragma once

#include "stage.cuh"

namespace gemma4::linear {

// What a lane has of a row and 32 columns: the words of its codes, and above four bits those of the slots.
template <int BITS>
struct Codes {
  static constexpr int kWords = BITS == 8 ? 2 : 1;
  static constexpr int kSlots = BITS == 6 ? 2 : 1;
  uint32_t words[kWords];
  uint32_t high[kSlots];
};

// The first bit of a lane's pairs of columns in the words that hold one slot's bits above the fourth.
template <int BITS>
__device__ __forceinline__ int first_high_bit(int t) {
  return BITS == 6 ? 8 * (t % 2) + 4 * (t / 2) : 4 * t;
}

// Reads 64 columns at a time: codes[i][j] are those of columns from 32 i, of row g + 8 j.
template <int BITS>
struct Reader {
  const unsigned char* row;
  int first_chunk;

  // Lane l names row l % 8 of matrix l / 8 to ldmatrix: the rows from 0, from 8, then the same of the next 16 bytes.
  __device__ explicit Reader(const unsigned char* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    row = stage + (warp * 16 + lane % 16) * kCodeBytes;
    first_chunk = lane / 16 ^ lane % 8;
  }

  __device__ __forceinline__ void read(int number, Codes<BITS> (&codes)[2][2]) const {
    uint32_t words[4];
    ptx::load_matrices(words, row + (2 * number ^ first_chunk) * 16);
    if constexpr (BITS == 6) {
      deal(words[0], words[2]);
      deal(words[1], words[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i / 2][i % 2].words[0] = words[i];
  }

  // ldmatrix gives a lane a word of one group of 16 columns, where four of its columns and four of the other group are wanted.
  // Lanes t and t ^ 2 have both, and give each other half of each of two words. Of what comes of it pairs 0 and 1 are of the first
  // group, at the bits that they have in any word.
  static __device__ __forceinline__ void deal(uint32_t& one, uint32_t& other) {
    const bool upper = threadIdx.x % 4 / 2;
    const uint32_t got = ptx::from_lane_across(__byte_perm(one, other, upper ? 0x6420 : 0x7531), 2);
    one = __byte_perm(one, got, upper ? 0x3514 : 0x5240);
    other = __byte_perm(other, got, upper ? 0x3716 : 0x7260);
  }
};

// Bytes: a lane's eight columns are two words side by side, which ldmatrix would give to two lanes.
template <>
struct Reader<8> {
  const unsigned char* columns;
  int first_pair;

  __device__ explicit Reader(const unsigned char* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    columns = stage + (warp * 16 + g) * kCodeBytes + t * 8;
    first_pair = g % 4;
  }

  __device__ __forceinline__ void read(int number, Codes<8> (&codes)[2][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 words =
          *reinterpret_cast<const uint2*>(columns + ((2 * number + i / 2) ^ first_pair) * 32 + i % 2 * 8 * kCodeBytes);
      codes[i / 2][i % 2].words[0] = words.x;
      codes[i / 2][i % 2].words[1] = words.y;
    }
  }
};

}  // namespace gemma4::linear
