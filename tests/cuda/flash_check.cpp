// gemma4_flash_decode on the emulator, called through the C interface, for builds that no Python can load: the sanitizers'.
//
//   flash_check           calls of many shapes, each against attention in double
//   flash_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "blocks.h"

namespace {

using checks::Block, checks::get, checks::put;

// As bf16, fp16 and fp32 a NaN.
void poison(Block& block) { std::memset(block.data, 0xFF, block.size); }

bool is_untouched(const Block& block) {
  return std::all_of(block.data, block.data + block.size, [](unsigned char byte) { return byte == 0xFF; });
}

enum Cache { kContiguous, kEntries, kPadded, kPages, kPacked };

struct Shape {
  int64_t batch, rows, keys, heads, kv_heads, dim;
  int dtype;
  Cache cache;
  int64_t left = -1, right = 0;
  float softcap = 0;
  int64_t page = 16;
};

struct Call {
  Shape shape;
  std::mt19937 random;
  std::vector<int32_t> lengths, first, entry, table, cu_q, cu_k;
  int64_t entries, entry_rows, total_rows;
  Block q, k, v, out, lse;
  gemma4_flash_decode_arguments arguments{};

  Call(const Shape& s, unsigned seed)
      : shape(s),
        random(seed),
        lengths(numbers_for(s)),
        entries(entries_for(s)),
        entry_rows(s.cache == kPages ? s.page : s.cache == kPacked ? all_keys() : s.keys),
        total_rows(s.cache == kPacked ? packed_rows() : s.batch * s.rows),
        q(2 * total_rows * s.heads * s.dim),
        k(2 * entries * entry_rows * s.kv_heads * s.dim),
        v(k.size),
        out(q.size),
        lse(4 * total_rows * s.heads) {
    for (Block* block : {&k, &v, &out, &lse}) poison(*block);  // of the cache what is not in use
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < int64_t(q.size) / 2; ++i) put(q, i, normal(random), s.dtype);
    std::vector<int32_t> places(entries);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random);
    if (s.cache == kEntries) entry.assign(places.begin(), places.begin() + s.batch);
    if (s.cache == kPages) table.assign(places.begin(), places.begin() + s.batch * pages());
    if (s.cache == kPadded) {
      for (const int32_t length : lengths) first.push_back(int32_t(random() % (length + 1)));
    }
    if (s.cache == kPacked) {
      cu_k = {0};
      for (const int32_t length : lengths) cu_k.push_back(cu_k.back() + length);
    }
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t key = first_of(b); key < lengths[b]; ++key) {
        for (int64_t i = 0; i < s.kv_heads * s.dim; ++i) {
          put(k, place(b, key) * s.kv_heads * s.dim + i, 0.12f * normal(random), s.dtype);
          put(v, place(b, key) * s.kv_heads * s.dim + i, normal(random), s.dtype);
        }
      }
    }
    fill_arguments();
  }

  std::vector<int32_t> numbers_for(const Shape& s) {
    std::vector<int32_t> found;
    for (int64_t b = 0; b < s.batch; ++b) found.push_back(int32_t(b == 0 ? s.keys : random() % (s.keys + 1)));
    return found;
  }

  // Twice as many as there is use for, where requests find theirs.
  int64_t entries_for(const Shape& s) const {
    return s.cache == kPages ? 2 * s.batch * pages() : s.cache == kEntries ? 2 * s.batch : s.cache == kPacked ? 1 : s.batch;
  }

  int64_t all_keys() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t(0)); }

  int64_t packed_rows() {
    cu_q = {0};
    for (int64_t b = 0; b < shape.batch; ++b) {
      cu_q.push_back(int32_t(cu_q.back() + (b == 0 ? shape.rows : random() % (shape.rows + 1))));
    }
    return cu_q.back();
  }

  int64_t pages() const { return (shape.keys + shape.page - 1) / shape.page; }
  int64_t first_of(int64_t b) const { return first.empty() ? 0 : first[b]; }
  int64_t rows_of(int64_t b) const { return cu_q.empty() ? shape.rows : cu_q[b + 1] - cu_q[b]; }
  int64_t first_row_of(int64_t b) const { return cu_q.empty() ? b * shape.rows : cu_q[b]; }

  // The row of the cache that a key is.
  int64_t place(int64_t b, int64_t key) const {
    if (shape.cache == kPages) return table[b * pages() + key / shape.page] * shape.page + key % shape.page;
    if (shape.cache == kPacked) return cu_k[b] + key;
    return (shape.cache == kEntries ? entry[b] : b) * shape.keys + key;
  }

  void fill_arguments() {
    const Shape& s = shape;
    const auto data = [](const std::vector<int32_t>& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
    gemma4_attention& a = arguments.attention;
    gemma4_requests& r = a.requests;
    r.batch = s.batch;
    r.rows = s.rows;
    r.capacity = s.cache == kPages ? pages() * s.page : s.keys;
    r.total_rows = s.cache == kPacked ? total_rows : 0;
    r.total_keys = s.cache == kPacked ? entry_rows : 0;
    r.entries = s.cache == kPacked ? 0 : entries;
    r.page_size = s.cache == kPages ? s.page : 0;
    r.table_stride = s.cache == kPages ? pages() : 0;
    r.cu_q = data(cu_q);
    r.cu_k = data(cu_k);
    r.lengths = s.cache == kPacked ? nullptr : data(lengths);
    r.first = data(first);
    r.entry = data(entry);
    r.block_table = data(table);
    const bool packed = s.cache == kPacked;
    const int64_t row = s.heads * s.dim, key = s.kv_heads * s.dim;
    a.q = {q.data, packed ? 0 : s.rows * row, row, s.dim};
    arguments.k = {k.data, packed ? 0 : entry_rows * key, key, s.dim};
    a.v = {v.data, packed ? 0 : entry_rows * key, key, s.dim};
    a.out = out.data;
    a.out_batch_stride = a.q.batch_stride;
    a.out_row_stride = row;
    a.out_head_stride = s.dim;
    a.lse = reinterpret_cast<float*>(lse.data);
    a.lse_batch_stride = packed ? 0 : s.heads * s.rows;
    a.lse_head_stride = packed ? total_rows : s.rows;
    a.query_heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = s.dim;
    a.scale = 0.7f;
    a.dtype = s.dtype;
    arguments.left = s.left;
    arguments.right = s.right;
    arguments.softcap = s.softcap;
  }

  gemma4_status run() {
    size_t bytes = 0;
    if (auto status = gemma4_flash_decode_workspace(&arguments, &bytes)) return status;
    Block workspace(bytes);
    poison(workspace);
    return gemma4_flash_decode(&arguments, workspace.data, bytes, nullptr);
  }

  // Largest error over what is allowed: weights and result rounded once each, the rest in fp32.
  double worst() const {
    double worst = 0;
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t i = 0; i < rows_of(b); ++i) {
        for (int64_t head = 0; head < shape.heads; ++head) worst = std::max(worst, worst_of_row(b, i, head));
      }
    }
    return worst;
  }

  double worst_of_row(int64_t b, int64_t i, int64_t head) const {
    const Shape& s = shape;
    const int64_t token = lengths[b] - rows_of(b) + i, row = first_row_of(b) + i, kv_head = head / (s.heads / s.kv_heads);
    const int64_t low = std::max(first_of(b), s.left < 0 ? 0 : token - s.left);
    const int64_t high = std::min<int64_t>(lengths[b], s.right < 0 ? lengths[b] : token + s.right + 1);
    std::vector<double> scores;
    double highest = -INFINITY, total = 0;
    for (int64_t key = low; key < high; ++key) {
      double score = 0;
      for (int64_t c = 0; c < s.dim; ++c) {
        score += double(get(q, (row * s.heads + head) * s.dim + c, s.dtype)) *
                 get(k, (place(b, key) * s.kv_heads + kv_head) * s.dim + c, s.dtype);
      }
      score *= arguments.attention.scale;
      scores.push_back(s.softcap == 0 ? score : s.softcap * std::tanh(score / s.softcap));
      highest = std::max(highest, scores.back());
    }
    for (const double score : scores) total += std::exp(score - highest);
    const double want_lse = scores.empty() ? -INFINITY : highest + std::log(total);
    const int64_t lse_place = cu_q.empty() ? (b * s.heads + head) * s.rows + i : head * total_rows + row;
    const double got_lse = get(lse, lse_place, GEMMA4_FP32);
    double worst = got_lse == want_lse ? 0 : std::fabs(got_lse - want_lse) / (1e-5 * (1 + std::fabs(want_lse)));
    const double roundings = 2 * (s.dtype == GEMMA4_BF16 ? 1.0 / 256 : 1.0 / 2048);
    for (int64_t c = 0; c < s.dim; ++c) {
      double want = 0, size = 0;
      for (size_t n = 0; n < scores.size(); ++n) {
        const double part = std::exp(scores[n] - highest) / total *
                            get(v, (place(b, low + int64_t(n)) * s.kv_heads + kv_head) * s.dim + c, s.dtype);
        want += part;
        size += std::fabs(part);
      }
      const double error = std::fabs(get(out, (row * s.heads + head) * s.dim + c, s.dtype) - want) / (roundings * size + 1e-6);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    return std::isnan(worst) ? INFINITY : worst;
  }
};

