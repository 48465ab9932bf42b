// Attention of 1 to 16 query rows over a cache of values alone, k[j] = rope(v[j] * weight, j): full layers while they decode or
// verify.
//
// Query heads of a KV head and rows of a request are one axis: packed row m is row m / GROUP of head m % GROUP. A block owns
// two tiles of 16 packed rows (one, if there is no other) of one KV head, and one chunk of its keys. The chunk goes by in tiles
// of 32 keys, through a ring of two slots. A tile in shared memory serves both products:
//
//     keys      For the first product a warp owns an eighth of the columns, keeps the queries of these in registers, and makes
//               what they add to the scores of all rows and keys.
//     softmax   A warp owns an eighth of the rows, adds the eight parts of their scores, and leaves weights and factors.
//     values    For the second product a warp owns another eighth of the columns, and the accumulators of all rows in them.
//
// Columns of the first product are dealt in steps: 8 columns and their 8 partners, half of head_dim higher, are the 16 of one
// mma. The steps with pairs that rotate come first, one to each warp, then the next eight. With Gemma's 64 pairs that is one
// step of each warp. A step that does not rotate has the weight in its queries: q . (v w) = (q w) . v. One that does is rebuilt
// in registers, as its fragments come from shared memory: weight, rotation by the key's position, rounding. A lane meets the
// keys first + lane / 4, + 8, ... of a tile, so it finds one angle and turns it on by 8 positions three times.
//
//     values    2 slots of 32 rows of D columns                16-byte chunk c of row r at chunk c ^ (r % 8)
//     scores    8 warps x 16 TILES rows of 32 floats           8 keys n of row r at n ^ (r % 4)
//     weights   16 TILES rows of 32 16-bit numbers             16-byte chunk c of row r at c ^ (r / 2 % 4)
//     factors   16 TILES floats                                what accumulators are multiplied with
//     order     the steps, those that rotate first, and how many these are
//
// so that no ldmatrix and no access of 8 or 16 bytes meets a bank twice. Three barriers a tile: the tile is there; the scores
// are there; the weights are there.
//
// A row's bits: rows of an mma do not meet, and a tile that a row does not see leaves maximum, sum and accumulator as they are.
// Parts of a score are added in the order of the warps, tiles begin at multiples of 32 keys, and chunks follow from the row's
// own number of keys.
#pragma once

#include "../include/gemma4_kernels.h"
#include "request.cuh"
#include "rotation.cuh"
#include "softmax.cuh"

namespace gemma4::attention::k_eq_v {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 32;      // of a tile
constexpr int kTileRows = 16;  // of one mma
constexpr int kMostTiles = 2;
constexpr int kSlots = 2;
constexpr int kSmallestChunkLog2 = 6;  // two tiles: below, starting a block costs more than its keys

// A tensor for the kernel: strides in bytes.
struct Strided {
  const unsigned char* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct Parameters {
  Requests requests;
  Splits splits;
  Parts parts;
  Strided q, values;
  Strided scales;        // of values in 8 bits
  const void* weight;    // (D)
  const void* inv_freq;  // (D / 2)
  int weight_dtype;      // gemma4_dtype
  bool is_double;        // inv_freq; else fp32
  int kv_heads;
  int group;   // query heads of a KV head
  int groups;  // blocks that share the packed rows of a KV head
  float scale;
};

template <int D>
struct Layout {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kPairSteps = D / 16;            // steps of 8 pairs
  static constexpr int kSteps = kPairSteps / kWarps;   // of a warp
  static constexpr int kColumns = D / kWarps;          // of a warp, in the second product
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kRows = kMostTiles * kTileRows;
  static constexpr int kScores = kSlots * kTileBytes;
  static constexpr int kScoreBytes = kRows * kKeys * 4;  // of a warp
  static constexpr int kWeights = kScores + kWarps * kScoreBytes;
  static constexpr int kFactors = kWeights + kRows * kKeys * 2;
  static constexpr int kOrder = kFactors + kRows * 4;
  static constexpr int kBytes = kOrder + 2 * kPairSteps + 16;
  static_assert(kBytes <= int(kMostSharedBytes), "more than a block of sm_86 may have");
};

// What one block does.
struct Work {
  Request request;
  Chunk chunk;
  int b, kv_head;
  int first_packed;     // of its packed rows
  int begin, stop;      // keys
};

__device__ __forceinline__ Work work_of(const Parameters& p) {
  const Requests& requests = p.requests;
  Work w{};
  w.b = int(blockIdx.y) / p.kv_heads;
  w.kv_head = int(blockIdx.y) % p.kv_heads;
  // Blocks of one chunk stand side by side: they read the same keys at the same time, from memory once and else from L2.
  const int program = int(blockIdx.x) / p.groups;
  w.first_packed = int(blockIdx.x) % p.groups * kMostTiles * kTileRows;
  w.request = request_of(requests, w.b);
  const int before = w.request.end - w.request.rows;  // the position of row 0
  const int last_row = within((w.first_packed + kMostTiles * kTileRows - 1) / p.group, 0, w.request.rows - 1);
  const int first_token = before + w.first_packed / p.group, last_token = before + last_row;
  w.chunk = choose_chunk(requests, p.splits, w.request, first_token, last_token, program);
  if (!w.chunk.exists) return w;
  w.begin = w.chunk.index * w.chunk.size;
  // Rows at the end may have chunks of the other size.
  int last = last_token;
  while (chunks_of(requests, p.splits, w.request, last).size != w.chunk.size) --last;
  w.stop = within(last + 1, w.begin, w.begin + w.chunk.size);
  return w;
}

// Cache to tile ------------------------------------------------------------------------------------------------------

// Finds the row of one key of each tile, a tile ahead of the copies that want it: lane l has key l.
struct Finder {
  const Requests& requests;
  const Work& work;
  int key;
  Place place;

