// The end of verification by "rejection" and by "block": max(joint p - q, 0) of the rows that need it, by many blocks, of which
// the last of a request decides and emits.
//
// Rejection goes on while u q(draft) < p(draft). Block verification (Sun et al. 2024, algorithm 2) looks at all rows that its
// joint probability reaches, and keeps the longest block that is accepted. Either ends in one row that says the last token: a
// sample of p where that row has no draft, else the largest (joint p - q) / E over the tokens, or the largest p / E if joint p
// is nowhere above q.
#include "distribution.cuh"
#include "outcome.cuh"

namespace gemma4::verification {
namespace {

constexpr int kThreads = 256;
constexpr int kGroupsOfThread = kSegment / kGroup / kThreads;

struct ResidualShared {
  int64_t scratch[kThreads / 32];
  float joint;  // of the block's row; negative where nobody wants the row's residual
};

__device__ __forceinline__ float probability_at(const Parameters& p, int64_t request, int row) {
  return float_of(int(made_of(p, request, row, kProbability)));
}

// A request on its way through its rows: what all blocks find alike.
struct Walk {
  const Parameters& p;
  const int64_t request;
  const Request& filters;
  float joint = 1.0f;  // min(.. min(min(1, p1 / q1) p2 / q2, 1) .., 1)
  int row = 0;

  __device__ int draft() const { return draft_at(p, request, row, filters.count); }
  __device__ float target() const { return probability_at(p, request, row); }
  __device__ float drafter() const { return p.drafter_rows > 0 ? probability_at(p, request, p.rows + row) : 1.0f; }
  __device__ float decision(int of_row) const {
    return uniform_of(word_of(0, filters.seed, filters.position + uint64_t(of_row), kAcceptance));
  }

  // By rejection: whether the draft of the row stays.
  __device__ bool accepts() const { return draft() >= 0 && times(decision(row), drafter()) < target(); }

  // By block: the joint probability behind the row, 0 behind the last.
  __device__ float following() const {
    if (draft() < 0) return 0.0f;
    const float q = drafter(), ratio = q > 0.0f ? over(target(), q) : target() > 0.0f ? 1.0f : 0.0f;
    return fminf(times(joint, ratio), 1.0f);
  }
};

// The joint probability with which a row's residual is wanted; negative where it is not.
__device__ float wanted(const Parameters& p, int64_t request, const Request& filters, int row) {
  if (draft_at(p, request, row, filters.count) < 0 || is_refused(p, request, filters.count)) return -1.0f;
  Walk walk{p, request, filters};
  for (; walk.row < row; ++walk.row) {
    if (p.method == GEMMA4_BLOCK) {
      walk.joint = walk.following();
      if (!(walk.joint > 0.0f)) return -1.0f;
    } else if (!walk.accepts()) {
      return -1.0f;
    }
  }
  return p.method == GEMMA4_REJECTION && walk.accepts() ? -1.0f : walk.joint;
}

__device__ int64_t* residuals_of(const Parameters& p, int64_t request, int row) {
  return p.residuals + (request * (p.rows - 1) + row) * kResiduals * p.segments;
}

template <class Element>
__device__ void read_segment(const Parameters& p, int64_t request, const Request& filters, int row, int segment, float joint,
                             int64_t* scratch) {
  // Without the drafter's logits its row is the target's again, and not looked at.
  const auto first = unsigned(request * p.all_rows() + row);
  const Where at(p, first), drafter(p, first + (p.drafter_rows > 0 ? unsigned(p.rows) : 0));
  const Row<Element> p_row(p, at), q_row(p, drafter);
  const Distribution target(p, at, filters), proposal(p, drafter, filters);
  const bool has_q = p.drafter_rows > 0;
  const int draft = draft_at(p, request, row, filters.count);
  const uint64_t position = filters.position + uint64_t(row);
  int64_t mass = 0, residual_prize = -1, target_prize = -1;
#pragma unroll 1
  for (int i = 0; i < kGroupsOfThread; ++i) {
    const int first = segment * kSegment + (i * kThreads + int(threadIdx.x)) * kGroup;
    if (first >= p.vocabulary) break;
    float p_score[kGroup], q_score[kGroup];
    p_row.group(first, p_score);
    filters.scores_of(p_score);
    if (has_q) {
      q_row.group(first, q_score);
      filters.scores_of(q_score);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int token = first + j;
      if (token >= p.vocabulary) continue;
      const float share = target.of(p_score[j], token);
      if (!(share > 0.0f)) continue;  // neither a residual nor a chance
      const float q = has_q ? proposal.of(q_score[j], token) : token == draft ? 1.0f : 0.0f;
      const float residual = fmaxf(minus(times(share, joint), q), 0.0f);
      const float wait = exponential_noise(word_of(token, filters.seed, position, kResidual));
      mass += fixed(residual);
      if (residual > 0.0f) residual_prize = larger(residual_prize, prize_of(key_of(over(residual, wait)), token));
      target_prize = larger(target_prize, prize_of(key_of(over(share, wait)), token));
    }
  }
  mass = over_block<kThreads>(mass, Sum(), scratch);
  residual_prize = over_block<kThreads>(residual_prize, Largest(), scratch);
  target_prize = over_block<kThreads>(target_prize, Largest(), scratch);
  if (threadIdx.x != 0) return;
  int64_t* out = residuals_of(p, request, row) + segment;
  out[kMass * p.segments] = mass;
  out[kResidualPrize * p.segments] = residual_prize;
  out[kTargetPrize * p.segments] = target_prize;
}

struct Residual {
  int64_t mass = 0, token;