int check_shapes() {
  const Shape shapes[] = {
      {2, 1, 70, 4, 2, 256, GEMMA4_BF16, kContiguous},
      {1, 5, 150, 4, 2, 256, GEMMA4_BF16, kContiguous, 40},
      {2, 16, 90, 2, 1, 128, GEMMA4_FP16, kContiguous, 31, 0, 5.0f},
      {3, 3, 130, 4, 2, 64, GEMMA4_BF16, kEntries, 63},
      {3, 4, 100, 4, 4, 128, GEMMA4_BF16, kPadded, 20, 2},
      {2, 9, 140, 8, 2, 64, GEMMA4_FP16, kPages, 50},
      {2, 2, 80, 2, 1, 256, GEMMA4_BF16, kPages, -1, 0, 0, 7},
      {4, 6, 60, 4, 2, 64, GEMMA4_BF16, kPacked, -1, -1},
      {1, 5, 70, 16, 1, 64, GEMMA4_BF16, kContiguous, 33},  // 80 packed rows: two blocks of them
      {1, 16, 500, 8, 8, 64, GEMMA4_BF16, kContiguous},     // chunks of two sizes among 16 rows would begin at 448
      {1, 16, 456, 8, 8, 64, GEMMA4_BF16, kContiguous},
      {2, 9, 4, 2, 1, 64, GEMMA4_BF16, kContiguous},        // rows before the first key
  };
  unsigned seed = 0;
  for (const Shape& s : shapes) {
    Call call(s, ++seed);
    const auto status = call.run();
    const double worst = status == GEMMA4_OK ? call.worst() : INFINITY;
    const char* said = status == GEMMA4_OK ? "ran" : gemma4_last_error();
    std::printf("rows %ld keys %ld heads %ld/%ld dim %ld cache %d: %s, %.3f of what is allowed\n", long(s.rows), long(s.keys),
                long(s.heads), long(s.kv_heads), long(s.dim), int(s.cache), said, worst);
    if (worst > 1) return 1;
  }
  return 0;
}