  __device__ Finder(const Requests& all, const Work& w) : requests(all), work(w), key(w.begin + int(threadIdx.x) % 32) {
    look();
  }

  __device__ __forceinline__ void look() {
    place = key < work.stop ? place_of(requests, work.request, work.b, key) : Place{-1, 0};
    key += kKeys;
  }

  // The place of the lane's key of the next tile; the entry is -1 for what is beyond the keys.
  __device__ __forceinline__ Place take() {
    const Place taken = place;
    look();
    return taken;
  }
};

// A cache of the type that is multiplied: rows are copied as they are. Other kinds have the same two functions: `begin` asks
// for a tile, `finish` puts it into its slot, after everyone has left that. What is copied is under way from the moment that a
// slot is free; what comes through registers waits until scores need none.
template <class Number, int D>
struct PlainCache {
  using Type = Number;
  static constexpr bool kIsCopied = true;
  static constexpr int kRowChunks = D / 8;
  static constexpr int kStep = kThreads / kRowChunks;  // rows that all threads cover with one chunk each
  static constexpr int kCopies = kKeys / kStep;

  const Parameters& p;
  const unsigned char* values;
  int row, chunk;

  __device__ PlainCache(const Parameters& parameters, const Work& w)
      : p(parameters), row(threadIdx.x / kRowChunks), chunk(threadIdx.x % kRowChunks) {
    values = p.values.data + w.kv_head * p.values.head_stride + chunk * 16;
  }

  // `place` is that of the lane's key.
  __device__ __forceinline__ void begin(unsigned char* slot, Place place) const {
    const int64_t mine = place.entry < 0 ? -1 : place.entry * p.values.batch_stride + place.row * p.values.row_stride;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int key = row + i * kStep;
      const int64_t source = ptx::from_lane(mine, key);
      unsigned char* to = slot + key * Layout<D>::kRowBytes + (chunk ^ key % 8) * 16;
      ptx::copy_16(to, values + (source < 0 ? 0 : source), source < 0 ? 0 : 16);
    }
  }

