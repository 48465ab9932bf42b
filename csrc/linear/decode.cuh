// out (m, n) = x (m, k) W^T for up to 16 rows of x and 4-bit codes: what a token, or the verification of a few drafts, waits for.
//
// A block owns 64 outputs and a piece of K. Its 4 warps own 16 outputs each and share x. A piece goes by in stages of 256 columns,
// through a ring of shared memory that cp.async fills ahead. Of a stage:
//
//     codes    64 rows of 128 bytes                            16-byte chunk c of row r stands at chunk c ^ (r % 8)
//     x        8 * TILES rows of 512 bytes                     chunk c of row m at chunk c ^ (4 * (m % 2))
//     scales   64 rows of 8 floats, one for 32 columns         half h of row r at half h ^ (r / 4 % 2)
//     shifts   the same: offsets, or for zero points the pairs of 16-bit numbers to add; only where there are any
//
// so that no ldmatrix and no 16-byte load meets a bank twice. Scales pass through registers and become fp32 on the way, in whatever
// form a weight has them: the main loop knows one form.
//
// The weight is the 16-row operand A of mma.m16n8k16, x the 8-column operand B. 32 columns of a weight's row are 4 words, 16 bytes;
// ldmatrix gives word t to lane t of a row's four. Its codes are columns 8t to 8t + 7, and the mma's own column numbers are
// given to them as they come: a sum has no order, if x comes in the same one, and 16 bytes of x from column 8t are just that.
// Two mma make the product of 32 columns; their fp32 sum times the scale joins the accumulator, so codes are never rounded. Offsets
// are multiplied with the sum of x over the 32 columns, which the warps make for each other.
//
// For GeGLU the last 32 of a block's 64 rows are those of a second weight, up, of the same outputs as the first 32, the gate's:
// two warps each, one x. What becomes of the sums is decided when they are there (epilogue.cuh), so the main loop is one for all.
//
// A row of out depends on its own row of x: the columns of B do not meet. Pieces of K follow from the weight's shape and the device.
#pragma once

#include "epilogue.cuh"
#include "expand.cuh"
#include "scales.cuh"

namespace gemma4::linear {

// The parameters with the weight that a block's row is of.
__device__ __forceinline__ Parameters of_row(const Parameters& p, int block_row) {
  Parameters found = p;
  if (is_of_up(p, block_row)) static_cast<Weight&>(found) = p.up;
  return found;
}

// The row of the weight that a block's row is. Outputs beyond the last read its row; nobody stores what they come to.
__device__ __forceinline__ int row_of_weight(const Parameters& p, int block_row) {
  const int output = output_of(p, block_row);
  return output < p.n ? output : p.n - 1;
}

// What a thread brings of a stage: chunks of codes and of x by cp.async, and four scales of one row through registers.
template <class Type, class Scales, Values VALUES, int TILES>
struct Loader {
  using Layout = Stage<TILES, VALUES>;
  static constexpr int kCodeChunks = kOutputs * kCodeBytes / 16 / kThreads;
  static constexpr int kXChunks = TILES * kTileRows * kRowBytes / 16 / kThreads;
  static constexpr int kCodeRows = kThreads / (kCodeBytes / 16);  // rows that all threads cover with one chunk each
  static constexpr int kXRows = kThreads / (kRowBytes / 16);

  const Parameters& p;
  uint64_t policy = ptx::evict_first_policy();
  const unsigned char* codes[kCodeChunks];
  const unsigned char* x[kXChunks];
  uint32_t x_bytes[kXChunks];  // 0 for rows that x does not have
  int code_target, x_target, scale_target;
  int end;                    // of the piece: the column after its last
  int code_column, x_column;  // of the thread's chunks in the next stage
  int block;                  // of its scales, in blocks of 32 columns
  Scales scales;

  __device__ Loader(const Parameters& parameters, int first_stage, int stages)
      : p(parameters), scales(of_row(parameters, threadIdx.x / 2), row_of_weight(parameters, threadIdx.x / 2)) {
    const int thread = threadIdx.x;
    end = (first_stage + stages) * kColumns < p.k ? (first_stage + stages) * kColumns : p.k;
    const int code_chunk = thread % (kCodeBytes / 16), code_row = thread / (kCodeBytes / 16);
    code_column = first_stage * kColumns + code_chunk * 32;
    code_target = code_row * kCodeBytes + (code_chunk ^ code_row % 8) * 16;
    for (int i = 0; i < kCodeChunks; ++i) {
      const int row = code_row + i * kCodeRows;
      codes[i] = of_row(p, row).codes + int64_t(row_of_weight(p, row)) * (p.k / 2) + code_column / 2;
    }
    const int x_chunk = thread % (kRowBytes / 16), x_row = thread / (kRowBytes / 16);
    x_column = first_stage * kColumns + x_chunk * 8;
    x_target = Layout::kX + x_row * kRowBytes + (x_chunk ^ 4 * (x_row % 2)) * 16;
    for (int i = 0; i < kXChunks; ++i) {
      const int row = x_row + i * kXRows;
      x_bytes[i] = row < p.m ? 16 : 0;
      x[i] = p.x + (row < p.m ? row * p.x_stride : 0) + int64_t(x_column) * 2;
    }
    const int scale_row = thread / 2, half = thread % 2;
    block = first_stage * kSlots + 4 * half;
    scale_target = Layout::kScales + scale_row * kSlots * 4 + (half ^ scale_row / 4 % 2) * 16;
  }