// One field of a good call made wrong; each only once, because what is moved twice may be right again.
void spoil(gemma4_flash_decode_arguments& arguments, unsigned& spoiled, std::mt19937& random) {
  gemma4_attention& a = arguments.attention;
  gemma4_requests& r = a.requests;
  const int64_t huge[] = {INT64_MIN, -1, int64_t(1) << 31, int64_t(1) << 40, INT64_MAX};
  const int64_t size = huge[random() % std::size(huge)];
  const auto stride = [&](int64_t old) { return random() % 3 == 0 ? old + 1 : random() % 2 ? -8 : INT64_MAX / 8 * 8; };
  const auto moved = [&](const void* pointer, int by) -> unsigned char* {
    return random() % 2 ? nullptr : static_cast<unsigned char*>(const_cast<void*>(pointer)) + by;
  };
  const unsigned field = random() % 21;
  if (spoiled >> field & 1) return;
  spoiled |= 1u << field;
  switch (field) {
    case 0: r.batch = size; break;
    case 1: r.rows = random() % 2 ? 17 : size; break;
    case 2: r.capacity = size; break;
    case 3: r.entries = r.cu_k != nullptr || random() % 2 ? size : 0; break;
    case 4: r.page_size = r.block_table != nullptr ? (random() % 2 ? 0 : size) : 16; break;
    case 5: r.total_keys = size; break;
    case 6: a.q.data = moved(a.q.data, 2 << random() % 3); break;
    case 7: arguments.k.data = moved(arguments.k.data, 2 << random() % 3); break;
    case 8: a.v.data = moved(a.v.data, 2 << random() % 3); break;
    case 9: a.out = moved(a.out, 1); break;
    case 10: a.lse = reinterpret_cast<float*>(moved(a.lse, 2)); break;
    case 11: a.q.row_stride = stride(a.q.row_stride); break;
    case 12: arguments.k.batch_stride = stride(arguments.k.batch_stride); break;
    case 13: a.v.head_stride = stride(a.v.head_stride); break;
    case 14: a.out_row_stride = random() % 2 ? -1 : INT64_MAX; break;
    case 15: a.kv_heads = random() % 2 ? size : 3; break;
    case 16: a.head_dim = random() % 2 ? size : 96; break;
    case 17: a.dtype = random() % 2 ? GEMMA4_FP32 : -1; break;
    case 18: arguments.left = arguments.right = INT64_MIN; break;
    case 19: arguments.softcap = random() % 2 ? -1.0f : NAN; break;
    default: r.lengths = reinterpret_cast<const int32_t*>(reinterpret_cast<const unsigned char*>(a.q.data) + 1); break;
  }
}