  __device__ __forceinline__ void finish(unsigned char*) const {}
};

// Keys -----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float number_at(const void* data, int64_t i, int dtype) {
  if (dtype == GEMMA4_FP32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == GEMMA4_FP16 ? ptx::fp16_to_float(bits) : __uint_as_float(uint32_t(bits) << 16);
}

__device__ __forceinline__ float2 unpacked(uint32_t pair, Bf16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}
__device__ __forceinline__ float2 unpacked(uint32_t pair, Fp16) {
  return {ptx::fp16_to_float(uint16_t(pair)), ptx::fp16_to_float(uint16_t(pair >> 16))};
}

__device__ __forceinline__ double frequency_at(const Parameters& p, int pair) {
  return p.is_double ? static_cast<const double*>(p.inv_freq)[pair] : double(static_cast<const float*>(p.inv_freq)[pair]);
}

// Puts the steps with pairs that rotate first, and says how many these are. `order` has room for two bytes of each step and one
// more.
template <int D>
__device__ __forceinline__ int order_steps(const Parameters& p, unsigned char* order) {
  constexpr int STEPS = Layout<D>::kPairSteps;
  const int step = threadIdx.x;
  unsigned char* flags = order + STEPS;
  if (step < STEPS) {
    bool rotates = false;
    for (int i = 0; i < 8; ++i) rotates |= frequency_at(p, 8 * step + i) != 0;
    flags[step] = rotates;
  }
  __syncthreads();
  if (step < STEPS) {
    int before = 0, all = 0;
    for (int i = 0; i < STEPS; ++i) {
      before += i < step ? flags[i] : 0;
      all += flags[i];
    }
    order[flags[step] ? before : all + step - before] = uint8_t(step);
    if (step == 0) flags[STEPS] = uint8_t(all);
  }
  __syncthreads();
  return flags[STEPS];
}

// What a lane needs to rebuild its two neighbouring pairs of keys.
template <class Type, int D>
struct Turner {
  uint64_t turns[2];
  Angle by_eight[2];
  float low_weight[2], high_weight[2];

  __device__ __forceinline__ Turner(const Parameters& p, int pair) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      turns[i] = turns_of(frequency_at(p, pair + i));
      by_eight[i] = angle_at(8, turns[i]);
      low_weight[i] = number_at(p.weight, pair + i, p.weight_dtype);
      high_weight[i] = number_at(p.weight, pair + i + D / 2, p.weight_dtype);
    }
  }

  // Values to keys: the lane's fragments of keys position, position + 8, + 16, + 24.
  __device__ __forceinline__ void turn(uint32_t (&keys)[kKeys / 8][2], uint32_t position) const {
    Angle angle[2] = {angle_at(position, turns[0]), angle_at(position, turns[1])};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      float2 low = unpacked(keys[n][0], Type()), high = unpacked(keys[n][1], Type());
      low = {low.x * low_weight[0], low.y * low_weight[1]};
      high = {high.x * high_weight[0], high.y * high_weight[1]};
      keys[n][0] = ptx::round_pair(fmaf(low.x, angle[0].cos, -(high.x * angle[0].sin)),
                                   fmaf(low.y, angle[1].cos, -(high.y * angle[1].sin)), Type());
      keys[n][1] = ptx::round_pair(fmaf(high.x, angle[0].cos, low.x * angle[0].sin),
                                   fmaf(high.y, angle[1].cos, low.y * angle[1].sin), Type());
      angle[0] = together(angle[0], by_eight[0]);
      angle[1] = together(angle[1], by_eight[1]);
    }
  }
};

// The first product -------------------------------------------------------------------------------------------------------

// A warp's columns of the queries, as fragments, and what it makes of them.
template <class Type, int D, int TILES>
struct Scorer {
  using Map = Layout<D>;
  static constexpr int kSteps = Map::kSteps;

  const Parameters& p;
  uint32_t queries[TILES][kSteps][4];  // rows g and g + 8 of the lower columns, then of the upper ones
  int step[kSteps];
  int rebuilt;  // of the warp's steps: those below. The first always is: a pair that does not rotate has the angle 0
  Turner<Type, D> turner;

