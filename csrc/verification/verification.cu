// gemma4_verify and gemma4_verify_workspace: what they accept, and how the workspace is laid out.
#include "verification.h"

#include "../common/checks.h"

namespace gemma4::verification {
namespace {

constexpr int64_t kMostVocabulary = int64_t(1) << 24;  // sums of masses fit into 64 bits, tokens into a place
constexpr int64_t kMostBlocks = INT32_MAX;             // of a launch
constexpr int64_t kMostStride = int64_t(1) << 40;      // times a number of rows it is no overflow
constexpr int64_t kMostBatch = INT32_MAX, kMostDrafts = 4095;

constexpr Checks kChecks{"gemma4_verify"};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Places that each of so many tiles lists: a power of two, or 0 where the lists would be too short to decide anything.
int list_length(int64_t tiles) {
  int length = kLongestList;
  while (length >= kShortestList && length * tiles > kScratch) length /= 2;
  return length >= kShortestList ? length : 0;
}

bool is_match(const gemma4_verify_arguments& a) { return a.method == GEMMA4_MATCH || a.drafts_count == 0; }

gemma4_status check_sizes(const gemma4_verify_arguments* arguments) {
  if (arguments == nullptr) return kChecks.invalid("arguments is null");
  const gemma4_verify_arguments& a = *arguments;
  if (a.batch < 0 || a.batch > kMostBatch) {
    return kChecks.invalid("batch must lie in [0, " + number(kMostBatch) + "], got " + number(a.batch));
  }
  if (a.drafts_count < 0 || a.drafts_count > kMostDrafts) {
    return kChecks.invalid("drafts_count must lie in [0, " + number(kMostDrafts) + "], got " + number(a.drafts_count));
  }
  if (a.vocabulary < 1 || a.vocabulary > kMostVocabulary) {
    return kChecks.invalid("vocabulary must lie in [1, " + number(kMostVocabulary) + "], got " + number(a.vocabulary));
  }
  if (!is_dtype(a.dtype)) return kChecks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
  if (a.method < GEMMA4_MATCH || a.method > GEMMA4_BLOCK) {
    return kChecks.unsupported("method " + number(a.method) + " has no kernel in this version");
  }
  if (a.stream < 0 || a.stream > 3) return kChecks.invalid("noise must lie in [0, 3], got " + number(a.stream));
  if (a.ends_count < 0 || a.ends_count > kMostEnds) {
    return kChecks.unsupported("ends_count must lie in [0, " + number(kMostEnds) + "], got " + number(a.ends_count));
  }
  const int64_t rows = a.batch * (2 * a.drafts_count + 1);
  if (rows * divided_up(a.vocabulary, kTile) > kMostBlocks) {
    return kChecks.unsupported("a launch has at most " + number(kMostBlocks) + " tiles of 2048 tokens: split the batch");
  }
  return GEMMA4_OK;
}

gemma4_status check_strides(const char* name, int64_t batch, int64_t row) {
  const auto is_fine = [](int64_t stride) { return stride >= -kMostStride && stride <= kMostStride; };
  if (is_fine(batch) && is_fine(row)) return GEMMA4_OK;
  return kChecks.invalid(std::string("the strides of ") + name + " must lie within 2^40");
}

gemma4_status check(const gemma4_verify_arguments* arguments) {
  if (auto status = check_sizes(arguments)) return status;
  const gemma4_verify_arguments& a = *arguments;
  if (a.batch == 0) return GEMMA4_OK;
  const uintptr_t bytes = a.dtype == GEMMA4_FP32 ? 4 : 2;
  if (auto status = kChecks.pointer("logits", a.logits, bytes)) return status;
  if (auto status = check_strides("logits", a.stride_batch, a.stride_row)) return status;
  if (a.draft_logits != nullptr) {
    if (!is_aligned(a.draft_logits, bytes)) return kChecks.invalid("draft_logits is not aligned to its elements");
    if (auto status = check_strides("draft_logits", a.draft_stride_batch, a.draft_stride_row)) return status;
  }
  if (a.drafts_count > 0) {
    if (auto status = kChecks.pointer("draft_tokens", a.draft_tokens, 8)) return status;
  }
  const struct {
    const char* name;
    const void* address;
    uintptr_t alignment;
    bool is_optional;
  } vectors[] = {
      {"num_drafts", a.num_drafts, 8, true},
      {"max_new_tokens", a.max_new_tokens, 8, true},
      {"temperature", a.temperature, 4, false},
      {"top_k", a.top_k, 8, false},
      {"cut", a.cut, 4, false},
      {"min_p", a.min_p, 4, false},
      {"softcap", a.softcap, 4, false},
      {"seeds", a.seeds, 8, false},
      {"positions", a.positions, 8, false},
      {"ends", a.ends, 8, a.ends_count == 0},
      {"tokens", a.tokens, 8, false},
      {"num_accepted", a.num_accepted, 8, false},
      {"next_token", a.next_token, 8, false},
      {"num_emitted", a.num_emitted, 8, false},
      {"hidden_row", a.hidden_row, 8, false},
      {"finished", a.finished, 1, false},
      {"refused", a.refused, 1, false},
  };
  for (const auto& vector : vectors) {
    if (vector.address == nullptr && vector.is_optional) continue;
    if (auto status = kChecks.pointer(vector.name, vector.address, vector.alignment)) return status;
  }
  return GEMMA4_OK;
}

// Sizes, and the parts of the workspace as offsets from `workspace`; the bytes of all.
size_t lay_out(const gemma4_verify_arguments& a, void* workspace, Parameters& p) {
  p.batch = int(a.batch);
  p.rows = int(a.drafts_count) + 1;
  p.drafter_rows = a.draft_logits == nullptr || is_match(a) ? 0 : int(a.drafts_count);
  p.vocabulary = int(a.vocabulary);
  p.tiles = int(divided_up(a.vocabulary, kTile));
  p.list = list_length(p.tiles);
  p.segments = int(divided_up(a.vocabulary, kSegment));
  p.method = is_match(a) ? int(GEMMA4_MATCH) : a.method;
  const size_t rows = size_t(p.batch) * size_t(p.all_rows());
  size_t numbers = 0;
  const auto part = [&](size_t count) {
    int64_t* address = workspace == nullptr ? nullptr : static_cast<int64_t*>(workspace) + numbers;
    numbers += count;
    return address;
  };
  p.facts = part(rows * kFacts * size_t(p.tiles));
  p.lists = part(rows * size_t(p.tiles) * size_t(p.list));
  p.made = part(rows * kMade);
  p.residuals = part(p.is_match() ? 0 : size_t(a.batch) * size_t(a.drafts_count) * kResiduals * size_t(p.segments));
  p.counters = reinterpret_cast<uint32_t*>(part(size_t(a.batch)));  // two of 32 bits each
  return numbers * sizeof(int64_t);
}

gemma4_status run(const gemma4_verify_arguments& a, void* workspace, size_t workspace_bytes, gemma4_stream stream) {
  Parameters p{};
  const size_t wanted = lay_out(a, workspace, p);
  if (auto status = kChecks.workspace(workspace, workspace_bytes, wanted)) return status;
  p.logits = a.logits;
  p.draft_logits = a.draft_logits;
  p.stride_batch = a.stride_batch;
  p.stride_row = a.stride_row;
  p.draft_stride_batch = a.draft_stride_batch;
  p.draft_stride_row = a.draft_stride_row;
  p.drafts = a.draft_tokens;
  p.num_drafts = a.num_drafts;
  p.max_new_tokens = a.max_new_tokens;
  p.temperature = a.temperature;
  p.top_k = a.top_k;
  p.cut = a.cut;
  p.min_p = a.min_p;
  p.softcap = a.softcap;
  p.seeds = a.seeds;
  p.positions = a.positions;
  p.tokens = a.tokens;
  p.num_accepted = a.num_accepted;
  p.next_token = a.next_token;
  p.num_emitted = a.num_emitted;
  p.hidden_row = a.hidden_row;
  p.finished = a.finished;
  p.refused = a.refused;
  p.stream = a.stream;
  p.ends_count = a.ends_count;
  for (int i = 0; i < a.ends_count; ++i) p.ends[i] = a.ends[i];
  auto problem = launch_tiles(p, a.dtype, stream);
  if (problem.empty() && p.is_match()) problem = launch_survey(p, a.dtype, stream);
  if (problem.empty()) problem = launch_rows(p, a.dtype, stream);
  if (problem.empty() && !p.is_match()) problem = launch_residuals(p, a.dtype, stream);
  return kChecks.launched(problem);
}

}  // namespace
}  // namespace gemma4::verification

extern "C" {

gemma4_status gemma4_verify_workspace(const gemma4_verify_arguments* arguments, size_t* bytes) {
  using namespace gemma4::verification;
  if (bytes == nullptr) return kChecks.invalid("bytes is null");
  *bytes = 0;
  if (auto status = check_sizes(arguments)) return status;
  Parameters p{};
  if (arguments->batch > 0) *bytes = lay_out(*arguments, nullptr, p);
  return GEMMA4_OK;
}

gemma4_status gemma4_verify(const gemma4_verify_arguments* arguments, void* workspace, size_t workspace_bytes,
                            gemma4_stream stream) {
  using namespace gemma4::verification;
  if (auto status = check(arguments)) return status;
  if (arguments->batch == 0) return GEMMA4_OK;
  return run(*arguments, workspace, workspace_bytes, stream);
}

}  // extern "C"
