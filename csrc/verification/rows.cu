// Rows, finished: one block for each, its sample or its distribution after the filters; from what the tiles said, where that is
// enough. By match, the last block of a request that is done then emits.
//
// A filter leaves the places from a boundary on. What saves a read of the row:
//   * The lists hold every token whose key reaches their floors. If none of the floors lies above the k-th largest of the
//     listed, no token that is not listed can matter.
//   * An argmax over everything that lies in a subset is the argmax of the subset: if the sample of the unfiltered row survives
//     the filters, it is the sample of what survives.
//   * If one filter removes it, all that survives lies above it: the survey has listed that.
#include "distribution.cuh"
#include "outcome.cuh"
#include "search.cuh"

namespace gemma4::verification {
namespace {

struct Finished {
  int64_t token = -1, first = 0, last = kBeyond, total = kWholeMass;
  float largest = 0.0f;
};

template <class Element>
struct Finisher {
  const Parameters& p;
  const Where& at;
  const Request& request;
  const Row<Element>& row;
  RowShared& shared;
  bool wants_token;
  Finished made{};

  __device__ int64_t fact(Fact fact) const {
    return over_tiles<kRowThreads>(p, at.facts(p), fact, Largest(), INT64_MIN, shared.scratch);
  }
  __device__ int64_t sum_of_facts(Fact fact) const {
    return over_tiles<kRowThreads>(p, at.facts(p), fact, Sum(), 0, shared.scratch);
  }
  __device__ __forceinline__ float weight(int64_t place) const { return weight_of(score_of_key(key_in(place)), made.largest); }
  __device__ int64_t kept() const { return request.top_k < p.vocabulary ? request.top_k : p.vocabulary; }

  __device__ void finish() {
    const int64_t prize = fact(kLargest);
    const int key = key_in(prize);
    made.largest = score_of_key(key);
    made.token = token_of_prize(prize);
    if (!request.samples || made.largest == -infinity()) {
      made.first = place_of(key, int(made.token));
      made.last = made.first + 1;
    } else if (!(request.is_listed(p) ? from_lists() : wants_token && from_sample())) {
      from_row();
    }
  }

  // The first boundary is top-k's, and top-p goes on from there.
  __device__ bool from_lists() {
    const ListOfPlaces list{shared, load_lists()};
    if (list.count < kept()) return false;
    const int64_t most = list.count - kept();
    made.first = search_list(list, kTokenBits, 0, [](int64_t) { return 1; }, [=](int64_t) { return most; });
    if (fact(kFloor) > key_in(made.first)) return false;
    if (request.has_top_p()) cut_list(list, 0);
    sample_of(list);
    return true;
  }

  __device__ void cut_list(const ListOfPlaces& list, int64_t before) {
    const int64_t boundary = made.first;
    made.first = search_list(
        list, 0, before, [&](int64_t place) { return place >= boundary ? fixed(weight(place)) : 0; },
        [&](int64_t total) { return limit_of(request.cut, total); });
  }

  // Places of the tiles' lists, in any order; how many.
  __device__ int load_lists() {
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    for (int i = int(threadIdx.x); i < p.tiles * p.list; i += kRowThreads) {
      const int64_t place = at.lists(p)[i];
      if (place >= 0) shared.places[atomicAdd(&shared.listed, 1)] = place;
    }
    __syncthreads();
    return shared.listed;
  }

  // Whether the sample of the unfiltered row decides.
  __device__ bool from_sample() {
    const bool has_top_k = request.has_top_k(p), has_top_p = request.has_top_p();
    if (has_top_k && has_top_p) return false;
    const int sample = token_of_prize(fact(kSample));
    const Survey survey(p, row, request, made.largest, sample);
    bool survives = true;
    if (has_top_k || has_top_p) {
      int64_t below, whole, above;
      ListOfPlaces list = surveyed(survey, below, whole, above);
      const int64_t limit = has_top_k ? p.vocabulary - kept() : limit_of(request.cut, whole);
      survives = below > limit;
      if (!survives) {
        if (list.count < above) return false;
        if (has_top_k) {
          made.first = search_list(list, kTokenBits, below, [](int64_t) { return 1; }, [=](int64_t) { return limit; });
        } else {
          cut_list(list, below);
        }
        sample_of(list);
        return true;
      }
    }
    if (!(weight_of(survey.sample_score, made.largest) >= request.min_p)) {
      // Min-p wants a larger score than the sample's, and nothing smaller: top-k and top-p leave all of these.
      sample_of(WholeRow<Element>{shared, row, request});
      return true;
    }
    made.token = sample;
    return true;
  }

