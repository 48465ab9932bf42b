// What a logit becomes: a score, an integer that orders it, a mass; and how a row is read.
//
//   score   softcap(logit) / temperature, fp32; what becomes of NaN does not matter, for its row is refused
//   key     int32 in the order of scores, zeros of either sign alike
//   place   (key + 2^31) * 2^24 + token: the ascending order in which top-k and top-p drop tokens, no two alike
//   prize   (key + 2^31) * 2^24 + (2^24 - 1 - token): the largest has the largest score, and of these the lowest token
//   mass    exp(score - largest score) in multiples of 2^-38, rounded down
#pragma once

#include "numbers.cuh"
#include "verification.h"

namespace gemma4::verification {

constexpr int kTokenBits = 24, kPlaceBits = 56;
constexpr int kLastToken = (1 << kTokenBits) - 1;
constexpr int64_t kNextKey = int64_t(1) << kTokenBits;   // from the places of one key to those of the next
constexpr int64_t kBeyond = int64_t(1) << kPlaceBits;    // above all places
constexpr int64_t kWholeMass = int64_t(1) << 38;
constexpr int kNoKey = INT32_MIN;                        // below the key of -inf

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
__device__ __forceinline__ int key_of(float score) { return ordered(bits_of(score == 0.0f ? 0.0f : score)); }
__device__ __forceinline__ float score_of_key(int key) { return float_of(ordered(key)); }
__device__ __forceinline__ int64_t place_of(int key, int token) {
  return (int64_t(key) + (int64_t(1) << 31)) << kTokenBits | token;
}
__device__ __forceinline__ int64_t prize_of(int key, int token) { return place_of(key, token ^ kLastToken); }
__device__ __forceinline__ int key_in(int64_t place) { return int((place >> kTokenBits) - (int64_t(1) << 31)); }
__device__ __forceinline__ int token_of_place(int64_t place) { return int(place & kLastToken); }
__device__ __forceinline__ int token_of_prize(int64_t prize) { return int(prize & kLastToken) ^ kLastToken; }
// The first place of the same key.
__device__ __forceinline__ int64_t level_of(int64_t place) { return place >> kTokenBits << kTokenBits; }

__device__ __forceinline__ int64_t fixed(float x) { return int64_t(times(x, 274877906944.0f)); }
__device__ __forceinline__ float from_fixed(int64_t mass) { return times(float(mass), float(1.0 / 274877906944.0)); }
__device__ __forceinline__ float weight_of(float score, float largest) { return exponential_of(minus(score, largest)); }

// What sums up to this, ascending, is removed by top-p: floor((cut + 2^-25) total), cut taken at 31 bits. The last token stays.
__device__ __forceinline__ int64_t limit_of(float cut, int64_t total) {
  int64_t fraction = int64_t(times(fminf(fmaxf(cut, 0.0f), 1.0f), 2147483648.0f)) + 64;
  fraction = fraction < int64_t(1) << 31 ? fraction : int64_t(1) << 31;
  // The product has up to 93 bits.
  const int64_t limit = ((total >> 32) * fraction << 1) + ((total & 0xFFFFFFFF) * fraction >> 31);
  return limit < total - 1 ? limit : total - 1;
}

// A request's filters, and where its noise comes from.
struct Request {
  float softcap, divisor, cut, min_p;
  int64_t top_k;
  uint64_t seed, position;
  int count;  // drafts
  bool samples;

  __device__ Request(const Parameters& p, int64_t request) {
    const float temperature = p.temperature[request];
    samples = temperature > 0.0f;
    divisor = samples ? temperature : 1.0f;
    softcap = p.softcap[request];
    cut = p.cut[request];
    min_p = p.min_p[request];
    top_k = p.top_k[request];
    seed = uint64_t(p.seeds[request]);
    position = uint64_t(p.positions[request]);
    count = p.rows - 1;
    if (p.num_drafts != nullptr) {
      const int64_t given = p.num_drafts[request];
      count = int(given < 0 ? 0 : given < count ? given : count);
    }
  }

  __device__ __forceinline__ float score_of(float logit) const {
    float scores[1] = {logit};
    scores_of(scores);
    return scores[0];
  }

  // In place, with each branch taken once for all.
  template <int COUNT>
  __device__ __forceinline__ void scores_of(float (&logits)[COUNT]) const {
    if (softcap > 0.0f) {
      for (float& logit : logits) logit = times(tanh_of(over(logit, softcap)), softcap);
    }
    if (divisor != 1.0f) {
#pragma unroll
      for (float& logit : logits) logit = fminf(over(logit, divisor), kLargestNumber);
    }
  }

  // Lists hold the largest of such a request.
  __device__ bool is_listed(const Parameters& p) const { return p.list > 0 && top_k > 0 && top_k <= kLongestTopK; }
  __device__ bool has_top_k(const Parameters& p) const { return is_listed(p) || (top_k > 0 && top_k < p.vocabulary); }
  __device__ bool has_top_p() const { return cut > 0.0f; }
  // One filter may remove the sample, and it is not settled by lists.
  __device__ bool is_surveyed(const Parameters& p) const {
    return samples && !is_listed(p) && has_top_k(p) != has_top_p();
  }
};

// Which of the rows: the target's first.
struct Where {
  int64_t request;
  int row, index;  // in all rows, and among those of the target or of the drafter
  bool is_target;

