// out (m, n) = x (m, k) W^T for up to 16 rows of x and codes of 4, 5, 6 or 8 bits: what a token, or the verification of a few
// drafts, waits for.
//
// A block owns 64 outputs and a piece of K. Its 4 warps own 16 outputs each and share x. A piece goes by in stages of 256 columns,
// of 8 bits 128, through a ring of shared memory that cp.async fills ahead. Of a stage:
//
//     codes    64 rows of 128 bytes, the lowest 4 bits or 8     16-byte chunk c of row r stands at chunk c ^ (r % 8);
//                                                               of 8 bits at chunk c ^ (2 * (r % 4))
//     high     64 rows of a word for each slot: 5th bits, or    as scales
//              5th and 6th; only where there are any
//     x        8 * TILES rows of 512 bytes, of 8 bits 256       chunk c of row m at chunk c ^ (4 * (m % 2));
//                                                               of 6 bits at chunk c ^ (2 * (m % 4))
//     scales   64 rows of 4, 8 or 16 floats, one for a slot,    four of them, f, of row r at f ^ (r / 4 % 2);
//              which is 32 columns, of 6 bits 16                of 16 floats at f ^ (r / 2 % 4)
//     shifts   as scales: offsets, or for zero points the pairs of 16-bit numbers to add; only where there are any
//
// so that no ldmatrix and no 8- or 16-byte load meets a bank twice. Scales pass through registers and become fp32 on the way, in
// whatever form a weight has them: the main loop knows one form.
//
// The weight is the 16-row operand A of mma.m16n8k16, x the 8-column operand B. 32 columns of a weight's row are 4 words, 16 bytes;
// ldmatrix gives word t to lane t of a row's four. Its codes are columns 8t to 8t + 7, and the mma's own column numbers are
// given to them as they come: a sum has no order, if x comes in the same one, and 16 bytes of x from column 8t are just that.
// Two mma make the product of 32 columns, or one that of 16; its fp32 sum times the scale joins the accumulator, so codes are never
// rounded. Offsets are multiplied with the sum of x over the 32 columns, which the warps make for each other.
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

// What a thread brings of a stage: chunks of codes and of x by cp.async, and the scales of half a row through registers.
template <class Type, class Scales, Values VALUES, int BITS, int TILES>
struct Loader {
  using Layout = Stage<TILES, VALUES, BITS>;
  static constexpr int kColumns = Layout::kColumns, kSlots = Layout::kSlots, kSlotColumns = Layout::kSlotColumns;
  static constexpr int kRowBytes = Layout::kRowBytes, kChunkColumns = Layout::kChunkColumns;
  static constexpr int kThreadSlots = kSlots * kOutputs / kThreads;
  static constexpr int kCodeChunks = kOutputs * kCodeBytes / 16 / kThreads;
  static constexpr int kXChunks = TILES * kTileRows * kRowBytes / 16 / kThreads;
  static constexpr int kCodeRows = kThreads / (kCodeBytes / 16);  // rows that all threads cover with one chunk each
  static constexpr int kXRows = kThreads / (kRowBytes / 16);

  const Parameters& p;
  uint64_t policy = ptx::evict_first_policy();
  const unsigned char* codes[kCodeChunks];
  const unsigned char* high;
  const unsigned char* x[kXChunks];
  uint32_t x_bytes[kXChunks];  // 0 for rows that x does not have
  int code_target, x_target, slot_target;
  int end;                    // of the piece: the column after its last
  int code_column, x_column;  // of the thread's chunks in the next stage
  int first_slot;             // of its scales
  bool whole_chunks;          // rows of `high` begin at multiples of 16 bytes; of 6 bits they always do
  Scales scales;

