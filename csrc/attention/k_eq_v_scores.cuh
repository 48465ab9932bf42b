// From a tile of values to scores: keys rebuilt in registers, and the first product of the kernel in k_eq_v.cuh.
#pragma once

#include "k_eq_v_tile.cuh"
#include "rotation.cuh"

namespace gemma4::attention::k_eq_v {

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

}  // namespace gemma4::attention::k_eq_v