  __device__ Where(const Parameters& p, unsigned number) {
    request = number / unsigned(p.all_rows());
    row = int(number % unsigned(p.all_rows()));
    is_target = row < p.rows;
    index = is_target ? row : row - p.rows;
  }
  __device__ int64_t place(const Parameters& p) const { return request * p.all_rows() + row; }
  __device__ int64_t* facts(const Parameters& p) const { return p.facts + place(p) * kFacts * p.tiles; }
  __device__ int64_t* lists(const Parameters& p) const { return p.lists + place(p) * p.tiles * p.list; }
};

// The draft of a row if there is one that is a token, else -1.
__device__ __forceinline__ int draft_at(const Parameters& p, int64_t request, int row, int count) {
  if (row >= count) return -1;
  const int64_t draft = p.drafts[request * (p.rows - 1) + row];
  return draft >= 0 && draft < p.vocabulary ? int(draft) : -1;
}

// Rows ----------------------------------------------------------------------------------------------------------------

struct Bf16Logits {
  using Bits = uint16_t;
  static __device__ __forceinline__ float number(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
};
struct Fp16Logits {
  using Bits = uint16_t;
  static __device__ __forceinline__ float number(uint16_t bits) { return ptx::fp16_to_float(bits); }
};
struct Fp32Logits {
  using Bits = float;
  static __device__ __forceinline__ float number(float bits) { return bits; }
};

constexpr int kGroup = 8;  // tokens that a thread reads together: 16 bytes of 16-bit logits, two times 16 of fp32

template <class Element>
struct Row {
  using Bits = typename Element::Bits;
  const Bits* logits;
  int vocabulary;

  __device__ Row(const Parameters& p, const Where& at) : vocabulary(p.vocabulary) {
    const void* base = at.is_target ? p.logits : p.draft_logits;
    const int64_t offset = at.is_target ? at.request * p.stride_batch + at.index * p.stride_row
                                        : at.request * p.draft_stride_batch + at.index * p.draft_stride_row;
    logits = static_cast<const Bits*>(base) + offset;
  }

  __device__ __forceinline__ float logit(int token) const { return Element::number(__ldg(logits + token)); }

  // Logits of a group that begins at a multiple of 8; what is behind the vocabulary is -inf. 16 bytes at a time, unless the row
  // begins at no multiple of 16 or the group is the last: then the elements one by one, which L1 keeps from being read twice.
  __device__ __forceinline__ void group(int first, float (&out)[kGroup]) const {
    if (first + kGroup <= vocabulary && reinterpret_cast<uintptr_t>(logits) % 16 == 0) {
      constexpr int kEach = 16 / sizeof(Bits);
#pragma unroll
      for (int part = 0; part < kGroup / kEach; ++part) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(logits + first) + part);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if constexpr (sizeof(Bits) == 4) {
            out[part * kEach + i] = __uint_as_float(words[i]);
          } else {
            out[part * kEach + i] = Element::number(uint16_t(words[i / 2] >> 16 * (i % 2)));
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) out[i] = first + i < vocabulary ? logit(first + i) : -infinity();
    }
  }
};

// The question that decides a sampled row with one filter: how much lies up to the sample? Of top-k the places from `base` on
// have a larger score, for all that tie with the sample stay; of top-p they come behind it. If the filter removes the sample,
// what survives is among them.
struct Survey {
  int64_t sample_place, base;
  float largest, sample_score;
  bool counts;

  template <class Element>
  __device__ Survey(const Parameters& p, const Row<Element>& row, const Request& request, float largest_score, int sample)
      : largest(largest_score), counts(request.has_top_k(p)) {
    sample_score = request.score_of(row.logit(sample));
    sample_place = place_of(key_of(sample_score), sample);
    base = counts ? level_of(sample_place) + kNextKey : sample_place + 1;
  }
  __device__ __forceinline__ int64_t mass(float score) const { return counts ? 1 : fixed(weight_of(score, largest)); }
};

// Blocks --------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t across(int64_t value, int mask) {
  const uint32_t low = ptx::from_lane_across(uint32_t(value), mask), high = ptx::from_lane_across(uint32_t(uint64_t(value) >> 32), mask);
  return int64_t(uint64_t(high) << 32 | low);
}

__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
struct Largest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return larger(a, b); }
};
struct Smallest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};
struct Sum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

// Over all threads of a block, for all of them; `scratch` has a place for each warp. Whole numbers: no order changes the
// result.
template <int THREADS, class Combine>
__device__ int64_t over_block(int64_t value, Combine combine, int64_t* scratch) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, across(value, mask));
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) value = combine(value, scratch[warp]);
  return value;
}

// Of a row's facts of one kind, over its tiles.
template <int THREADS, class Combine>
__device__ int64_t over_tiles(const Parameters& p, const int64_t* facts, Fact fact, Combine combine, int64_t none,
                              int64_t* scratch) {
  int64_t value = none;
  for (int tile = threadIdx.x; tile < p.tiles; tile += THREADS) value = combine(value, facts[fact * p.tiles + tile]);
  return over_block<THREADS>(value, combine, scratch);
}

// Whether the block is the last of `blocks` that come here. What the threads of the others wrote before is then visible.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t blocks, int64_t* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) scratch[0] = atomicAdd(counter, 1u) + 1 == blocks;
  __syncthreads();
  const bool last = scratch[0] != 0;
  __threadfence();
  return last;
}

}  // namespace gemma4::verification
