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

#include "k_eq_v_scores.cuh"
#include "softmax.cuh"

namespace gemma4::attention::k_eq_v {

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