  __device__ Loader(const Parameters& parameters, int first_stage, int stages)
      : p(parameters), scales(of_row(parameters, threadIdx.x / 2), row_of_weight(parameters, threadIdx.x / 2)) {
    const int thread = threadIdx.x;
    end = (first_stage + stages) * kColumns < p.k ? (first_stage + stages) * kColumns : p.k;
    const int code_chunk = thread % (kCodeBytes / 16), code_row = thread / (kCodeBytes / 16);
    code_column = first_stage * kColumns + code_chunk * kChunkColumns;
    code_target = code_row * kCodeBytes + Layout::code_chunk(code_chunk, code_row) * 16;
    constexpr int kByteColumns = kChunkColumns / 16;
    for (int i = 0; i < kCodeChunks; ++i) {
      const int row = code_row + i * kCodeRows;
      codes[i] = of_row(p, row).codes + int64_t(row_of_weight(p, row)) * (p.k / kByteColumns) + code_column / kByteColumns;
    }
    const int x_chunk = thread % (kRowBytes / 16), x_row = thread / (kRowBytes / 16);
    x_column = first_stage * kColumns + x_chunk * 8;
    x_target = Layout::kX + x_row * kRowBytes + Layout::x_chunk(x_chunk, x_row) * 16;
    for (int i = 0; i < kXChunks; ++i) {
      const int row = x_row + i * kXRows;
      x_bytes[i] = row < p.m ? 16 : 0;
      x[i] = p.x + (row < p.m ? row * p.x_stride : 0) + int64_t(x_column) * 2;
    }
    const int slot_row = thread / 2, slot = thread % 2 * kThreadSlots;
    first_slot = first_stage * kSlots + slot;
    slot_target = Layout::quad_place(slot / 4, slot_row) + slot % 4 * 4;
    if constexpr (Layout::kHasHigh) {
      whole_chunks = p.k % (4 * kSlotColumns) == 0;
      high = of_row(p, slot_row).high + (int64_t(row_of_weight(p, slot_row)) * (p.k / kSlotColumns) + first_slot) * 4;
    }
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
    const int present = end / kSlotColumns - ahead * kSlots - first_slot;
    if constexpr (Layout::kHasHigh) begin_high(stage + Layout::kHigh, high + ahead * kSlots * 4, present);
    scales.load(p, first_slot + ahead * kSlots, present);
  }

  // Words of the thread's slots, of which some are present.
  __device__ __forceinline__ void begin_high(unsigned char* target, const unsigned char* source, int present) {
#pragma unroll
    for (int i = 0; i < kThreadSlots; i += 4) {
      unsigned char* quad = target + (slot_target ^ i * 4);
      if (BITS == 6 || whole_chunks) {
        ptx::copy_16_once(quad, source + i * 4, i < present ? 16 : 0, policy);
      } else {
#pragma unroll
        for (int j = i; j < i + 4; ++j) ptx::copy_4_once(quad + j % 4 * 4, source + j * 4, j < present ? 4 : 0, policy);
      }
    }
  }

  __device__ __forceinline__ void advance(int stages) {
#pragma unroll
    for (int i = 0; i < kCodeChunks; ++i) codes[i] += stages * kCodeBytes;
#pragma unroll
    for (int i = 0; i < kXChunks; ++i) x[i] += stages * kRowBytes;
    code_column += stages * kColumns;
    x_column += stages * kColumns;
    first_slot += stages * kSlots;
    if constexpr (Layout::kHasHigh) high += stages * kSlots * 4;
  }

  // Puts the stage's scales to the rest of it: as late as may be, so that nobody waits for them.
  __device__ __forceinline__ void finish(unsigned char* stage) const {
    unsigned char* target = stage + Layout::kScales;
    if constexpr (kThreadSlots == 2) {
      *reinterpret_cast<float2*>(target + slot_target) = {scales.scale(0), scales.scale(1)};
    } else {
#pragma unroll
      for (int i = 0; i < kThreadSlots; i += 4) {
        *reinterpret_cast<float4*>(target + (slot_target ^ i * 4)) =
            make_float4(scales.scale(i), scales.scale(i + 1), scales.scale(i + 2), scales.scale(i + 3));
      }
    }
    if constexpr (Layout::kHasShifts) {
      static_assert(kThreadSlots == 4);
      *reinterpret_cast<uint4*>(stage + Layout::kShifts + slot_target) =
          make_uint4(scales.template shift<Type>(0), scales.template shift<Type>(1), scales.template shift<Type>(2),
                     scales.template shift<Type>(3));
    }
  }
};

