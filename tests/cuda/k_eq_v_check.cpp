// gemma4_k_eq_v_decode on the emulator, called through the C interface, for builds that no Python can load: the sanitizers'.
//
//   k_eq_v_check           calls of many shapes, each against the same in double; and angles at positions near and far
//   k_eq_v_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
//
// Every buffer is a heap block of exactly its size, so AddressSanitizer sees the first byte beyond. Lengths and page numbers
// may be anything: what they name beyond what exists must not be read.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/attention/rotation.cuh"
#include "../../csrc/include/gemma4_kernels.h"
#include "blocks.h"

namespace {

using namespace checks;

struct Shape {
  int64_t dim, kv_heads, group, rows, capacity;
  std::vector<int32_t> lengths;  // one a request; may be out of range
  int64_t page_size;             // 0: contiguous
  int dtype;
  int64_t rotating;              // pairs, from pair 0 on
  int64_t first_pair = 0;
  int codes = GEMMA4_CODES_NONE;
};

struct Call {
  Shape s;
  int64_t batch, heads, pages;  // pages of a request
  Block q, values, scales, table, lengths, weight, inv_freq, out, lse;
  gemma4_k_eq_v_decode_arguments arguments{};

  Call(const Shape& shape, unsigned seed)
      : s(shape),
        batch(int64_t(s.lengths.size())),
        heads(s.kv_heads * s.group),
        pages(s.page_size == 0 ? 0 : (s.capacity + s.page_size - 1) / s.page_size),
        q(2 * batch * s.rows * heads * s.dim),
        values((s.codes == GEMMA4_CODES_NONE ? 2 : 1) * cache_rows() * s.kv_heads * s.dim),
        scales(s.codes == GEMMA4_CODES_NONE ? 0 : 4 * cache_rows() * s.kv_heads),
        table(4 * batch * pages),
        lengths(4 * batch),
        weight(4 * s.dim),
        inv_freq(4 * s.dim / 2),
        out(2 * batch * s.rows * heads * s.dim),
        lse(4 * batch * s.rows * heads) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < q.size / 2; ++i) q.as<uint16_t>()[i] = to_half(normal(random), s.dtype);
    std::vector<int32_t> order(size_t(batch * pages));
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t b = 0; b < batch; ++b) {
      lengths.as<int32_t>()[b] = s.lengths[size_t(b)];
      for (int64_t page = 0; page < pages; ++page) {
        // Entries that no length reaches may hold anything.
        const bool is_used = page * s.page_size < length(b);
        table.as<int32_t>()[b * pages + page] = is_used ? order[size_t(b * pages + page)] : int32_t(random());
      }
      for (int64_t key = 0; key < length(b); ++key) {
        for (int64_t i = 0; i < s.kv_heads * s.dim; ++i) {
          const int64_t at = place(b, key) * s.kv_heads * s.dim + i;
          if (s.codes == GEMMA4_CODES_NONE) {
            values.as<uint16_t>()[at] = to_half(normal(random), s.dtype);
          } else {
            values.data[at] = uint8_t(random() % 255 % 127 + 128 * (random() % 2));  // no NaN
          }
        }
        if (s.codes != GEMMA4_CODES_NONE) {
          for (int64_t head = 0; head < s.kv_heads; ++head) {
            const float largest = s.codes == GEMMA4_CODES_INT8 ? 128 : 448;
            scales.as<float>()[place(b, key) * s.kv_heads + head] = 2 / largest * (1 + float(random() % 100) / 100);
          }
        }
      }
    }
    for (int64_t i = 0; i < s.dim; ++i) weight.as<float>()[i] = 0.12f * (1 + 0.2f * normal(random));
    for (int64_t i = 0; i < s.dim / 2; ++i) {
      const int64_t turn = i - s.first_pair;
      inv_freq.as<float>()[i] = turn >= 0 && turn < s.rotating ? std::pow(1e6f, -2.0f * float(i) / float(s.dim)) : 0;
    }
    gemma4_attention& a = arguments.attention;
    gemma4_requests& r = a.requests;
    r.batch = batch;
    r.rows = s.rows;
    r.capacity = s.page_size == 0 ? s.capacity : pages * s.page_size;
    r.entries = s.page_size == 0 ? batch : batch * pages;
    r.page_size = s.page_size;
    r.table_stride = pages;
    r.lengths = lengths.as<int32_t>();
    r.block_table = s.page_size == 0 ? nullptr : table.as<int32_t>();
    const int64_t wide = heads * s.dim, narrow = s.kv_heads * s.dim;
    a.q = {q.data, s.rows * wide, wide, s.dim};
    a.v = {values.data, (s.page_size == 0 ? s.capacity : s.page_size) * narrow, narrow, s.dim};
    a.out = out.data;
    a.out_batch_stride = s.rows * wide;
    a.out_row_stride = wide;
    a.out_head_stride = s.dim;
    a.lse = lse.as<float>();
    a.lse_batch_stride = s.rows * heads;
    a.lse_head_stride = s.rows;
    a.query_heads = heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = s.dim;
    a.scale = 1.25f;
    a.dtype = s.dtype;
    arguments.k_norm_weight = weight.data;
    arguments.weight_dtype = GEMMA4_FP32;
    arguments.inv_freq = inv_freq.data;
    arguments.codes = s.codes;
    if (s.codes != GEMMA4_CODES_NONE) {
      arguments.values_scale = {scales.data, a.v.batch_stride / s.dim, s.kv_heads, 1};
    }
  }

  int64_t length(int64_t b) const {
    return std::clamp<int64_t>(s.lengths[size_t(b)], 0, s.page_size == 0 ? s.capacity : pages * s.page_size);
  }

  int64_t cache_rows() const { return batch * (s.page_size == 0 ? s.capacity : pages * s.page_size); }

  // The row of the cache that a key has.
  int64_t place(int64_t b, int64_t key) const {
    if (s.page_size == 0) return b * s.capacity + key;
    return table.as<int32_t>()[b * pages + key / s.page_size] * s.page_size + key % s.page_size;
  }

  double value(int64_t b, int64_t key, int64_t kv_head, int64_t d) const {
    const int64_t at = (place(b, key) * s.kv_heads + kv_head) * s.dim + d;
    if (s.codes == GEMMA4_CODES_NONE) return from_half(values.as<uint16_t>()[at], s.dtype);
    const uint8_t code = values.data[at];
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    const double number = s.codes == GEMMA4_CODES_INT8 ? double(int8_t(code)) : code & 0x80 ? -magnitude : magnitude;
    const float scale = scales.as<float>()[place(b, key) * s.kv_heads + kv_head];
    return from_half(to_half(float(number) * scale, s.dtype), s.dtype);
  }

  gemma4_status run() {
    size_t bytes = 0;
    if (auto status = gemma4_k_eq_v_decode_workspace(&arguments, &bytes)) return status;
    Block workspace(bytes);
    return gemma4_k_eq_v_decode(&arguments, workspace.data, bytes, nullptr);
  }

  // Whether the kernel rounds the keys of a pair, as those of the steps of 8 pairs that come first, or else the queries.
  std::vector<bool> rebuilt_pairs() const {
    const int64_t steps = s.dim / 16;
    std::vector<int64_t> order;
    int64_t rotating = 0;
    for (const bool wanted : {true, false}) {
      for (int64_t step = 0; step < steps; ++step) {
        bool rotates = false;
        for (int64_t i = 0; i < 8; ++i) rotates |= inv_freq.as<float>()[8 * step + i] != 0;
        rotating += rotates && wanted;
        if (rotates == wanted) order.push_back(step);
      }
    }
    std::vector<bool> rebuilt(size_t(s.dim / 2));
    for (int64_t i = 0; i < std::max<int64_t>(8, rotating); ++i) {
      for (int64_t pair = 0; pair < 8; ++pair) rebuilt[size_t(8 * order[size_t(i)] + pair)] = true;
    }
    return rebuilt;
  }

  // Largest error over what is allowed: operands of the first product are rounded as the kernel rounds them, weights of the
  // second and the result by at most one last place, and a few keys may round the other way.
  double worst() const {
    const double last_place = s.dtype == GEMMA4_BF16 ? 1.0 / 256 : 1.0 / 2048;
    const auto rebuilt = rebuilt_pairs();
    const auto rounded = [&](double value) { return double(from_half(to_half(float(value), s.dtype), s.dtype)); };
    const int64_t half = s.dim / 2;
    double worst = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < s.rows; ++i) {
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t place = (b * s.rows + i) * heads + head, seen = std::max<int64_t>(0, length(b) - s.rows + i + 1);
          std::vector<double> scores, sums(size_t(s.dim)), sizes(size_t(s.dim));
          for (int64_t key = 0; key < seen; ++key) {
            double score = 0;
            for (int64_t pair = 0; pair < half; ++pair) {
              const double low = value(b, key, head / s.group, pair), high = value(b, key, head / s.group, pair + half);
              const double q_low = from_half(q.as<uint16_t>()[place * s.dim + pair], s.dtype);
              const double q_high = from_half(q.as<uint16_t>()[place * s.dim + pair + half], s.dtype);
              const double w_low = weight.as<float>()[pair], w_high = weight.as<float>()[pair + half];
              if (rebuilt[size_t(pair)]) {
                const double angle = double(key) * double(inv_freq.as<float>()[pair]);
                const double x = low * w_low, y = high * w_high;
                score += q_low * rounded(x * std::cos(angle) - y * std::sin(angle)) +
                         q_high * rounded(y * std::cos(angle) + x * std::sin(angle));
              } else {
                score += rounded(q_low * w_low) * low + rounded(q_high * w_high) * high;
              }
            }
            scores.push_back(score * 1.25);
          }
          const double highest = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
          double total = 0;
          for (int64_t key = 0; key < seen; ++key) {
            const double p = std::exp(scores[size_t(key)] - highest);
            total += p;
            for (int64_t d = 0; d < s.dim; ++d) {
              const double v = value(b, key, head / s.group, d);
              sums[size_t(d)] += p * v;
              sizes[size_t(d)] += p * std::fabs(v);
            }
          }
          const float got_lse = lse.as<float>()[(b * heads + head) * s.rows + i];
          if (seen == 0 && got_lse != -INFINITY) return INFINITY;
          if (seen != 0 && !(std::fabs(got_lse - (highest + std::log(total))) < 2e-3)) return INFINITY;
          for (int64_t d = 0; d < s.dim; ++d) {
            const double got = from_half(out.as<uint16_t>()[place * s.dim + d], s.dtype);
            const double expected = seen == 0 ? 0 : sums[size_t(d)] / total, size = seen == 0 ? 0 : sizes[size_t(d)] / total;
            const double allowed = (last_place + 2e-3) * size + last_place * std::fabs(expected) + 1e-7;
            const double error = std::fabs(got - expected) / allowed;
            worst = std::isnan(got) ? INFINITY : std::max(worst, error);
          }
        }
      }
    }
    return worst;
  }
};

