// gemma4_verify on the emulator, called through the C interface, for builds that no Python can load: the sanitizers'.
//
//   verification_check           calls of many shapes, each against the same filters and methods over a sorted row
//   verification_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
//
// Every buffer is a heap block of exactly its size, so AddressSanitizer sees the first byte beyond. Scores and noise are the
// kernels' own functions, which tests in Python hold to the bits of the eager backend; what is independent here is all around
// them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/verification/row.cuh"

namespace {

using namespace gemma4::verification;

struct Shape {
  int64_t batch, drafts, vocabulary;
  int dtype, method;
  bool told;          // the drafter's logits are given
  int64_t padding;    // elements between rows
  double scale;       // of the logits
};

int64_t bytes_of(int dtype) { return dtype == GEMMA4_FP32 ? 4 : 2; }

// (B, R, V) logits with padding between rows, in a block that ends with the last of them.
struct LogitsBlock {
  int dtype;
  int64_t stride;
  std::vector<unsigned char> bytes;

  LogitsBlock(int64_t rows, const Shape& shape, std::mt19937& random)
      : dtype(shape.dtype), stride(shape.vocabulary + shape.padding) {
    std::normal_distribution<float> normal;
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + shape.vocabulary;
    bytes.resize(size_t(count * bytes_of(dtype)));
    bytes.shrink_to_fit();
    for (int64_t i = 0; i < count; ++i) {
      // Eighths, so that some are equal.
      const float value = std::round(float(shape.scale) * normal(random) * 8) / 8;
      const uint16_t half = dtype == GEMMA4_BF16 ? emulator::float_to_bf16(value) : emulator::float_to_fp16(value);
      const void* number = dtype == GEMMA4_FP32 ? static_cast<const void*>(&value) : &half;
      std::memcpy(bytes.data() + i * bytes_of(dtype), number, size_t(bytes_of(dtype)));
    }
  }
  float at(int64_t row, int64_t token) const {
    const unsigned char* place = bytes.data() + (row * stride + token) * bytes_of(dtype);
    uint16_t half;
    std::memcpy(&half, place, 2);
    float value;
    if (dtype == GEMMA4_FP32) return std::memcpy(&value, place, 4), value;
    return dtype == GEMMA4_BF16 ? emulator::bf16_to_float(half) : emulator::fp16_to_float(half);
  }
};

struct Emitted {
  std::vector<int64_t> tokens;
  int64_t accepted = 0;
};

struct Call {
  Shape shape;
  std::mt19937 random;
  LogitsBlock logits, draft_logits;
  std::vector<int64_t> drafts, num_drafts, budgets, top_k, seeds, positions, ends;
  std::vector<float> temperature, cut, min_p, softcap;
  std::vector<int64_t> tokens, results;
  std::vector<uint8_t> flags;
  gemma4_verify_arguments arguments{};

