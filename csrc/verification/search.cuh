// The lowest place whose cumulative mass, ascending, exceeds a limit: the boundary of top-p, and with a mass of one for each
// token that of top-k. Digit by digit from above: the masses of 128 bins are summed, and the bin that the limit falls into is
// the next digit. Masses are whole numbers, so no order of sums changes a boundary.
#pragma once

#include "row.cuh"

namespace gemma4::verification {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kDigitBits = 7, kBins = 1 << kDigitBits, kBinsOfLane = kBins / 32;
// A bin has several sums, which lanes take turns with: additions of 64 bits to shared memory are loops, and neighbours of a row
// meet in few bins. A row that is read has the list's room for them.
constexpr int kListReplicas = 4, kRowReplicas = kScratch / kBins;

struct RowShared {
  int64_t places[kScratch];
  int64_t bins[kBins * kListReplicas];
  int64_t scratch[kRowWarps];
  float scores[kGroup][kRowThreads];  // each thread's own, of a row that is read
  int64_t before;  // mass below the bin
  int digit;
  int listed;
};

// Of what the first `count` of `places` hold.
struct ListOfPlaces {
  static constexpr int kReplicas = kListReplicas;
  RowShared& shared;
  int count;

  __device__ int64_t* bins() const { return shared.bins; }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int i = int(threadIdx.x); i < count; i += kRowThreads) visit(shared.places[i]);
  }
};

// Of a row's logits, by one read.
template <class Element>
struct WholeRow {
  static constexpr int kReplicas = kRowReplicas;
  RowShared& shared;
  const Row<Element>& row;
  const Request& request;

  __device__ int64_t* bins() const { return shared.places; }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int first = int(threadIdx.x) * kGroup; first < row.vocabulary; first += kRowThreads * kGroup) {
      float score[kGroup];
      row.group(first, score);
      request.scores_of(score);
      // Through shared memory, so that a visit is in the code once and not eight times.
#pragma unroll
      for (int i = 0; i < kGroup; ++i) shared.scores[i][threadIdx.x] = score[i];
      const int count = row.vocabulary - first < kGroup ? row.vocabulary - first : kGroup;
#pragma unroll 1
      for (int i = 0; i < count; ++i) visit(place_of(key_of(shared.scores[i][threadIdx.x]), first + i));
    }
  }
};

// `mass` is of a place; `limit` of the total, `before` included, which is below the places here. `drop` is kTokenBits where all
// places of a key go together. All places have the bits of `one` of them above the lowest `differing`. Called by whole blocks.
template <class Places, class Mass, class Limit>
__device__ int64_t search(const Places& places, int drop, int64_t before, Mass mass, Limit limit, int64_t one, int differing) {
  RowShared& shared = places.shared;
  int64_t* const bins = places.bins();
  const int lane = int(threadIdx.x % 32);
  int shift = 0;
  while (shift + kDigitBits < differing - drop) shift += kDigitBits;
  int64_t found = one >> drop >> (shift + kDigitBits) << kDigitBits, most = -1;  // digits so far, and room for one
  for (;; shift -= kDigitBits) {
    __syncthreads();  // the places are there, and nobody needs the last digit any more
    for (int i = int(threadIdx.x); i < kBins * Places::kReplicas; i += kRowThreads) bins[i] = 0;
    __syncthreads();
    places.each([&](int64_t place) {
      const int64_t digits = place >> drop >> shift;
      if ((digits ^ found) >> kDigitBits != 0) return;
      const int64_t its_mass = mass(place);
      const int bin = int(digits & (kBins - 1)) * Places::kReplicas + lane % Places::kReplicas;
      if (its_mass == 0) return;
      atomicAdd(reinterpret_cast<unsigned long long*>(bins + bin), static_cast<unsigned long long>(its_mass));
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      int64_t sum[kBinsOfLane], total = 0;
#pragma unroll
      for (int i = 0; i < kBinsOfLane; ++i) {
        sum[i] = 0;
        // Lanes begin at different replicas: bins of a lane are a multiple of all banks apart.
        for (int r = 0; r < Places::kReplicas; ++r) {
          sum[i] += bins[(kBinsOfLane * lane + i) * Places::kReplicas + (r + lane) % Places::kReplicas];
        }
        total += sum[i];
      }
      int64_t below = before;
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) {
        const int64_t other = across(total, mask);
        if (lane & mask) below += other;
        total += other;
      }
      if (most < 0) most = limit(before + total);
#pragma unroll
      for (int i = 0; i < kBinsOfLane; ++i) {
        if (below <= most && below + sum[i] > most) {
          shared.digit = kBinsOfLane * lane + i;
          shared.before = below;
        }
        below += sum[i];
      }
    }
    __syncthreads();
    found |= shared.digit;
    before = shared.before;
    if (shift == 0) return found << drop;
    found <<= kDigitBits;
  }
}

template <class Element, class Mass, class Limit>
__device__ int64_t search_row(const WholeRow<Element>& row, int drop, Mass mass, Limit limit) {
  return search(row, drop, 0, mass, limit, 0, kPlaceBits);
}

// Skips the digits that all places of a list share: the largest of a row lie close together.
template <class Mass, class Limit>
__device__ int64_t search_list(const ListOfPlaces& list, int drop, int64_t before, Mass mass, Limit limit) {
  int64_t least = kBeyond, most = 0;
  list.each([&](int64_t place) {
    least = place < least ? place : least;
    most = larger(most, place);
  });
  least = over_block<kRowThreads>(least, Smallest(), list.shared.scratch);
  most = over_block<kRowThreads>(most, Largest(), list.shared.scratch);
  int differing = 0;
  for (int64_t rest = least ^ most; rest != 0; rest >>= 1) ++differing;
  return search(list, drop, before, mass, limit, least, differing);
}

}  // namespace gemma4::verification