int check_shapes() {
  const Shape shapes[] = {
      {128, 1, 16, 1, 70, {70, 1, 64}, 0, GEMMA4_BF16, 16},
      {128, 2, 3, 5, 130, {129, 4}, 16, GEMMA4_FP16, 16},
      {128, 1, 1, 16, 40, {40, 900, -3}, 0, GEMMA4_FP16, 64},
      {256, 1, 8, 3, 66, {66}, 7, GEMMA4_BF16, 128},
      {256, 3, 2, 2, 35, {35, 0}, 48, GEMMA4_BF16, 9, 60},
      {512, 1, 16, 3, 97, {97}, 32, GEMMA4_BF16, 64},
      {512, 1, 4, 1, 65, {65}, 0, GEMMA4_FP16, 0},
      {128, 2, 4, 3, 70, {70, 33}, 16, GEMMA4_BF16, 16, 0, GEMMA4_CODES_FLOAT8},
      {128, 1, 8, 2, 45, {45, 7}, 0, GEMMA4_FP16, 16, 0, GEMMA4_CODES_INT8},
      {512, 1, 16, 2, 40, {40}, 0, GEMMA4_BF16, 64, 0, GEMMA4_CODES_INT8},
  };
  unsigned seed = 0;
  for (const Shape& shape : shapes) {
    Call call(shape, ++seed);
    const auto status = call.run();
    const double worst = status == GEMMA4_OK ? call.worst() : INFINITY;
    std::printf("head_dim %ld kv_heads %ld group %ld rows %ld page_size %ld: %s, %.3f of what is allowed\n", long(shape.dim),
                long(shape.kv_heads), long(shape.group), long(shape.rows), long(shape.page_size),
                status == GEMMA4_OK ? "ran" : gemma4_last_error(), worst);
    if (worst > 1) return 1;
  }
  return 0;
}