  // Begins the stage that is so many ahead. Columns beyond the piece, in its last stage and after it, become zeros and are not read.
  __device__ __forceinline__ void begin(unsigned char* stage, int ahead) {
    const uint32_t bytes = code_column < end - ahead * kColumns ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCodeChunks; ++i) {
      ptx::copy_16_once(stage + code_target + i * kCodeRows * kCodeBytes, codes[i] + ahead * kCodeBytes, bytes, policy);
    }
#pragma unroll
    for (int i = 0; i < kXChunks; ++i) {
      const uint32_t bytes = x_column < end - ahead * kColumns ? x_bytes[i] : 0;
      ptx::copy_16(stage + x_target + i * kXRows * kRowBytes, x[i] + ahead * kRowBytes, bytes);
    }
    scales.load(p, block + ahead * kSlots, end / 32 - ahead * kSlots - block);
  }

  __device__ __forceinline__ void advance(int stages) {
#pragma unroll
    for (int i = 0; i < kCodeChunks; ++i) codes[i] += stages * kCodeBytes;
#pragma unroll
    for (int i = 0; i < kXChunks; ++i) x[i] += stages * kRowBytes;
    code_column += stages * kColumns;
    x_column += stages * kColumns;
    block += stages * kSlots;
  }

  // Puts the stage's scales to the rest of it: as late as may be, so that nobody waits for them.
  __device__ __forceinline__ void finish(unsigned char* stage) const {
    *reinterpret_cast<float4*>(stage + scale_target) =
        make_float4(scales.scale(0), scales.scale(1), scales.scale(2), scales.scale(3));
    if constexpr (Layout::kHasShifts) {
      *reinterpret_cast<uint4*>(stage + scale_target + Layout::kShifts - Layout::kScales) =
          make_uint4(scales.template shift<Type>(0), scales.template shift<Type>(1), scales.template shift<Type>(2),
                     scales.template shift<Type>(3));
    }
  }
};

// Sums of x over the 32 columns of each slot, which offsets are multiplied with: products with ones. A warp makes those of two
// slots.
template <class Type, int TILES>
__device__ __forceinline__ void sum_columns(const unsigned char* stage, unsigned char* column_sums) {
  using Layout = Stage<TILES, kOffsets>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  constexpr uint32_t ONES = Numbers<Type>::kOnes;
#pragma unroll
  for (int i = 0; i < kSlots / kWarps; ++i) {
    const int slot = warp * (kSlots / kWarps) + i;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const unsigned char* columns = stage + Layout::kX + (tile * kTileRows + g) * kRowBytes + ((slot ^ g % 2) * 4 + t) * 16;
      const uint4 b = *reinterpret_cast<const uint4*>(columns);
      float sum[4] = {0, 0, 0, 0};
      ptx::multiply<Type>(sum, {ONES, ONES, ONES, ONES}, {b.x, b.y}, sum);
      ptx::multiply<Type>(sum, {ONES, ONES, ONES, ONES}, {b.z, b.w}, sum);
      // All rows of the product are the same; the first has rows 2t and 2t + 1 of x in lane t.
      unsigned char* place = column_sums + slot * Layout::kSumRow + (tile * kTileRows + 2 * t) * 4;
      if (g == 0) *reinterpret_cast<float2*>(place) = {sum[0], sum[1]};
    }
  }
}

