// A tile of a row: 2048 tokens, 16 of each of 128 threads.
//
// A tile is not one stretch of the vocabulary but every TILES-th chunk of 128 tokens (256 bytes or more: whole lines of a
// cache): vocabularies are sorted by how common a token is, so the largest logits of a row stand close together, and would
// crowd the lists of a few tiles. Gemma's vocabulary is 128 tiles, so that even one row fills a card.
#pragma once

#include "row.cuh"

namespace gemma4::verification {

constexpr int kTileThreads = 128, kTileWarps = kTileThreads / 32;
constexpr int kChunk = 128, kGroupsOfChunk = kChunk / kGroup;
constexpr int kGroupsOfThread = kTile / kGroup / kTileThreads;
constexpr int kTokensOfThread = kGroupsOfThread * kGroup;
static_assert(kGroupsOfThread == 2);

// The tokens of a thread: two groups of eight, in ascending order.
struct TileTokens {
  int first[kGroupsOfThread];

  __device__ TileTokens(const Parameters& p, int tile) {
#pragma unroll
    for (int i = 0; i < kGroupsOfThread; ++i) {
      const int group = i * kTileThreads + int(threadIdx.x);
      first[i] = (group / kGroupsOfChunk * p.tiles + tile) * kChunk + group % kGroupsOfChunk * kGroup;
    }
  }
  __device__ __forceinline__ int token(int i) const { return first[i / kGroup] + i % kGroup; }
};

template <class Element>
__device__ __forceinline__ void load_tile(const Row<Element>& row, const TileTokens& tokens, float (&logit)[kTokensOfThread]) {
  float group[kGroupsOfThread][kGroup];
#pragma unroll
  for (int i = 0; i < kGroupsOfThread; ++i) row.group(tokens.first[i], group[i]);
#pragma unroll
  for (int i = 0; i < kTokensOfThread; ++i) logit[i] = group[i / kGroup][i % kGroup];
}

}  // namespace gemma4::verification