// At every quarter of a turn and between, at positions that fp32 could not multiply.
int check_angles() {
  std::mt19937_64 random(3);
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const auto position = uint32_t(random() % (i % 2 ? 1 << 18 : 1 << 29));
    double frequency = std::pow(1e6, -double(random() % 256) / 256);
    if (i % 5 == 0) frequency = double(random() % 16) * 0.78539816339744830962 / std::max<uint32_t>(position, 1);
    const auto angle = gemma4::attention::angle_at(position, gemma4::attention::turns_of(frequency));
    const long double exact = (long double)(position) * frequency;
    worst = std::max(worst, double(std::fabs(angle.cos - std::cos(exact))));
    worst = std::max(worst, double(std::fabs(angle.sin - std::sin(exact))));
  }
  std::printf("cosines and sines are off by %.3g at most\n", worst);
  return worst < 2e-7 ? 0 : 1;
}

// One field of a good call made wrong.
void spoil(gemma4_k_eq_v_decode_arguments& arguments, std::mt19937& random) {
  gemma4_attention& a = arguments.attention;
  gemma4_requests& r = a.requests;
  const int64_t one = 1, sizes[] = {INT64_MIN, -1, -7, one << 41, INT64_MAX};
  const int64_t size = sizes[random() % std::size(sizes)];
  const auto moved = [&](const void* pointer) -> const void* {
    return random() % 2 ? nullptr : static_cast<const unsigned char*>(pointer) + 1;
  };
  const int kinds[] = {-1, 3, 7, INT32_MAX, INT32_MIN};
  const int kind = kinds[random() % std::size(kinds)];
  const int32_t* odd = reinterpret_cast<const int32_t*>(reinterpret_cast<const unsigned char*>(r.lengths) + 2);
  switch (random() % 26) {
    case 0: r.batch = size; break;
    case 1: r.rows = random() % 2 ? 17 : size; break;
    case 2: r.capacity = size; break;
    case 3: r.entries = random() % 2 ? 0 : size; break;
    case 4: r.page_size = r.block_table != nullptr ? 0 : 16; break;
    case 5: r.table_stride = size; r.block_table = r.lengths; r.page_size = 16; break;
    case 6: r.lengths = odd; break;
    case 7: (random() % 2 ? r.cu_q : r.cu_k) = r.lengths; break;
    case 8: (random() % 2 ? r.first : r.entry) = r.lengths; break;
    case 9: a.q.data = moved(a.q.data); break;
    case 10: a.v.data = moved(a.v.data); break;
    case 11: a.q.row_stride = random() % 2 ? size : 513; break;
    case 12: a.v.head_stride = random() % 2 ? size : 515; break;
    case 13: a.v.batch_stride = random() % 2 ? size : 1001; break;
    case 14: a.out = const_cast<void*>(moved(a.out)); break;
    case 15: a.lse = static_cast<float*>(const_cast<void*>(moved(a.lse))); break;
    case 16: a.out_row_stride = size; break;
    case 17: a.kv_heads = 2; a.query_heads = random() % 2 ? 3 : size; break;
    case 18: a.kv_heads = random() % 2 ? 0 : size; break;
    case 19: a.head_dim = random() % 2 ? 64 : size; break;
    case 20: a.scale = random() % 2 ? NAN : INFINITY; break;
    case 21: (random() % 2 ? a.dtype : arguments.weight_dtype) = kind; break;
    case 22: arguments.k_norm_weight = moved(arguments.k_norm_weight); break;
    case 23: arguments.codes = random() % 2 ? kind : GEMMA4_CODES_INT8; break;  // of a cache that has no scales
    case 24: arguments.values_scale.data = r.lengths; break;
    default:
      arguments.inv_freq_is_double = random() % 2 ? kind : 0;
      if (arguments.inv_freq_is_double == 0) arguments.inv_freq = moved(arguments.inv_freq);
      if (arguments.inv_freq_is_double == 1) arguments.inv_freq_is_double = -1;
      break;
  }
}