// What a warp makes of a stage: its 16 outputs for all rows of x.
template <class Type, Values VALUES, int TILES>
__device__ __forceinline__ void fold(const unsigned char* stage, const unsigned char* column_sums,
                                     const Expander<Type, VALUES>& expander, float (&sums)[TILES][4]) {
  using Layout = Stage<TILES, VALUES>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // Lane l names row l % 8 of matrix l / 8: the rows from 0, from 8, then the same of the next 16 bytes.
  const int matrix_row = warp * 16 + lane % 16;
  const unsigned char* codes = stage + matrix_row * kCodeBytes;
  const int first_chunk = lane / 16 ^ lane % 8;
  const unsigned char* x = stage + Layout::kX + g * kRowBytes + t * 16;
  const int swapped = g % 2;
  const unsigned char* scales = stage + Layout::kScales + (warp * 16 + g) * kSlots * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int offset = (half ^ g / 4 % 2) * 16;
    float upper_scale[4], lower_scale[4];
    *reinterpret_cast<float4*>(upper_scale) = *reinterpret_cast<const float4*>(scales + offset);
    *reinterpret_cast<float4*>(lower_scale) = *reinterpret_cast<const float4*>(scales + offset + 8 * kSlots * 4);
    uint32_t upper_shift[4] = {}, lower_shift[4] = {};
    if constexpr (Layout::kHasShifts) {
      const unsigned char* shifts = scales + (Layout::kShifts - Layout::kScales) + offset;
      *reinterpret_cast<uint4*>(upper_shift) = *reinterpret_cast<const uint4*>(shifts);
      *reinterpret_cast<uint4*>(lower_shift) = *reinterpret_cast<const uint4*>(shifts + 8 * kSlots * 4);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t words[4];  // rows g and g + 8 of one group of columns, then of the next
      ptx::load_matrices(words, codes + ((4 * half + 2 * pair) ^ first_chunk) * 16);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int slot = 2 * pair + which;
        uint32_t upper[4], lower[4];
        expander.pairs_of(words[2 * which], upper_shift[slot], upper);
        expander.pairs_of(words[2 * which + 1], lower_shift[slot], lower);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const unsigned char* columns = x + tile * kTileRows * kRowBytes + (4 * half + 2 * pair) * 64 + (which ^ swapped) * 64;
          const uint4 b = *reinterpret_cast<const uint4*>(columns);
          float product[4] = {0, 0, 0, 0};
          ptx::multiply<Type>(product, {upper[0], lower[0], upper[1], lower[1]}, {b.x, b.y}, product);
          ptx::multiply<Type>(product, {upper[2], lower[2], upper[3], lower[3]}, {b.z, b.w}, product);
          sums[tile][0] = fmaf(upper_scale[slot], product[0], sums[tile][0]);
          sums[tile][1] = fmaf(upper_scale[slot], product[1], sums[tile][1]);
          sums[tile][2] = fmaf(lower_scale[slot], product[2], sums[tile][2]);
          sums[tile][3] = fmaf(lower_scale[slot], product[3], sums[tile][3]);
          if constexpr (VALUES == kOffsets) {
            const int place = (4 * half + slot) * Layout::kSumRow + (tile * kTileRows + 2 * t) * 4;
            const float2 sum = *reinterpret_cast<const float2*>(column_sums + place);
            sums[tile][0] = fmaf(__uint_as_float(upper_shift[slot]), sum.x, sums[tile][0]);
            sums[tile][1] = fmaf(__uint_as_float(upper_shift[slot]), sum.y, sums[tile][1]);
            sums[tile][2] = fmaf(__uint_as_float(lower_shift[slot]), sum.x, sums[tile][2]);
            sums[tile][3] = fmaf(__uint_as_float(lower_shift[slot]), sum.y, sums[tile][3]);
          }
        }
      }
    }
  }
}

template <class Type, class Scales, Values VALUES, int TILES>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const Parameters p) {
  constexpr int STAGES = Stage<TILES, VALUES>::kStages, BYTES = Stage<TILES, VALUES>::kBytes;
  GEMMA4_SHARED(ring);
  const int piece = blockIdx.y;
  const int first_stage = piece * p.piece_stages;
  const int all_stages = (p.k + kColumns - 1) / kColumns;
  const int stages = p.piece_stages < all_stages - first_stage ? p.piece_stages : all_stages - first_stage;
  Loader<Type, Scales, VALUES, TILES> loader(p, first_stage, stages);
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    loader.begin(ring + stage * BYTES, stage);
    loader.finish(ring + stage * BYTES);
    ptx::commit();
  }
  unsigned char* column_sums = ring + STAGES * BYTES;
  const Expander<Type, VALUES> expander(of_row(p, threadIdx.x / 32 * 16));
  float sums[TILES][4] = {};
  // A pass of the loop is a round of the ring, so that slots are known to the compiler.
  for (int first = 0; first < stages; first += STAGES) {
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) {
      if (first + slot >= stages) break;
      ptx::wait<STAGES - 2>();
      __syncthreads();  // everyone's copies of this stage have arrived, and everyone has left the slot that is filled next
      unsigned char* filling = ring + (slot + STAGES - 1) % STAGES * BYTES;
      loader.begin(filling, slot + STAGES - 1);
      ptx::commit();
      if constexpr (VALUES == kOffsets) {
        sum_columns<Type, TILES>(ring + slot * BYTES, column_sums);
        __syncthreads();
      }
      fold<Type, VALUES, TILES>(ring + slot * BYTES, column_sums, expander, sums);
      loader.finish(filling);
    }
    loader.advance(STAGES);
  }
  ptx::wait<0>();  // no copy may be under way when the block ends
  finish<Type, TILES>(p, piece, ring, sums);
}

}  // namespace gemma4::linear