  Call(const Shape& s, unsigned seed)
      : shape(s),
        random(seed),
        logits(s.batch * (s.drafts + 1), s, random),
        draft_logits(s.told ? s.batch * s.drafts : 0, s, random) {
    const auto one_of = [this](auto... values) {
      const double all[] = {double(values)...};
      return all[random() % std::size(all)];
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      temperature.push_back(float(one_of(0, 1, 1, 0.5, 3)));
      top_k.push_back(int64_t(one_of(0, 0, 1, 5, 64, 100, 600)));
      cut.push_back(float(one_of(0, 0, 0.05, 0.5)));
      min_p.push_back(float(one_of(0, 0, 0.1)));
      softcap.push_back(float(one_of(0, 0, 4)));
      seeds.push_back(int64_t(random()) << 20);
      positions.push_back(int64_t(random()) << 8);
      num_drafts.push_back(int64_t(random() % unsigned(s.drafts + 1)));
      budgets.push_back(int64_t(random() % unsigned(s.drafts + 3)));
      for (int64_t k = 0; k < s.drafts; ++k) drafts.push_back(likely(b, k));
    }
    for (int i = 0; i < 5; ++i) ends.push_back(int64_t(random() % unsigned(s.vocabulary)));
    tokens.assign(size_t(s.batch * (s.drafts + 1)), -77);
    results.assign(size_t(4 * s.batch), -77);
    flags.assign(size_t(2 * s.batch), 0x77);
    gemma4_verify_arguments& a = arguments;
    a.batch = s.batch;
    a.drafts_count = s.drafts;
    a.vocabulary = s.vocabulary;
    a.logits = logits.bytes.data();
    a.stride_row = logits.stride;
    a.stride_batch = (s.drafts + 1) * logits.stride;
    a.draft_logits = s.told ? draft_logits.bytes.data() : nullptr;
    a.draft_stride_row = draft_logits.stride;
    a.draft_stride_batch = s.drafts * draft_logits.stride;
    a.draft_tokens = drafts.data();
    a.num_drafts = num_drafts.data();
    a.max_new_tokens = budgets.data();
    a.temperature = temperature.data();
    a.top_k = top_k.data();
    a.cut = cut.data();
    a.min_p = min_p.data();
    a.softcap = softcap.data();
    a.seeds = seeds.data();
    a.positions = positions.data();
    a.ends = ends.data();
    a.ends_count = int32_t(ends.size());
    a.tokens = tokens.data();
    a.num_accepted = results.data();
    a.next_token = results.data() + s.batch;
    a.num_emitted = results.data() + 2 * s.batch;
    a.hidden_row = results.data() + 3 * s.batch;
    a.finished = flags.data();
    a.refused = flags.data() + s.batch;
    a.dtype = s.dtype;
    a.method = s.method;
  }

  // The largest logit's token, or any.
  int64_t likely(int64_t request, int64_t row) {
    int64_t best = 0;
    for (int64_t token = 1; token < shape.vocabulary; ++token) {
      const int64_t place = request * (shape.drafts + 1) + row;
      if (logits.at(place, token) > logits.at(place, best)) best = token;
    }
    return random() % 4 ? best : int64_t(random() % unsigned(shape.vocabulary + 1));
  }

  gemma4_status run() {
    size_t bytes = 0;
    if (auto status = gemma4_verify_workspace(&arguments, &bytes)) return status;
    void* workspace = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
    std::memset(workspace, 0xA5, bytes);
    const auto status = gemma4_verify(&arguments, workspace, bytes, nullptr);
    std::free(workspace);
    return status;
  }

  // What the filters leave of a row: tokens with their scores and masses; p of all tokens.
  struct Distribution {
    std::vector<float> score, p;
    std::vector<bool> alive;
  };

  Request request_of(int64_t b) const {
    Parameters p{};
    p.temperature = temperature.data();
    p.softcap = softcap.data();
    p.cut = cut.data();
    p.min_p = min_p.data();
    p.top_k = top_k.data();
    p.seeds = seeds.data();
    p.positions = positions.data();
    p.num_drafts = num_drafts.data();
    p.rows = int(shape.drafts) + 1;
    return Request(p, b);
  }

  Distribution distribution(const LogitsBlock& block, int64_t row, const Request& request) const {
    const auto count = size_t(shape.vocabulary);
    Distribution made{std::vector<float>(count), std::vector<float>(count), std::vector<bool>(count, true)};
    std::vector<int> order(count);
    for (size_t i = 0; i < count; ++i) {
      made.score[i] = request.score_of(block.at(row, int64_t(i)));
      order[i] = int(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return made.score[a] < made.score[b]; });
    const float largest = made.score[order.back()];
    std::vector<int64_t> mass(count);
    for (size_t i = 0; i < count; ++i) mass[i] = fixed(weight_of(made.score[i], largest));
    if (!request.samples) {
      size_t first = 0;
      while (made.score[first] != largest) ++first;
      made.alive.assign(count, false);
      made.alive[first] = true;
    } else {
      if (request.top_k > 0 && request.top_k < shape.vocabulary) {
        const float kth = made.score[order[count - size_t(request.top_k)]];
        for (size_t i = 0; i < count; ++i) made.alive[i] = made.score[i] >= kth;
      }
      if (request.cut > 0) {
        int64_t total = 0, sum = 0;
        for (size_t i = 0; i < count; ++i) total += made.alive[i] ? mass[i] : 0;
        const int64_t limit = limit_of(request.cut, total);
        for (const int token : order) {
          sum += made.alive[token] ? mass[token] : 0;
          made.alive[token] = made.alive[token] && (sum > limit || token == order.back());
        }
      }
      for (size_t i = 0; i < count; ++i) {
        made.alive[i] = made.alive[i] && made.score[i] > -INFINITY && weight_of(made.score[i], largest) >= request.min_p;
      }
    }
    int64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += made.alive[i] ? mass[i] : 0;
    for (size_t i = 0; i < count; ++i) made.p[i] = made.alive[i] ? weight_of(made.score[i], largest) / from_fixed(total) : 0;
    return made;
  }