int fuzz(int count) {
  std::mt19937 random(7);
  for (int i = 0; i < count; ++i) {
    Call call({128, 1, 2, int64_t(1 + random() % 3), 20, {int32_t(random() % 21)}, random() % 2 ? 8 : 0, int(random() % 2), 16},
              unsigned(i));
    size_t wanted = 0;
    if (gemma4_k_eq_v_decode_workspace(&call.arguments, &wanted) != GEMMA4_OK) return 1;
    gemma4_status status;
    if (random() % 8 == 0) {
      Block workspace(wanted);
      const bool null = random() % 2;
      const size_t bytes = null ? wanted : random() % wanted;
      status = gemma4_k_eq_v_decode(&call.arguments, null ? nullptr : workspace.data, bytes, nullptr);
      if (status != GEMMA4_WORKSPACE_TOO_SMALL) return std::printf("a small workspace gave status %d\n", status), 1;
    } else if (random() % 64 == 0) {
      status = gemma4_k_eq_v_decode(nullptr, nullptr, 0, nullptr);
    } else {
      spoil(call.arguments, random);
      Block workspace(wanted);
      status = gemma4_k_eq_v_decode(&call.arguments, workspace.data, wanted, nullptr);
    }
    if (status == GEMMA4_OK) return std::printf("call %d: spoiled arguments were taken\n", i), 1;
    if (std::string(gemma4_last_error()).rfind("gemma4_k_eq_v_decode: ", 0) != 0) return 1;
    if (!call.out.is_untouched() || !call.lse.is_untouched()) return std::printf("call %d: refused, but written\n", i), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "fuzz") return fuzz(std::atoi(arguments[2]));
  return check_angles() != 0 ? 1 : check_shapes();
}