  __device__ __forceinline__ Scorer(const Parameters& parameters, const Work& w, const unsigned char* order, int all_rotating)
      : p(parameters), turner(parameters, 8 * order[threadIdx.x / 32] + 2 * (threadIdx.x % 4)) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    rebuilt = all_rotating <= kWarps ? 1 : (all_rotating - warp + kWarps - 1) / kWarps;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) step[i] = order[warp + kWarps * i];
    const int rows = w.request.rows * p.group;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int packed = w.first_packed + tile * kTileRows + lane / 4 + 8 * half;
        const int row = w.request.first_row + packed / p.group, head = w.kv_head * p.group + packed % p.group;
        const unsigned char* q = p.q.data + w.b * p.q.batch_stride + row * p.q.row_stride + head * p.q.head_stride;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int column = 8 * step[i] + 2 * (lane % 4);
          queries[tile][i][half] = packed < rows ? prepared(q, column, i < rebuilt) : 0;
          queries[tile][i][half + 2] = packed < rows ? prepared(q, column + D / 2, i < rebuilt) : 0;
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t prepared(const unsigned char* q, int column, bool is_rebuilt) const {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(q + 2 * column);
    if (is_rebuilt) return pair;
    const float2 numbers = unpacked(pair, Type());
    return ptx::round_pair(numbers.x * number_at(p.weight, column, p.weight_dtype),
                           numbers.y * number_at(p.weight, column + 1, p.weight_dtype), Type());
  }

  // Leaves the warp's parts of the scores of a tile that begins with key `first`. With ANY, more of its steps than one may
  // rotate: right, not fast.
  template <bool ANY>
  __device__ __forceinline__ void score(const unsigned char* slot, int first, unsigned char* shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float scores[TILES][kKeys / 8][4] = {};
    // Lane l names row l % 8 of matrix l / 8: lower and upper columns of 8 keys, then of the next 8.
    const int key = lane / 16 * 8 + lane % 8;
    const unsigned char* row = slot + key * Map::kRowBytes;
    // Steps that rotate come last: their arithmetic goes on beside the products of the others.
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      uint32_t keys[kKeys / 8][2];
      const int chunk = step[i] + lane / 8 % 2 * Map::kPairSteps;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
        ptx::load_matrices(words, row + half * 16 * Map::kRowBytes + (chunk ^ lane % 8) * 16);
        keys[2 * half][0] = words[0];
        keys[2 * half][1] = words[1];
        keys[2 * half + 1][0] = words[2];
        keys[2 * half + 1][1] = words[3];
      }
      if (i == 0) {
        turner.turn(keys, uint32_t(first + g));
      } else if (ANY && i < rebuilt) {
        Turner<Type, D>(p, 8 * step[i] + 2 * t).turn(keys, uint32_t(first + g));
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          ptx::multiply<Type>(scores[tile][n], queries[tile][i], keys[n], scores[tile][n]);
        }
      }
    }
    unsigned char* mine = shared + Map::kScores + warp * Map::kScoreBytes + g * (kKeys * 4) + t * 8;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        unsigned char* place = mine + tile * kTileRows * kKeys * 4 + (n ^ g % 4) * 32;
        *reinterpret_cast<float2*>(place) = {scores[tile][n][0], scores[tile][n][1]};
        *reinterpret_cast<float2*>(place + 8 * kKeys * 4) = {scores[tile][n][2], scores[tile][n][3]};
      }
    }
  }
};

// Softmax ------------------------------------------------------------------------------------------------------------------

// The running softmax of a warp's rows: 16 lanes a row with one tile of rows, 8 with two.
template <class Type, int D, int TILES>
struct Softmax {
  using Map = Layout<D>;
  static constexpr int kLanes = 16 / TILES;         // of a row
  static constexpr int kLaneKeys = kKeys / kLanes;  // neighbours
  static constexpr int kWarpRows = 32 / kLanes;

  int row;        // of the block
  int first_key;  // of the lane in a tile
  int token;      // the last key that the row sees; -1 for a row that is none
  float scale;
  float highest = -INFINITY;
  float sum = 0;

  __device__ __forceinline__ Softmax(const Parameters& p, const Work& w) : scale(p.scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    row = warp * kWarpRows + lane / kLanes;
    first_key = lane % kLanes * kLaneKeys;
    const int packed = w.first_packed + row;
    token = packed < w.request.rows * p.group ? w.request.end - w.request.rows + packed / p.group : -1;
  }