  __device__ Residual(const Parameters& p, int64_t request, int row) {
    const volatile int64_t* facts = residuals_of(p, request, row);  // of other blocks: see made_of
    int64_t residual_prize = -1, target_prize = -1;
    for (int segment = 0; segment < p.segments; ++segment) {
      mass += facts[kMass * p.segments + segment];
      residual_prize = larger(residual_prize, facts[kResidualPrize * p.segments + segment]);
      target_prize = larger(target_prize, facts[kTargetPrize * p.segments + segment]);
    }
    token = token_of_prize(residual_prize >= 0 ? residual_prize : target_prize);
  }
};

struct End {
  int accepted = 0;
  int64_t token = 0;
};

__device__ End reject(Walk walk) {
  while (walk.accepts()) ++walk.row;
  const bool has_draft = walk.draft() >= 0;
  if (!has_draft) return {walk.row, made_of(walk.p, walk.request, walk.row, kToken)};
  return {walk.row, Residual(walk.p, walk.request, walk.row).token};
}

__device__ End block(Walk walk) {
  End end;
  for (bool running = true; running; ++walk.row) {
    int64_t token = made_of(walk.p, walk.request, walk.row, kToken);
    float share = walk.joint;
    if (walk.draft() >= 0) {
      const Residual residual(walk.p, walk.request, walk.row);
      const float left = from_fixed(residual.mass), rest = plus(left, minus(1.0f, walk.joint));
      share = rest > 0.0f ? over(left, rest) : 1.0f;
      token = residual.token;
    }
    if (walk.row == 0 || walk.decision(walk.row - 1) < share) end = {walk.row, token};
    walk.joint = walk.following();
    running = walk.joint > 0.0f;
  }
  return end;
}

__device__ void decide(const Parameters& p, int64_t number, const Request& request) {
  Emitter emitter(p, number);
  const bool refused = is_refused(p, number, request.count);
  End end;
  if (!refused) {
    const Walk walk{p, number, request};
    end = p.method == GEMMA4_BLOCK ? block(walk) : reject(walk);
    for (int row = 0; row <= end.accepted && emitter.goes_on(); ++row) {
      emitter.emit(row < end.accepted ? p.drafts[number * (p.rows - 1) + row] : end.token);
    }
  }
  emitter.close(end.accepted, refused);
}

// Grid (SEGMENTS * K * B).
template <class Element>
__global__ void __launch_bounds__(kThreads) residuals_kernel(const Parameters p) {
  const int drafts = p.rows - 1;
  const int segment = int(blockIdx.x % unsigned(p.segments)), row = int(blockIdx.x / unsigned(p.segments) % unsigned(drafts));
  const int64_t number = blockIdx.x / unsigned(p.segments) / unsigned(drafts);
  const Request request(p, number);
  GEMMA4_SHARED(bytes);
  auto& shared = *reinterpret_cast<ResidualShared*>(bytes);
  if (threadIdx.x == 0) shared.joint = wanted(p, number, request, row);
  __syncthreads();
  const float joint = shared.joint;
  if (joint >= 0.0f) read_segment<Element>(p, number, request, row, segment, joint, shared.scratch);
  if (!is_last_block(p.counters + 2 * number + 1, uint32_t(p.segments * drafts), shared.scratch)) return;
  if (threadIdx.x == 0) decide(p, number, request);
}

}  // namespace

std::string launch_residuals(const Parameters& p, int dtype, void* stream) {
  const auto kernel = dtype == GEMMA4_BF16   ? residuals_kernel<Bf16Logits>
                      : dtype == GEMMA4_FP16 ? residuals_kernel<Fp16Logits>
                                             : residuals_kernel<Fp32Logits>;
  const unsigned blocks = unsigned(p.segments) * unsigned(p.rows - 1) * unsigned(p.batch);
  return launch(kernel, blocks, 1, kThreads, sizeof(ResidualShared), stream, p);
}

}  // namespace gemma4::verification