  uint32_t word(const Request& request, int64_t row, int64_t token, uint32_t stream) const {
    return word_of(int(token), request.seed, request.position + uint64_t(row), stream);
  }

  template <class Value>
  int64_t first_largest(const std::vector<bool>& alive, Value value) const {
    int64_t best = -1;
    for (int64_t i = 0; i < shape.vocabulary; ++i) {
      if (alive[size_t(i)] && (best < 0 || value(i) > value(best))) best = i;
    }
    return best;
  }

  int64_t sample(const Distribution& of, const Request& request, int64_t row) const {
    return first_largest(of.alive, [&](int64_t i) { return of.score[size_t(i)] + gumbel_noise(word(request, row, i, kTarget)); });
  }

  int64_t residual(const Distribution& target, const std::vector<float>& q, float joint, const Request& request, int64_t row,
                   float* mass) const {
    std::vector<float> rest(q.size());
    std::vector<bool> alive(q.size());
    int64_t sum = 0;
    bool any = false;
    for (size_t i = 0; i < q.size(); ++i) {
      rest[i] = std::fmax(target.p[i] * joint - q[i], 0.0f);
      sum += fixed(rest[i]);
      any |= rest[i] > 0;
    }
    *mass = from_fixed(sum);
    if (!any) rest = target.p;
    for (size_t i = 0; i < q.size(); ++i) alive[i] = rest[i] > 0;
    return first_largest(alive, [&](int64_t i) { return rest[size_t(i)] / exponential_noise(word(request, row, i, kResidual)); });
  }

  Emitted expected(int64_t b) const {
    const Request request = request_of(b);
    Emitted found;
    float joint = 1;
    int64_t token = -1;
    for (int64_t row = 0; row <= request.count; ++row) {
      const Distribution target = distribution(logits, b * (shape.drafts + 1) + row, request);
      const int64_t draft = row < request.count ? drafts[size_t(b * shape.drafts + row)] : -1;
      const bool has_draft = draft >= 0 && draft < shape.vocabulary;
      const auto u = [&](int64_t of) { return uniform_of(word(request, of, 0, kAcceptance)); };
      if (shape.method == GEMMA4_MATCH || shape.drafts == 0) {
        token = sample(target, request, row);
        if (token != draft) break;
        ++found.accepted;
        continue;
      }
      std::vector<float> q(size_t(shape.vocabulary), 0.0f);
      if (has_draft) {
        if (shape.told) q = distribution(draft_logits, b * shape.drafts + row, request).p;
        else q[size_t(draft)] = 1;
      }
      const float p_draft = has_draft ? target.p[size_t(draft)] : 0, q_draft = has_draft ? q[size_t(draft)] : 0;
      float mass = 0;
      if (shape.method == GEMMA4_REJECTION) {
        if (has_draft && u(row) * q_draft < p_draft) {
          ++found.accepted;
          continue;
        }
        token = has_draft ? residual(target, q, 1, request, row, &mass) : sample(target, request, row);
        break;
      }
      const int64_t follows = has_draft ? residual(target, q, joint, request, row, &mass) : sample(target, request, row);
      const float rest = mass + (1 - joint), share = !has_draft ? joint : rest > 0 ? mass / rest : 1;
      if (row == 0 || u(row - 1) < share) {
        found.accepted = row;
        token = follows;
      }
      joint = has_draft ? std::fmin(joint * (q_draft > 0 ? p_draft / q_draft : float(p_draft > 0)), 1.0f) : 0;
      if (!(joint > 0)) break;
    }
    for (int64_t i = 0; i < found.accepted; ++i) found.tokens.push_back(drafts[size_t(b * shape.drafts + i)]);
    found.tokens.push_back(token);
    size_t stop = std::min(found.tokens.size(), size_t(budgets[size_t(b)]));
    for (size_t i = 0; i < stop; ++i) {
      if (std::count(ends.begin(), ends.end(), found.tokens[i])) stop = i + 1;
    }
    found.tokens.resize(stop);
    found.accepted = std::min(found.accepted, int64_t(stop));
    return found;
  }

