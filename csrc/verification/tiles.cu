// The pass over the logits: what a tile of the vocabulary has to say of its row, from one read.
//
// Where no filter takes the sample from it, a row is then finished: see rows.cu. A request with 0 < top_k <= 512 gets a list
// from each tile instead of noise.
#include "tiles.cuh"

namespace gemma4::verification {
namespace {

// The prize of the largest key among the lanes, the lowest token of those that tie; -1 where no lane has one.
__device__ __forceinline__ int64_t best_of_warp(int key, int token) {
  const int largest = ptx::warp_largest(key);
  const int lowest = ptx::warp_smallest(key == largest ? token : INT32_MAX);
  return largest == kNoKey ? -1 : prize_of(largest, lowest);
}

struct Best {
  int key = kNoKey, token = 0;
  // Of tokens that come in ascending order the first of those that tie stays.
  __device__ __forceinline__ void take(int other, int its_token) {
    if (other <= key) return;
    key = other;
    token = its_token;
  }
};

// The largest score + noise of a tile. All words are made, but noise only where it could win: what its bound leaves below the
// warp's largest so far is skipped by the whole warp. Of n tokens of a lane that is all but 1 + 1/2 + .. + 1/n, or nearly.
__device__ __forceinline__ Best sample_of_tile(const TileTokens& tokens, const float (&score)[kTokensOfThread], int vocabulary,
                                               uint64_t seed, uint64_t position, uint32_t stream) {
  Best best;
  float reach = -infinity();
#pragma unroll 1
  for (int i = 0; i < kGroupsOfThread; ++i) {
    const int first = i == 0 ? tokens.first[0] : tokens.first[1];
#pragma unroll
    for (int four = 0; four < kGroup; four += 4) {
      const Words words = words_of_block(uint32_t(first + four) >> 2, seed, position, stream);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float mine = i == 0 ? score[four + j] : score[kGroup + four + j];
        const uint32_t word = words.word[j];
        const bool can_win = mine + gumbel_bound(word) >= reach;
        if (ptx::warp_any(can_win)) {
          if (can_win && first + four + j < vocabulary) best.take(key_of(plus(mine, gumbel_noise(word))), first + four + j);
          reach = score_of_key(ptx::warp_largest(best.key));
        }
      }
    }
  }
  return best;
}

struct TileShared {
  int64_t largest[kTileWarps], sample[kTileWarps];
  int status[kTileWarps], counts[2][kTileWarps], listed;
};

// Over the block: a sum of ints. Steps take turns with two places, so that one barrier does.
__device__ __forceinline__ int sum_of_tile(int value, int turn, TileShared& shared) {
  int (&counts)[kTileWarps] = shared.counts[turn % 2];
  const int sum = ptx::warp_sum(value);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = sum;
  __syncthreads();
  return counts[0] + counts[1] + counts[2] + counts[3];
}

// Writes the list of a tile and returns its floor: every token is in it whose key reaches the floor, and the floor is as low as
// the list has room, or nearly, found by bisection. Ties longer than a list stay out of it and raise the floor above
// themselves.
__device__ int64_t list_largest(const int (&key)[kTokensOfThread], const TileTokens& tokens, int64_t* list, int length,
                                TileShared& shared) {
  int largest = key[0];
#pragma unroll
  for (int i = 1; i < kTokensOfThread; ++i) largest = key[i] > largest ? key[i] : largest;
  // The maxima of 32 groups of 64 tokens: so many tokens reach the least of them, which is where the search begins.
  largest = int(larger(largest, int(ptx::from_lane_across(uint32_t(largest), 1))));
  largest = int(larger(largest, int(ptx::from_lane_across(uint32_t(largest), 2))));
  const int least_of_warp = ptx::warp_smallest(largest), most_of_warp = ptx::warp_largest(largest);
  if (threadIdx.x % 32 == 0) {
    shared.counts[0][threadIdx.x / 32] = least_of_warp;
    shared.counts[1][threadIdx.x / 32] = most_of_warp;
  }
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  int64_t low = shared.counts[0][0], high = shared.counts[1][0];
#pragma unroll
  for (int warp = 1; warp < kTileWarps; ++warp) {
    low = shared.counts[0][warp] < low ? shared.counts[0][warp] : low;
    high = larger(high, shared.counts[1][warp]);
  }
  low = larger(low, int64_t(kNoKey) + 1);  // what is no token reaches nothing
  high += 1;                               // nothing reaches high
  __syncthreads();                         // the counts have been read
  const auto reaching = [&](int64_t floor, int turn) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kTokensOfThread; ++i) count += key[i] >= int(floor);
    return sum_of_tile(count, turn, shared);
  };
  int reached = 0, turn = 0;
  if (const int all = reaching(low, turn++); all <= length) {
    high = low;
    reached = all;
  }
  while (high - low > 1 && reached < length / 4 * 3) {
    const int64_t middle = (low + high) >> 1;
    const int count = reaching(middle, turn++);
    if (count <= length) {
      high = middle;
      reached = count;
    } else {
      low = middle;
    }
  }