  // The survey's facts and list: by match those of its launch, else by a read of this block.
  __device__ ListOfPlaces surveyed(const Survey& survey, int64_t& below, int64_t& whole, int64_t& above) {
    if (p.is_match()) {
      below = sum_of_facts(kBelow);
      whole = sum_of_facts(kWhole);
      above = sum_of_facts(kAbove);
      return {shared, load_lists()};
    }
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    below = whole = 0;
    WholeRow<Element>{shared, row, request}.each([&](int64_t place) {
      const int64_t mass = survey.mass(score_of_key(key_in(place)));
      whole += mass;
      if (place < survey.base) {
        below += mass;
      } else if (const int slot = atomicAdd(&shared.listed, 1); slot < kScratch) {
        shared.places[slot] = place;
      }
    });
    below = over_block<kRowThreads>(below, Sum(), shared.scratch);
    whole = over_block<kRowThreads>(whole, Sum(), shared.scratch);
    above = shared.listed;
    return {shared, int(above < kScratch ? above : kScratch)};
  }

  // By reading the row: once for each digit of a boundary, and once for what is wanted.
  __device__ void from_row() {
    const WholeRow<Element> whole{shared, row, request};
    made.first = 0;
    if (request.has_top_k(p)) {
      const int64_t most = p.vocabulary - kept();
      made.first = search_row(whole, kTokenBits, [](int64_t) { return 1; }, [=](int64_t) { return most; });
    }
    if (request.has_top_p()) {
      const int64_t boundary = made.first;
      made.first = search_row(
          whole, 0, [&](int64_t place) { return place >= boundary ? fixed(weight(place)) : 0; },
          [&](int64_t total) { return limit_of(request.cut, total); });
    }
    sample_of(whole);
  }

  // The sample of what survives, or its mass.
  template <class Places>
  __device__ void sample_of(const Places& places) {
    int64_t prize = -1, total = 0;
    places.each([&](int64_t place) {
      if (place < made.first) return;
      const float score = score_of_key(key_in(place)), its_weight = weight_of(score, made.largest);
      if (!(its_weight >= request.min_p) || !(score > -infinity())) return;
      if (wants_token) {
        const int token = token_of_place(place);
        const uint32_t word = word_of(token, request.seed, request.position + uint64_t(at.index), uint32_t(p.stream));
        prize = larger(prize, prize_of(key_of(plus(score, gumbel_noise(word))), token));
      } else {
        total += fixed(its_weight);
      }
    });
    made.token = token_of_prize(over_block<kRowThreads>(prize, Largest(), shared.scratch));
    made.total = over_block<kRowThreads>(total, Sum(), shared.scratch);
  }
};

// Sample after sample, while the sample is the draft.
__device__ void match(const Parameters& p, int64_t number, int count) {
  Emitter emitter(p, number);
  const bool refused = is_refused(p, number, count);
  int accepted = 0;
  for (int row = 0; !refused && row == accepted && emitter.goes_on(); ++row) {
    const int64_t token = made_of(p, number, row, kToken);
    emitter.emit(token);
    accepted += row < count && p.drafts[number * (p.rows - 1) + row] == token;
  }
  emitter.close(accepted, refused);
}

// Grid (ALL_ROWS * B).
template <class Element>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(const Parameters p) {
  const Where at(p, blockIdx.x);
  const Request request(p, at.request);
  GEMMA4_SHARED(bytes);
  auto& shared = *reinterpret_cast<RowShared*>(bytes);
  int64_t* made = p.made + at.place(p) * kMade;
  const bool matters = at.index <= request.count - int(!at.is_target);
  if (matters) {
    const bool usable = over_tiles<kRowThreads>(p, at.facts(p), kStatus, Largest(), 0, shared.scratch) == 1;
    if (threadIdx.x == 0) made[kUsable] = usable;
    const int draft = draft_at(p, at.request, at.index, request.count);
    // Of the drafter, rows whose draft is a token.
    if (usable && (at.is_target || draft >= 0)) {
      const Row<Element> row(p, at);
      Finisher<Element> finisher{p, at, request, row, shared, p.is_match() || draft < 0};
      finisher.finish();
      const Finished& is = finisher.made;
      if (threadIdx.x == 0) {
        made[kToken] = is.token;
        made[kLargestScore] = bits_of(is.largest);
        made[kFirst] = is.first;
        made[kLast] = is.last;
        made[kTotal] = is.total;
        if (!p.is_match() && draft >= 0) {
          const Distribution distribution(p, at, request);
          made[kProbability] = bits_of(distribution.of(request.score_of(row.logit(draft)), draft));
        }
      }
    }
  }
  if (!p.is_match() || !is_last_block(p.counters + 2 * at.request, uint32_t(p.all_rows()), shared.scratch)) return;
  if (threadIdx.x == 0) match(p, at.request, request.count);
}

}  // namespace

std::string launch_rows(const Parameters& p, int dtype, void* stream) {
  const auto kernel = dtype == GEMMA4_BF16   ? rows_kernel<Bf16Logits>
                      : dtype == GEMMA4_FP16 ? rows_kernel<Fp16Logits>
                                             : rows_kernel<Fp32Logits>;
  return launch(kernel, unsigned(p.all_rows()) * unsigned(p.batch), 1, kRowThreads, sizeof(RowShared), stream, p);
}

}  // namespace gemma4::verification