  bool is_right() const {
    const int64_t rows = shape.drafts + 1;
    for (int64_t b = 0; b < shape.batch; ++b) {
      const Emitted emitted = expected(b);
      const auto count = int64_t(emitted.tokens.size());
      bool right = results[size_t(b)] == emitted.accepted && results[size_t(2 * shape.batch + b)] == count;
      right &= results[size_t(3 * shape.batch + b)] == std::max<int64_t>(count - 1, 0) && flags[size_t(shape.batch + b)] == 0;
      right &= results[size_t(shape.batch + b)] == (count ? emitted.tokens.back() : -1);
      for (int64_t i = 0; i < rows; ++i) {
        right &= tokens[size_t(b * rows + i)] == (i < count ? emitted.tokens[size_t(i)] : -1);
      }
      if (!right) return std::printf("request %ld is wrong\n", long(b)), false;
    }
    return true;
  }

  bool is_untouched() const {
    return std::count(tokens.begin(), tokens.end(), -77) == int64_t(tokens.size()) &&
           std::count(results.begin(), results.end(), -77) == int64_t(results.size()) &&
           std::count(flags.begin(), flags.end(), 0x77) == int64_t(flags.size());
  }
};

int check_shapes() {
  const Shape shapes[] = {
      {4, 0, 1, GEMMA4_BF16, GEMMA4_MATCH, false, 0, 1},        {8, 1, 5, GEMMA4_FP32, GEMMA4_MATCH, false, 0, 2},
      {6, 2, 130, GEMMA4_FP16, GEMMA4_MATCH, false, 3, 2},      {6, 1, 2056, GEMMA4_BF16, GEMMA4_MATCH, false, 0, 2},
      {6, 1, 2049, GEMMA4_BF16, GEMMA4_MATCH, false, 0, 0.2},   {4, 2, 700, GEMMA4_FP32, GEMMA4_REJECTION, true, 4, 2},
      {4, 2, 4099, GEMMA4_BF16, GEMMA4_REJECTION, true, 0, 1},  {4, 2, 333, GEMMA4_FP16, GEMMA4_REJECTION, false, 0, 2},
      {4, 3, 700, GEMMA4_BF16, GEMMA4_BLOCK, true, 8, 2},       {4, 2, 2100, GEMMA4_FP32, GEMMA4_BLOCK, true, 1, 0.5},
      {4, 2, 64, GEMMA4_FP16, GEMMA4_BLOCK, false, 0, 2},       {3, 0, 70, GEMMA4_BF16, GEMMA4_BLOCK, false, 0, 2},
  };
  unsigned seed = 0;
  for (const Shape& shape : shapes) {
    Call call(shape, ++seed);
    const auto status = call.run();
    std::printf("b %ld k %ld v %ld method %d: %s\n", long(shape.batch), long(shape.drafts), long(shape.vocabulary), shape.method,
                status == GEMMA4_OK ? "ran" : gemma4_last_error());
    if (status != GEMMA4_OK || !call.is_right()) return 1;
  }
  return 0;
}

// One field of a good call made wrong; each only once, because a pointer that is moved twice may be right again.
void spoil(gemma4_verify_arguments& a, unsigned& spoiled, std::mt19937& random) {
  const int64_t sizes[] = {INT64_MIN, -1, int64_t(1) << 32, int64_t(1) << 40, INT64_MAX};
  const int64_t size = sizes[random() % std::size(sizes)];
  const int kinds[] = {-1, 3, 7, INT32_MAX, INT32_MIN};
  const int kind = kinds[random() % std::size(kinds)];
  const auto move = [&](auto*& pointer) {
    const auto moved = reinterpret_cast<uintptr_t>(pointer) + 1;
    pointer = random() % 2 ? nullptr : reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(moved);
  };
  const unsigned field = random() % 23;
  if (spoiled >> field & 1) return;
  spoiled |= 1u << field;
  switch (field) {
    case 0: a.batch = size; break;
    case 1: a.drafts_count = size; break;
    case 2: a.vocabulary = random() % 4 ? size : 0; break;
    case 3: move(a.logits); break;
    case 4: a.stride_batch = random() % 2 ? INT64_MAX : INT64_MIN; break;
    case 5: a.stride_row = random() % 2 ? INT64_MAX : INT64_MIN; break;
    case 6: a.draft_stride_row = random() % 2 ? INT64_MAX : INT64_MIN; break;
    case 7: move(a.draft_tokens); break;
    case 8: move(a.temperature); break;
    case 9: move(a.top_k); break;
    case 10: move(a.cut); break;
    case 11: move(a.min_p); break;
    case 12: move(a.softcap); break;
    case 13: move(a.seeds); break;
    case 14: move(a.positions); break;
    case 15: move(a.tokens); break;
    case 16: move(a.num_accepted); break;
    case 17: move(a.hidden_row); break;
    case 18: a.finished = nullptr; break;
    case 19: a.refused = nullptr; break;
    case 20: a.dtype = kind; break;
    case 21: (random() % 2 ? a.method : a.stream) = random() % 2 ? -1 : 4; break;
    default:
      if (random() % 2) a.ends_count = kind < 64 && kind > 0 ? 65 : kind;
      else a.ends = nullptr;
  }
}

int fuzz(int count) {
  std::mt19937 random(7);
  for (int i = 0; i < count; ++i) {
    const auto drafts = int64_t(1 + random() % 2);
    const auto batch = int64_t(1 + random() % 2), vocabulary = int64_t(1 + random() % 40);
    Call call({batch, drafts, vocabulary, int(random() % 3), int(1 + random() % 2), true, 0, 1}, unsigned(i));
    size_t wanted = 0;
    if (gemma4_verify_workspace(&call.arguments, &wanted) != GEMMA4_OK || wanted == 0) return 1;
    std::vector<int64_t> workspace(wanted / 8 + 1);
    // The vector's elements may begin at a multiple of 8 only.
    void* place = reinterpret_cast<uintptr_t>(workspace.data()) % 16 == 0 ? workspace.data() : workspace.data() + 1;
    gemma4_status status;
    if (random() % 8 == 0) {
      const bool null = random() % 2;
      status = gemma4_verify(&call.arguments, null ? nullptr : place, null ? wanted : random() % wanted, nullptr);
      if (status != GEMMA4_WORKSPACE_TOO_SMALL) return std::printf("a small workspace gave status %d\n", status), 1;
    } else if (random() % 64 == 0) {
      status = gemma4_verify(nullptr, nullptr, 0, nullptr);
    } else {
      const int faults = 1 + int(random() % 3);
      unsigned spoiled = 0;
      for (int fault = 0; fault < faults; ++fault) spoil(call.arguments, spoiled, random);
      status = gemma4_verify(&call.arguments, place, wanted, nullptr);
      if (status == GEMMA4_OK) return std::printf("call %d: spoiled arguments (%x) were taken\n", i, spoiled), 1;
    }
    if (std::string(gemma4_last_error()).rfind("gemma4_verify: ", 0) != 0) return 1;
    if (!call.is_untouched()) return std::printf("call %d: refused, but written\n", i), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  return count == 3 && std::string(arguments[1]) == "fuzz" ? fuzz(std::atoi(arguments[2])) : check_shapes();
}