// Sums of x over the 32 columns of each slot, which offsets are multiplied with: products with ones. A warp makes those of two
// slots.
template <class Type, int BITS, int TILES>
__device__ __forceinline__ void sum_columns(const unsigned char* stage, unsigned char* column_sums) {
  using Layout = Stage<TILES, kOffsets, BITS>;
  constexpr int kSlots = Layout::kSlots, kRowBytes = Layout::kRowBytes;
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

// The lane's columns of x in 32 columns, one half of 64: those of `Codes`.
template <class Layout>
__device__ __forceinline__ uint4 load_x(const unsigned char* columns, int half, int g, int t) {
  if constexpr (Layout::kSlotColumns == 32) {
    return *reinterpret_cast<const uint4*>(columns + Layout::x_chunk(4 * half, g) * 16 + t * 16);
  } else {
    const unsigned char* mine = columns + t % 2 * 16 + t / 2 * 8;
    const uint2 first = *reinterpret_cast<const uint2*>(mine + Layout::x_chunk(4 * half, g) * 16);
    const uint2 second = *reinterpret_cast<const uint2*>(mine + Layout::x_chunk(4 * half + 2, g) * 16);
    return {first.x, first.y, second.x, second.y};
  }
}

// A product, which has two columns of x for the lane's two outputs, times a number of each output.
__device__ __forceinline__ void add_scaled(float (&sums)[4], float upper, float lower, const float (&product)[4]) {
  sums[0] = fmaf(upper, product[0], sums[0]);
  sums[1] = fmaf(upper, product[1], sums[1]);
  sums[2] = fmaf(lower, product[2], sums[2]);
  sums[3] = fmaf(lower, product[3], sums[3]);
}

// What a warp makes of a stage: its 16 outputs for all rows of x.
template <class Type, Values VALUES, int BITS, int TILES>
__device__ __forceinline__ void fold(const unsigned char* stage, const unsigned char* column_sums,
                                     const Expander<Type, VALUES, BITS>& expander, float (&sums)[TILES][4]) {
  using Layout = Stage<TILES, VALUES, BITS>;
  constexpr int kStepSlots = 32 / Layout::kSlotColumns, kPairs = 2 / kStepSlots;  // of a quad of slots
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Reader<BITS> reader(stage);
  const unsigned char* x = stage + Layout::kX + g * Layout::kRowBytes;
#pragma unroll
  for (int quad = 0; quad < Layout::kQuads; ++quad) {
    const unsigned char* upper_place = stage + Layout::quad_place(quad, warp * 16 + g);
    const unsigned char* lower_place = upper_place + 8 * Layout::kSlots * 4;
    float upper_scale[4], lower_scale[4];
    *reinterpret_cast<float4*>(upper_scale) = *reinterpret_cast<const float4*>(upper_place + Layout::kScales);
    *reinterpret_cast<float4*>(lower_scale) = *reinterpret_cast<const float4*>(lower_place + Layout::kScales);
    uint32_t upper_shift[4] = {}, lower_shift[4] = {}, upper_high[4] = {}, lower_high[4] = {};
    if constexpr (Layout::kHasShifts) {
      *reinterpret_cast<uint4*>(upper_shift) = *reinterpret_cast<const uint4*>(upper_place + Layout::kShifts);
      *reinterpret_cast<uint4*>(lower_shift) = *reinterpret_cast<const uint4*>(lower_place + Layout::kShifts);
    }
    if constexpr (Layout::kHasHigh) {
      *reinterpret_cast<uint4*>(upper_high) = *reinterpret_cast<const uint4*>(upper_place + Layout::kHigh);
      *reinterpret_cast<uint4*>(lower_high) = *reinterpret_cast<const uint4*>(lower_place + Layout::kHigh);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int columns = quad * kPairs + pair;  // in 64
      Codes<BITS> codes[2][2];
      reader.read(columns, codes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = (2 * pair + half) * kStepSlots;
#pragma unroll
        for (int i = 0; i < kStepSlots; ++i) {
          codes[half][0].high[i] = upper_high[slot + i];
          codes[half][1].high[i] = lower_high[slot + i];
        }
        uint32_t upper[4], lower[4];
        expander.pairs_of(codes[half][0], upper_shift[slot], upper);
        expander.pairs_of(codes[half][1], lower_shift[slot], lower);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint4 b = load_x<Layout>(x + tile * kTileRows * Layout::kRowBytes + columns * 128, half, g, t);
          float product[4] = {0, 0, 0, 0};
          ptx::multiply<Type>(product, {upper[0], lower[0], upper[1], lower[1]}, {b.x, b.y}, product);
          if constexpr (kStepSlots == 2) {
            add_scaled(sums[tile], upper_scale[slot], lower_scale[slot], product);
            product[0] = product[1] = product[2] = product[3] = 0;
          }
          ptx::multiply<Type>(product, {upper[2], lower[2], upper[3], lower[3]}, {b.z, b.w}, product);
          const int last = slot + kStepSlots - 1;
          add_scaled(sums[tile], upper_scale[last], lower_scale[last], product);
          if constexpr (VALUES == kOffsets) {
            const int place = (4 * quad + slot) * Layout::kSumRow + (tile * kTileRows + 2 * t) * 4;
            const float2 sum = *reinterpret_cast<const float2*>(column_sums + place);
            const float columns_sums[4] = {sum.x, sum.y, sum.x, sum.y};
            add_scaled(sums[tile], __uint_as_float(upper_shift[slot]), __uint_as_float(lower_shift[slot]), columns_sums);
          }
        }
      }
    }
  }
}