#pragma unroll
  for (int i = 0; i < kTokensOfThread; ++i) {
    // A comparison of 64 bits: high may lie one above all keys.
    if (int64_t(key[i]) >= high) list[atomicAdd(&shared.listed, 1)] = place_of(key[i], tokens.token(i));
  }
  for (int slot = reached + int(threadIdx.x); slot < length; slot += kTileThreads) list[slot] = -1;
  return high;
}

// By rejection and block, only the row behind the drafts is sampled, and what a draft that is no token ends.
__device__ __forceinline__ bool wants_sample(const Parameters& p, const Where& at, int count) {
  return p.is_match() || (at.is_target && draft_at(p, at.request, at.index, count) < 0);
}

// Grid (TILES * ALL_ROWS * B).
template <class Element>
__global__ void __launch_bounds__(kTileThreads) tiles_kernel(const Parameters p) {
  const int tile = int(blockIdx.x % unsigned(p.tiles));
  const Where at(p, blockIdx.x / unsigned(p.tiles));
  if (tile == 0 && at.row == 0 && threadIdx.x < 2) p.counters[2 * at.request + threadIdx.x] = 0;  // for the next launches
  const Request request(p, at.request);
  if (at.index > request.count - int(!at.is_target)) return;

  GEMMA4_SHARED(bytes);
  auto& shared = *reinterpret_cast<TileShared*>(bytes);
  const TileTokens tokens(p, tile);
  float score[kTokensOfThread];
  load_tile(Row<Element>(p, at), tokens, score);
  float largest_logit = -infinity();
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kTokensOfThread; ++i) {
    has_nan |= score[i] != score[i];
    largest_logit = fmaxf(largest_logit, score[i]);
  }
  const bool is_bad = has_nan || largest_logit == infinity();
  const int status = ptx::warp_largest(is_bad ? 2 : int(largest_logit > -infinity()));
  request.scores_of(score);
  float largest = -infinity();
  int first = tokens.first[0];  // of those that have it
#pragma unroll
  for (int i = 0; i < kTokensOfThread; ++i) largest = fmaxf(largest, score[i]);
#pragma unroll
  for (int i = kTokensOfThread - 1; i >= 0; --i) first = score[i] == largest ? tokens.token(i) : first;
  const int64_t largest_of_warp = best_of_warp(tokens.first[0] < p.vocabulary ? key_of(largest) : kNoKey, first);
  const bool lists = request.samples && request.is_listed(p);
  const bool samples = request.samples && !lists && wants_sample(p, at, request.count);
  int64_t sample_of_warp = -1, floor = 0;
  if (samples) {
    const Best sample =
        sample_of_tile(tokens, score, p.vocabulary, request.seed, request.position + uint64_t(at.index), uint32_t(p.stream));
    sample_of_warp = best_of_warp(sample.key, sample.token);
  } else if (lists) {
    int key[kTokensOfThread];
#pragma unroll
    for (int i = 0; i < kTokensOfThread; ++i) key[i] = tokens.token(i) < p.vocabulary ? key_of(score[i]) : kNoKey;
    floor = list_largest(key, tokens, at.lists(p) + int64_t(tile) * p.list, p.list, shared);
  }
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32;
    shared.status[warp] = status;
    shared.largest[warp] = largest_of_warp;
    shared.sample[warp] = sample_of_warp;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t worst = 0, best = -1, drawn = -1;