  // Folds a tile that begins with key `first`: leaves the rows' weights, and the factors for their accumulators.
  __device__ __forceinline__ void fold(unsigned char* shared, int first) {
    float score[kLaneKeys], weight[kLaneKeys];
    const unsigned char* place =
        shared + Map::kScores + row * (kKeys * 4) + (first_key / 8 ^ row % 4) * 32 + first_key % 8 * 4;
    add_parts(place, score);
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      score[i] = first + first_key + i <= token ? score[i] : -INFINITY;
      largest = fmaxf(largest, score[i] * scale);
    }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) largest = fmaxf(largest, ptx::from_lane_across(largest, mask));
    const float next = fmaxf(highest, largest), safe = safe_maximum(next);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) weight[i] = exponential(fmaf(score[i], scale, -safe));
    const float factor = exponential(highest - safe);
    highest = next;
    unsigned char* weights =
        shared + Map::kWeights + row * (kKeys * 2) + (first_key / 8 ^ row / 2 % 4) * 16 + first_key % 8 * 2;
    if constexpr (kLaneKeys == 2) {
      *reinterpret_cast<uint32_t*>(weights) = ptx::round_pair(weight[0], weight[1], Type());
    } else {
      const uint64_t upper = ptx::round_pair(weight[2], weight[3], Type());
      *reinterpret_cast<uint64_t*>(weights) = ptx::round_pair(weight[0], weight[1], Type()) | upper << 32;
    }
    if (first_key == 0) *reinterpret_cast<float*>(shared + Map::kFactors + row * 4) = factor;
    // Pairs, then pairs of pairs, whether they stand in one lane or in two: a sum has its order by its keys.
    float added = weight[0] + weight[1];
    if constexpr (kLaneKeys == 4) added += weight[2] + weight[3];
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) added += ptx::from_lane_across(added, mask);
    sum = fmaf(sum, factor, added);
  }

  __device__ __forceinline__ void add_parts(const unsigned char* place, float (&score)[kLaneKeys]) const {
    float parts[kWarps][kLaneKeys];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if constexpr (kLaneKeys == 2) {
        *reinterpret_cast<float2*>(parts[warp]) = *reinterpret_cast<const float2*>(place + warp * Map::kScoreBytes);
      } else {
        *reinterpret_cast<float4*>(parts[warp]) = *reinterpret_cast<const float4*>(place + warp * Map::kScoreBytes);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      score[i] = ((parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i])) +
                 ((parts[4][i] + parts[5][i]) + (parts[6][i] + parts[7][i]));
    }
  }
};

// The second product --------------------------------------------------------------------------------------------------------

template <class Type, int D, int TILES>
__device__ __forceinline__ void add_values(const unsigned char* slot, const unsigned char* shared,
                                           float (&sums)[TILES][Layout<D>::kColumnTiles][4]) {
  using Map = Layout<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* factors = reinterpret_cast<const float*>(shared + Map::kFactors);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const float upper = factors[tile * kTileRows + lane / 4], lower = factors[tile * kTileRows + lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < Map::kColumnTiles; ++n) {
      sums[tile][n][0] *= upper;
      sums[tile][n][1] *= upper;
      sums[tile][n][2] *= lower;
      sums[tile][n][3] *= lower;
    }
  }
  // Lane l names row l % 8 of matrix l / 8: rows from 0 and from 8 of 8 keys, then of the next 8; of values 8 keys and the next
  // 8 of 8 columns, then of the next 8.
  const unsigned char* weights = shared + Map::kWeights + lane % 16 * (kKeys * 2);
  const unsigned char* values = slot + lane % 16 * Map::kRowBytes;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t weight[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      ptx::load_matrices(weight[tile],
                         weights + tile * kTileRows * kKeys * 2 + ((2 * step + lane / 16) ^ lane % 16 / 2 % 4) * 16);
    }
#pragma unroll
    for (int n = 0; n < Map::kColumnTiles; n += 2) {
      uint32_t words[4];
      const int chunk = warp * Map::kColumnTiles + n + lane / 16;
      ptx::load_matrices_turned(words, values + step * 16 * Map::kRowBytes + (chunk ^ lane % 8) * 16);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        ptx::multiply<Type>(sums[tile][n], weight[tile], {words[0], words[1]}, sums[tile][n]);
        ptx::multiply<Type>(sums[tile][n + 1], weight[tile], {words[2], words[3]}, sums[tile][n + 1]);
      }
    }
  }
}

// What is left for the rows of the block: by what to divide, and where the part goes.
struct Ending {
  float inverse;
  int64_t part;  // -1: nowhere
};