int fuzz(int count) {
  std::mt19937 random(7);
  for (int i = 0; i < count; ++i) {
    const int64_t group = 1 + random() % 2;
    const int64_t batch = 1 + random() % 2, rows = 1 + random() % 4, keys = 1 + random() % 40;
    Call call({batch, rows, keys, 2 * group, 2, 64, int(random() % 2), Cache(random() % 5)}, unsigned(i));
    size_t wanted = 0;
    gemma4_status status = gemma4_flash_decode_workspace(&call.arguments, &wanted);
    if (status != GEMMA4_OK) return std::printf("%s\n", gemma4_last_error()), 1;
    if (random() % 8 == 0) {
      Block workspace(wanted);
      const bool null = random() % 2;
      const size_t bytes = null ? wanted : random() % wanted;
      status = gemma4_flash_decode(&call.arguments, null ? nullptr : workspace.data, bytes, nullptr);
      if (status != GEMMA4_WORKSPACE_TOO_SMALL) return std::printf("a small workspace gave status %d\n", status), 1;
    } else if (random() % 64 == 0) {
      status = gemma4_flash_decode(nullptr, nullptr, 0, nullptr);
    } else {
      const int faults = 1 + int(random() % 3);
      unsigned spoiled = 0;
      for (int fault = 0; fault < faults; ++fault) spoil(call.arguments, spoiled, random);
      Block workspace(wanted);
      status = gemma4_flash_decode(&call.arguments, workspace.data, wanted, nullptr);
      if (status == GEMMA4_OK) return std::printf("call %d: spoiled arguments (%x) were taken\n", i, spoiled), 1;
    }
    if (std::string(gemma4_last_error()).rfind("gemma4_flash_decode: ", 0) != 0) return 1;
    if (!is_untouched(call.out) || !is_untouched(call.lse)) return std::printf("call %d: refused, but written\n", i), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  return count == 3 && std::string(arguments[1]) == "fuzz" ? fuzz(std::atoi(arguments[2])) : check_shapes();
}