#pragma unroll
  for (int warp = 0; warp < kTileWarps; ++warp) {
    worst = larger(worst, shared.status[warp]);
    best = larger(best, shared.largest[warp]);
    drawn = larger(drawn, shared.sample[warp]);
  }
  int64_t* facts = at.facts(p) + tile;
  facts[kStatus * p.tiles] = worst;
  facts[kLargest * p.tiles] = best;
  facts[kSample * p.tiles] = drawn;
  facts[kFloor * p.tiles] = floor;
}

// Behind it, by match: of a row whose sample one filter, top-p or a large top_k, may remove, what decides whether it does. A
// read by many blocks, where a block that finishes a row would read it alone. Grid (TILES * ALL_ROWS * B).
template <class Element>
__global__ void __launch_bounds__(kTileThreads) survey_kernel(const Parameters p) {
  const int tile = int(blockIdx.x % unsigned(p.tiles));
  const Where at(p, blockIdx.x / unsigned(p.tiles));
  const Request request(p, at.request);
  if (at.index > request.count || !request.is_surveyed(p)) return;

  GEMMA4_SHARED(bytes);
  auto& shared = *reinterpret_cast<TileShared*>(bytes);
  int64_t* facts = at.facts(p);
  const int64_t largest = over_tiles<kTileThreads>(p, facts, kLargest, Largest(), -1, shared.largest);
  const int64_t sample = over_tiles<kTileThreads>(p, facts, kSample, Largest(), -1, shared.sample);
  const Row<Element> row(p, at);
  const TileTokens tokens(p, tile);
  float score[kTokensOfThread];
  load_tile(row, tokens, score);
  request.scores_of(score);
  const Survey survey(p, row, request, score_of_key(key_in(largest)), token_of_prize(sample));
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  int64_t below = 0, whole = 0, *list = at.lists(p) + int64_t(tile) * p.list;
#pragma unroll
  for (int i = 0; i < kTokensOfThread; ++i) {
    if (tokens.token(i) >= p.vocabulary) continue;
    const int64_t place = place_of(key_of(score[i]), tokens.token(i)), mass = survey.mass(score[i]);
    whole += mass;
    if (place < survey.base) {
      below += mass;
    } else if (const int slot = atomicAdd(&shared.listed, 1); slot < p.list) {
      list[slot] = place;
    }
  }
  below = over_block<kTileThreads>(below, Sum(), shared.largest);
  whole = over_block<kTileThreads>(whole, Sum(), shared.sample);
  for (int slot = shared.listed + int(threadIdx.x); slot < p.list; slot += kTileThreads) list[slot] = -1;
  if (threadIdx.x != 0) return;
  facts[kBelow * p.tiles + tile] = below;
  facts[kWhole * p.tiles + tile] = whole;
  facts[kAbove * p.tiles + tile] = shared.listed;
}

unsigned blocks_of(const Parameters& p) { return unsigned(p.tiles) * unsigned(p.all_rows()) * unsigned(p.batch); }

}  // namespace

std::string launch_tiles(const Parameters& p, int dtype, void* stream) {
  const auto kernel = dtype == GEMMA4_BF16   ? tiles_kernel<Bf16Logits>
                      : dtype == GEMMA4_FP16 ? tiles_kernel<Fp16Logits>
                                             : tiles_kernel<Fp32Logits>;
  return launch(kernel, blocks_of(p), 1, kTileThreads, sizeof(TileShared), stream, p);
}

std::string launch_survey(const Parameters& p, int dtype, void* stream) {
  const auto kernel = dtype == GEMMA4_BF16   ? survey_kernel<Bf16Logits>
                      : dtype == GEMMA4_FP16 ? survey_kernel<Fp16Logits>
                                             : survey_kernel<Fp32Logits>;
  return launch(kernel, blocks_of(p), 1, kTileThreads, sizeof(TileShared), stream, p);
}

}  // namespace gemma4::verification