template <class Type, class Scales, Values VALUES, int BITS, int TILES>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const Parameters p) {
  using Layout = Stage<TILES, VALUES, BITS>;
  constexpr int STAGES = Layout::kStages, BYTES = Layout::kBytes;
  GEMMA4_SHARED(ring);
  const int piece = blockIdx.y;
  const int first_stage = piece * p.piece_stages;
  const int all_stages = (p.k + Layout::kColumns - 1) / Layout::kColumns;
  const int stages = p.piece_stages < all_stages - first_stage ? p.piece_stages : all_stages - first_stage;
  Loader<Type, Scales, VALUES, BITS, TILES> loader(p, first_stage, stages);
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    loader.begin(ring + stage * BYTES, stage);
    loader.finish(ring + stage * BYTES);
    ptx::commit();
  }
  unsigned char* column_sums = ring + STAGES * BYTES;
  const Expander<Type, VALUES, BITS> expander(of_row(p, threadIdx.x / 32 * 16));
  float sums[TILES][4] = {};
  // A pass of the loop is a round of the ring, so that slots are known to the compiler.
  for (int first = 0; first < stages; first += STAGES) {
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) {
      if (first + slot >= stages) continue;  // a loop with a way out in the middle may be left as it is, not unrolled
      ptx::wait<STAGES - 2>();
      __syncthreads();  // everyone's copies of this stage have arrived, and everyone has left the slot that is filled next
      unsigned char* filling = ring + (slot + STAGES - 1) % STAGES * BYTES;
      loader.begin(filling, slot + STAGES - 1);
      ptx::commit();
      if constexpr (VALUES == kOffsets) {
        sum_columns<Type, BITS, TILES>(ring + slot * BYTES, column_sums);
        __syncthreads();
      }
      fold<Type, VALUES, BITS, TILES>(ring + slot * BYTES, column_sums, expander, sums);
      loader.finish(filling);
    }
    loader.advance(STAGES);
  }
  ptx::wait<0>();  // no copy may be under way when the block ends
  finish<Type, TILES>(p, piece, ring, sums);
}

}  // namespace gemma4::linear
