// What the parts of the kernel in k_eq_v.cuh share: its parameters, the map of shared memory, what one block does, and the way from
// the cache to a tile.
#pragma once

#include "../include/gemma4_kernels.h"
#include "request.cuh"

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

}  // namespace gemma4::attention::k_eq_v