// Writes the parts of the rows whose chunk this is. The scores' memory is free.
template <class Type, int D, int TILES>
__device__ __forceinline__ void store(const Parameters& p, const Work& w, const Softmax<Type, D, TILES>& softmax,
                                      const float (&sums)[TILES][Layout<D>::kColumnTiles][4], unsigned char* shared) {
  using Map = Layout<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* endings = reinterpret_cast<Ending*>(shared + Map::kScores);
  if (softmax.first_key == 0) {
    const int packed = w.first_packed + softmax.row, row = packed / p.group, head = w.kv_head * p.group + packed % p.group;
    Ending ending{softmax.sum == 0 ? 0 : 1 / softmax.sum, -1};
    if (softmax.token >= 0) {
      const int slot = slot_of(p.splits, chunks_of(p.requests, p.splits, w.request, softmax.token), w.chunk);
      if (slot >= 0) {
        const int64_t part = part_of(p.requests, p.splits, w.b, p.kv_heads * p.group, head, row, slot);
        ending.part = part;
        p.parts.lse[part] = log_sum(softmax.highest, softmax.sum);
      }
    }
    endings[softmax.row] = ending;
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Ending ending = endings[tile * kTileRows + lane / 4 + 8 * half];
      if (ending.part < 0) continue;
      float* to = p.parts.values + ending.part * D + warp * Map::kColumns + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Map::kColumnTiles; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) = {sums[tile][n][2 * half] * ending.inverse,
                                                  sums[tile][n][2 * half + 1] * ending.inverse};
      }
    }
  }
}

// The kernel ------------------------------------------------------------------------------------------------------------------

// Walks over the tiles, of which the first have been asked for.
template <class Cache, int D, int TILES, bool ANY>
__device__ __forceinline__ void walk(const Parameters& p, const Work& w, Finder& finder, Cache& cache, unsigned char* shared,
                                     int rotating) {
  using Map = Layout<D>;
  using Type = typename Cache::Type;
  const Scorer<Type, D, TILES> scorer(p, w, shared + Map::kOrder, rotating);
  Softmax<Type, D, TILES> softmax(p, w);
  float sums[TILES][Map::kColumnTiles][4] = {};
  const int tiles = (w.stop - w.begin + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* slot = shared + tile % kSlots * Map::kTileBytes;
    unsigned char* other = shared + (tile + 1) % kSlots * Map::kTileBytes;
    const int first = w.begin + tile * kKeys;
    if (tile == 0) {
      ptx::wait<1>();
    } else {
      ptx::wait<0>();
    }
    __syncthreads();  // everyone's copies of this tile have arrived, and everyone has left the other slot
    if (Cache::kIsCopied && tile > 0) {
      cache.begin(other, finder.take());
      ptx::commit();
    }
    scorer.template score<ANY>(slot, first, shared);
    if (!Cache::kIsCopied) cache.begin(other, finder.take());
    __syncthreads();  // all parts of the scores are there
    softmax.fold(shared, first);
    __syncthreads();  // weights and factors are there
    add_values<Type, D, TILES>(slot, shared, sums);
    cache.finish(other);
  }
  ptx::wait<0>();  // no copy may be under way when the block ends
  store<Type, D, TILES>(p, w, softmax, sums, shared);
}

template <class Cache, int D, int TILES>
__device__ __forceinline__ void attend(const Parameters& p, const Work& w, unsigned char* shared) {
  using Map = Layout<D>;
  Finder finder(p.requests, w);
  Cache cache(p, w);
  cache.begin(shared, finder.take());
  cache.finish(shared);
  ptx::commit();
  if (Cache::kIsCopied) cache.begin(shared + Map::kTileBytes, finder.take());
  ptx::commit();
  const int rotating = order_steps<D>(p, shared + Map::kOrder);
  if (Map::kSteps == 1 || rotating <= kWarps) {
    walk<Cache, D, TILES, false>(p, w, finder, cache, shared, rotating);
  } else {
    walk<Cache, D, TILES, true>(p, w, finder, cache, shared, rotating);
  }
}

template <class Cache, int D>
__global__ void __launch_bounds__(kThreads, 1) k_eq_v_kernel(const Parameters p) {
  GEMMA4_SHARED(shared);
  const Work work = work_of(p);
  if (!work.chunk.exists) return;
  if (work.first_packed + kTileRows < work.request.rows * p.group) {
    attend<Cache, D, 2>(p, work, shared);
  } else {
    attend<Cache, D, 1>(p, work, shared);
  }
}

}  // namespace gemma4::attention::k_eq_v
