// gemma4_sandwich_norm, gemma4_qkv_prologue and gemma4_k_eq_v_prologue on the emulator, called through the C interface, for
// builds that no Python can load: the sanitizers'.
//
//   norms_check           calls of many shapes, each against the same operations one by one
//   norms_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
//
// Every buffer is a heap block of exactly its size, so AddressSanitizer sees the first byte beyond. Inputs are small whole
// numbers, whose squares sum exactly, so results must be equal to the bit.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/emulator/collectives.h"
#include "../../csrc/include/gemma4_kernels.h"

namespace {

int64_t bytes_of(int dtype) { return dtype == GEMMA4_FP32 ? 4 : 2; }

float rounded(float value, int dtype) {
  if (dtype == GEMMA4_BF16) return emulator::bf16_to_float(emulator::float_to_bf16(value));
  return dtype == GEMMA4_FP16 ? emulator::fp16_to_float(emulator::float_to_fp16(value)) : value;
}

// A heap block of numbers of one type, each byte 0xFF (NaN) at first, its first number at a multiple of 16 bytes or `shift`
// behind.
struct Numbers {
  Numbers(int64_t count, int dtype, int64_t shift = 0) : dtype(dtype), shift(shift), bytes(size_t((count + shift) * bytes_of(dtype))) {
    void* aligned = std::aligned_alloc(16, std::max<size_t>(16, (bytes + 15) / 16 * 16));
    if (void* exact = bytes != 0 ? std::realloc(aligned, bytes) : nullptr) aligned = exact;
    block.reset(static_cast<unsigned char*>(aligned));
    std::memset(block.get(), 0xFF, bytes);
  }
  void* data() { return block.get() + shift * bytes_of(dtype); }
  unsigned char* at(int64_t i) { return static_cast<unsigned char*>(data()) + i * bytes_of(dtype); }
  float get(int64_t i) {
    if (dtype == GEMMA4_FP32) {
      float value;
      std::memcpy(&value, at(i), 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, at(i), 2);
    return dtype == GEMMA4_BF16 ? emulator::bf16_to_float(bits) : emulator::fp16_to_float(bits);
  }
  void put(int64_t i, float value) {
    const uint16_t bits = dtype == GEMMA4_BF16 ? emulator::float_to_bf16(value) : emulator::float_to_fp16(value);
    std::memcpy(at(i), dtype == GEMMA4_FP32 ? static_cast<const void*>(&value) : &bits, size_t(bytes_of(dtype)));
  }
  bool untouched(int64_t i) {
    for (int64_t byte = 0; byte < bytes_of(dtype); ++byte) {
      if (at(i)[byte] != 0xFF) return false;
    }
    return true;
  }
  bool untouched() const {
    for (size_t byte = 0; byte < bytes; ++byte) {
      if (block[byte] != 0xFF) return false;
    }
    return true;
  }
  int dtype;
  int64_t shift;
  size_t bytes;
  struct Free {
    void operator()(unsigned char* data) const { std::free(data); }
  };
  std::unique_ptr<unsigned char[], Free> block;
};

float whole(std::mt19937& random, int most = 8) { return float(int(random() % (2 * most + 1)) - most); }
float near_one(std::mt19937& random) { return 1 + 0.2f * std::normal_distribution<float>()(random); }

// What a norm multiplies x with, its sum in double: exact here.
float inverse_rms(const std::vector<float>& x, float eps) {
  double sum = 0;
  for (const float number : x) sum += double(number) * number;
  return 1 / std::sqrt(float(sum) / float(x.size()) + eps);
}

std::vector<float> normed(const std::vector<float>& x, Numbers* weight, float eps, int dtype) {
  const float inverse = inverse_rms(x, eps);
  std::vector<float> out;
  for (size_t i = 0; i < x.size(); ++i) {
    const float scaled = x[i] * inverse;
    out.push_back(rounded(weight == nullptr ? scaled : scaled * weight->get(int64_t(i)), dtype));
  }
  return out;
}

// The norms between sublayers -------------------------------------------------------------------------------------------------

struct NormShape {
  int64_t m, n;
  int dtype, post_dtype, pre_dtype;
  bool has_pre, has_scalar;
  int64_t padding, shift;  // elements between rows, and before the first
  bool in_place = false;   // hidden is residual, normed is x
};

struct NormCall {
  NormShape shape;
  int64_t stride;
  Numbers x, residual, post, pre, scalar, hidden, normed_rows;
  std::vector<std::vector<float>> want_hidden;
  gemma4_sandwich_norm_arguments arguments{};

  NormCall(const NormShape& s, unsigned seed)
      : shape(s),
        stride(s.n + s.padding),
        x((s.m - 1) * stride + s.n, s.dtype, s.shift),
        residual((s.m - 1) * stride + s.n, s.dtype, s.shift),
        post(s.n, s.post_dtype, s.shift),
        pre(s.n, s.pre_dtype),
        scalar(1, GEMMA4_FP32),
        hidden((s.m - 1) * stride + s.n, s.dtype, s.shift),
        normed_rows((s.m - 1) * stride + s.n, s.dtype) {
    std::mt19937 random(seed);
    for (int64_t row = 0; row < s.m; ++row) {
      for (int64_t i = 0; i < s.n; ++i) {
        // Mean 5 with half of them 1 and half 3, eps 11: the first factor is 1/4, and what follows small multiples of 1/16.
        x.put(row * stride + i, (i % 2 ? 3.0f : 1.0f) * (random() % 2 ? 1 : -1));
        residual.put(row * stride + i, whole(random, 2));
      }
    }
    for (int64_t i = 0; i < s.n; ++i) {
      post.put(i, 0.5f * float(1 + random() % 4));
      pre.put(i, near_one(random));
    }
    scalar.put(0, 0.5f);
    arguments = {s.m,    s.n,    stride, stride, stride, stride, x.data(), residual.data(), hidden.data(),
                 s.has_pre ? normed_rows.data() : nullptr, post.data(), s.has_pre ? pre.data() : nullptr,
                 s.has_scalar ? scalar.data() : nullptr, 11, s.dtype, s.post_dtype, s.pre_dtype, GEMMA4_FP32};
    for (int64_t row = 0; row < s.m; ++row) {
      std::vector<float> numbers, sum;
      for (int64_t i = 0; i < s.n; ++i) numbers.push_back(x.get(row * stride + i));
      numbers = normed(numbers, &post, arguments.eps, s.dtype);
      for (int64_t i = 0; i < s.n; ++i) {
        const float added = rounded(residual.get(row * stride + i) + numbers[size_t(i)], s.dtype);
        sum.push_back(s.has_scalar ? rounded(added * 0.5f, s.dtype) : added);
      }
      want_hidden.push_back(sum);
    }
    if (s.in_place) {
      arguments.hidden = residual.data();
      if (s.has_pre) arguments.normed = x.data();
    }
  }

  bool is_right() {
    Numbers& got_hidden = shape.in_place ? residual : hidden;
    Numbers& got_normed = shape.in_place ? x : normed_rows;
    for (int64_t row = 0; row < shape.m; ++row) {
      const auto& want = want_hidden[size_t(row)];
      const auto want_normed = normed(want, &pre, arguments.eps, shape.dtype);
      for (int64_t i = 0; i < stride; ++i) {
        if (row + 1 == shape.m && i >= shape.n) break;
        const int64_t place = row * stride + i;
        const bool inside = i < shape.n;
        if (inside ? got_hidden.get(place) != want[size_t(i)] : !got_hidden.untouched(place)) return false;
        if (!shape.has_pre) continue;
        if (inside ? got_normed.get(place) != want_normed[size_t(i)] : !got_normed.untouched(place)) return false;
      }
    }
    return shape.has_pre || normed_rows.untouched();
  }
  bool is_untouched() const { return hidden.untouched() && normed_rows.untouched(); }
};

int check_norms() {
  const NormShape shapes[] = {
      {1, 256, GEMMA4_BF16, GEMMA4_FP32, GEMMA4_BF16, true, true, 0, 0},
      {5, 3840, GEMMA4_BF16, GEMMA4_BF16, GEMMA4_BF16, true, false, 0, 0},
      {3, 250, GEMMA4_FP16, GEMMA4_FP16, GEMMA4_FP32, true, true, 0, 0},
      {2, 264, GEMMA4_FP16, GEMMA4_FP32, GEMMA4_FP16, true, true, 3, 1},
      {2, 264, GEMMA4_FP32, GEMMA4_BF16, GEMMA4_FP32, true, true, 8, 0},
      {3, 2, GEMMA4_FP32, GEMMA4_FP32, GEMMA4_FP16, false, true, 1, 1},
      {2, 8192, GEMMA4_BF16, GEMMA4_BF16, GEMMA4_FP32, true, false, 0, 0},
      {2, 8200, GEMMA4_FP16, GEMMA4_BF16, GEMMA4_BF16, true, true, 0, 0},
      {1, 16384, GEMMA4_FP32, GEMMA4_BF16, GEMMA4_FP16, true, true, 0, 0},
      {4, 640, GEMMA4_BF16, GEMMA4_BF16, GEMMA4_BF16, true, true, 16, 0, true},
      {3, 100, GEMMA4_FP32, GEMMA4_FP32, GEMMA4_FP32, true, false, 0, 0, true},
  };
  unsigned seed = 0;
  for (const NormShape& shape : shapes) {
    NormCall call(shape, ++seed);
    const auto status = gemma4_sandwich_norm(&call.arguments, nullptr);
    const bool right = status == GEMMA4_OK && call.is_right();
    std::printf("sandwich_norm m %ld n %ld dtype %d: %s\n", long(shape.m), long(shape.n), shape.dtype,
                status != GEMMA4_OK ? gemma4_last_error() : right ? "right" : "wrong");
    if (!right) return 1;
  }
  return 0;
}

// The prologue ----------------------------------------------------------------------------------------------------------------

struct PrologueShape {
  int64_t batch, rows, q_heads, kv_heads, head_dim;
  int dtype;
  bool has_keys;
  int64_t page;     // rows of a page; 0: contiguous
  int64_t padding;  // elements between heads
  bool wide;        // lengths and pages in 64 bits
  int codes = GEMMA4_CODES_NONE;
};

constexpr int64_t kCapacity = 24, kPages = 9;

struct PrologueCall {
  PrologueShape shape;
  int64_t head, q_row, kv_row, cache_row, entries, entry_rows, columns;
  Numbers q, k, v, q_weight, k_weight, cos, sin, out, k_cache, v_cache, v_scale;
  std::vector<int64_t> lengths, pages;
  std::vector<int32_t> short_lengths, short_pages;
  gemma4_prologue_arguments arguments{};

  PrologueCall(const PrologueShape& s, unsigned seed)
      : shape(s),
        head(s.head_dim + s.padding),
        q_row(s.q_heads * head),
        kv_row(s.kv_heads * head),
        cache_row(s.kv_heads * head),
        entries(s.page == 0 ? s.batch : kPages),
        entry_rows(s.page == 0 ? kCapacity : s.page),
        columns(s.page == 0 ? 0 : 4),
        q(s.batch * s.rows * q_row - s.padding, s.dtype),
        k(s.batch * s.rows * kv_row - s.padding, s.dtype),
        v(s.batch * s.rows * kv_row - s.padding, s.dtype),
        q_weight(s.head_dim, GEMMA4_FP32),
        k_weight(s.head_dim, GEMMA4_BF16),
        cos(s.rows * s.head_dim, s.dtype),
        sin(s.rows * s.head_dim, s.dtype),
        out(s.batch * s.rows * s.q_heads * s.head_dim, s.dtype),
        k_cache(entries * entry_rows * cache_row - s.padding, s.dtype),
        v_cache(cache_size() / (s.codes == GEMMA4_CODES_NONE ? 1 : bytes_of(s.dtype)), s.dtype),
        v_scale(s.codes == GEMMA4_CODES_FLOAT8 ? s.kv_heads : entries * entry_rows * s.kv_heads, GEMMA4_FP32) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < s.batch * s.rows * q_row - s.padding; ++i) q.put(i, whole(random));
    for (int64_t i = 0; i < s.batch * s.rows * kv_row - s.padding; ++i) k.put(i, whole(random)), v.put(i, whole(random));
    for (int64_t i = 0; i < s.head_dim; ++i) q_weight.put(i, near_one(random)), k_weight.put(i, near_one(random));
    for (int64_t i = 0; i < s.rows * s.head_dim; ++i) {
      const float angle = float(random() % 1000) / 100;
      cos.put(i, std::cos(angle)), sin.put(i, std::sin(angle));
    }
    std::vector<int64_t> order(kPages);
    for (int64_t i = 0; i < kPages; ++i) order[size_t(i)] = i;
    for (size_t i = kPages - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    for (int64_t b = 0; b < s.batch; ++b) {
      // The second request's rows begin before the cache, and the third's end beyond it.
      lengths.push_back(b == 1 ? -1 : b == 2 ? kCapacity - 1 : int64_t(random() % 5));
      for (int64_t c = 0; c < columns; ++c) {
        const auto next = size_t(b * columns + c);
        pages.push_back(next < order.size() ? order[next] : next % 2 ? -1 : kPages);  // the last ones do not exist
      }
    }
    short_lengths.assign(lengths.begin(), lengths.end());
    short_pages.assign(pages.begin(), pages.end());
    gemma4_prologue_arguments& a = arguments;
    a.batch = s.batch, a.rows = s.rows, a.q_heads = s.q_heads, a.kv_heads = s.kv_heads, a.head_dim = s.head_dim;
    a.q = {q.data(), s.rows * q_row, q_row, head};
    a.v = {v.data(), s.rows * kv_row, kv_row, head};
    a.v_cache = {v_cache.data(), entry_rows * cache_row, cache_row, head};
    a.q_weight = q_weight.data(), a.q_weight_dtype = GEMMA4_FP32, a.k_weight_dtype = GEMMA4_BF16;
    if (s.has_keys) {
      a.k = {k.data(), s.rows * kv_row, kv_row, head};
      a.k_cache = {k_cache.data(), entry_rows * cache_row, cache_row, head};
      a.k_weight = k_weight.data();
    }
    a.cos = cos.data(), a.sin = sin.data();
    a.cos_row_stride = a.sin_row_stride = s.head_dim;  // one rotation for all requests
    a.out = out.data();
    a.entries = entries, a.entry_rows = entry_rows;
    a.lengths = s.wide ? static_cast<const void*>(lengths.data()) : short_lengths.data();
    if (s.page != 0) a.block_table = s.wide ? static_cast<const void*>(pages.data()) : short_pages.data();
    a.table_stride = a.table_columns = columns;
    a.lengths_are_64_bit = a.block_table_is_64_bit = s.wide;
    a.dtype = s.dtype;
    a.eps = 1e-6f;
    a.codes = s.codes;
    if (s.codes != GEMMA4_CODES_NONE) a.v_scale = {v_scale.data(), entry_rows * s.kv_heads, s.kv_heads, 1};
    for (int64_t h = 0; s.codes == GEMMA4_CODES_FLOAT8 && h < s.kv_heads; ++h) v_scale.put(h, 0.0625f * float(h + 1));
  }

  int64_t cache_size() const { return entries * entry_rows * cache_row - shape.padding; }

  gemma4_status run() {
    return shape.has_keys ? gemma4_qkv_prologue(&arguments, nullptr) : gemma4_k_eq_v_prologue(&arguments, nullptr);
  }

  std::vector<float> head_of(Numbers& heads, int64_t place, Numbers* weight, int64_t row) {
    std::vector<float> x;
    for (int64_t d = 0; d < shape.head_dim; ++d) x.push_back(heads.get(place + d));
    x = normed(x, weight, arguments.eps, shape.dtype);
    if (weight == nullptr) return x;
    std::vector<float> turned;
    const int64_t half = shape.head_dim / 2;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      const float other = d < half ? -x[size_t(d + half)] : x[size_t(d - half)];
      const float a = rounded(x[size_t(d)] * cos.get(row * shape.head_dim + d), shape.dtype);
      const float b = rounded(other * sin.get(row * shape.head_dim + d), shape.dtype);
      turned.push_back(rounded(a + b, shape.dtype));
    }
    return turned;
  }

  // The code of a value, and of int8 the scale of its head, whose values are `want`.
  bool is_code(unsigned char code, const std::vector<float>& want, int64_t d, float scale) {
    const float value = want[size_t(d)];
    if (shape.codes == GEMMA4_CODES_INT8) {
      float largest = 0;
      for (const float number : want) largest = std::max(largest, std::fabs(number));
      return scale == largest / 127 && int8_t(code) == std::nearbyint(value / scale);
    }
    const int exponent = code >> 3 & 15, bits = code & 7;
    const float magnitude = std::ldexp(float(exponent == 0 ? bits : 8 + bits), std::max(exponent, 1) - 10);
    const float error = std::fabs((code & 0x80 ? -magnitude : magnitude) - value / scale);
    return error <= std::max(std::fabs(value / scale) / 16, std::ldexp(1.0f, -10));
  }

  // Row `position` of a request in the caches, in rows; -1 if there is none.
  int64_t place_of(int64_t request, int64_t position) const {
    if (position < 0) return -1;
    if (shape.page == 0) return position < kCapacity ? request * kCapacity + position : -1;
    if (position >= columns * shape.page) return -1;
    const int64_t page = pages[size_t(request * columns + position / shape.page)];
    return page < 0 || page >= kPages ? -1 : page * shape.page + position % shape.page;
  }

  bool is_right() {
    std::vector<bool> written(size_t(entries * entry_rows));
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t row = 0; row < shape.rows; ++row) {
        const int64_t token = b * shape.rows + row, place = place_of(b, lengths[size_t(b)] + row);
        for (int64_t h = 0; h < shape.q_heads; ++h) {
          const auto want = head_of(q, token * q_row + h * head, &q_weight, row);
          for (int64_t d = 0; d < shape.head_dim; ++d) {
            if (out.get((token * shape.q_heads + h) * shape.head_dim + d) != want[size_t(d)]) return false;
          }
        }
        if (place < 0) continue;
        written[size_t(place)] = true;
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
          const auto want = head_of(v, token * kv_row + h * head, nullptr, row);
          const auto want_key = head_of(k, token * kv_row + h * head, &k_weight, row);
          for (int64_t d = 0; d < shape.head_dim; ++d) {
            const int64_t i = place * cache_row + h * head + d;
            if (shape.codes != GEMMA4_CODES_NONE) {
              const float scale = v_scale.get(shape.codes == GEMMA4_CODES_INT8 ? place * shape.kv_heads + h : h);
              if (!is_code(*(v_cache.at(0) + i), want, d, scale)) return false;
              continue;
            }
            if (v_cache.get(i) != want[size_t(d)]) return false;
            if (shape.has_keys && k_cache.get(i) != want_key[size_t(d)]) return false;
          }
        }
      }
    }
    for (int64_t i = 0; i < entries * entry_rows * cache_row - shape.padding; ++i) {
      const bool inside = written[size_t(i / cache_row)] && i % head < shape.head_dim;
      const bool with_codes = shape.codes != GEMMA4_CODES_NONE;
      if (!inside && !(with_codes ? *(v_cache.at(0) + i) == 0xFF : v_cache.untouched(i))) return false;
      if (!(inside && shape.has_keys) && !k_cache.untouched(i)) return false;
    }
    return true;
  }
  bool is_untouched() const {
    const bool scales = shape.codes == GEMMA4_CODES_FLOAT8 || v_scale.untouched();
    return out.untouched() && k_cache.untouched() && v_cache.untouched() && scales;
  }
};

int check_prologue() {
  const PrologueShape shapes[] = {
      {1, 1, 16, 8, 256, GEMMA4_BF16, true, 0, 0, false},  {3, 5, 4, 2, 64, GEMMA4_BF16, true, 6, 0, true},
      {1, 2, 16, 1, 512, GEMMA4_BF16, false, 0, 0, true},  {3, 7, 4, 1, 512, GEMMA4_FP16, false, 6, 16, false},
      {2, 3, 3, 3, 80, GEMMA4_FP16, true, 0, 8, false},    {2, 3, 6, 2, 6, GEMMA4_BF16, true, 5, 3, true},
      {3, 4, 2, 1, 130, GEMMA4_FP32, false, 6, 0, false},  {3, 2, 5, 1, 272, GEMMA4_FP32, true, 0, 4, true},
      {3, 5, 4, 2, 512, GEMMA4_BF16, false, 6, 0, true, GEMMA4_CODES_FLOAT8},
      {2, 2, 3, 1, 64, GEMMA4_FP16, false, 0, 0, false, GEMMA4_CODES_INT8},
      {3, 4, 2, 2, 130, GEMMA4_FP32, false, 6, 0, false, GEMMA4_CODES_INT8},
  };
  unsigned seed = 100;
  for (const PrologueShape& shape : shapes) {
    PrologueCall call(shape, ++seed);
    const auto status = call.run();
    const bool right = status == GEMMA4_OK && call.is_right();
    std::printf("prologue heads %ld and %ld of %ld, page %ld, dtype %d: %s\n", long(shape.q_heads), long(shape.kv_heads),
                long(shape.head_dim), long(shape.page), shape.dtype,
                status != GEMMA4_OK ? gemma4_last_error() : right ? "right" : "wrong");
    if (!right) return 1;
  }
  return 0;
}

// Arguments out of order ------------------------------------------------------------------------------------------------------

template <class T>
T one_of(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

// Null, or off its elements.
template <class Pointer>
Pointer moved(std::mt19937& random, Pointer pointer) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const unsigned char, unsigned char>;
  return random() % 2 || pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + 1;
}

void spoil(gemma4_sandwich_norm_arguments& a, std::mt19937& random) {
  const int kind = one_of(random, {-1, 3, 7, INT32_MAX, INT32_MIN});
  const int64_t far = one_of<int64_t>(random, {INT64_MIN, -1, INT64_MAX, int64_t(1) << 60});
  switch (random() % 15) {
    case 0: a.m = one_of<int64_t>(random, {INT64_MIN, -1, int64_t(1) << 31, INT64_MAX}); break;
    case 1: a.n = one_of<int64_t>(random, {INT64_MIN, -1, 0, 16385, INT64_MAX}); break;
    case 2: a.x_stride = far; break;
    case 3: a.residual_stride = far; break;
    case 4: a.hidden_stride = random() % 2 ? far : a.n - 1; break;
    case 5: a.normed_stride = random() % 2 ? far : a.n - 1; break;
    case 6: a.x = moved(random, a.x); break;
    case 7: a.residual = moved(random, a.residual); break;
    case 8: a.hidden = moved(random, a.hidden); break;
    case 9: a.normed = moved(random, a.normed); break;
    case 10: a.post_weight = moved(random, a.post_weight); break;
    case 11: a.pre_weight = moved(random, a.pre_weight); break;
    case 12: a.eps = one_of(random, {0.0f, -1.0f, NAN, INFINITY}); break;
    case 13: (random() % 2 ? a.dtype : a.post_weight_dtype) = kind; break;
    default: (random() % 2 ? a.pre_weight_dtype : a.layer_scalar_dtype) = kind; break;
  }
}

void spoil(gemma4_prologue_arguments& a, std::mt19937& random) {
  const int kind = one_of(random, {-1, 3, 7, INT32_MAX, INT32_MIN});
  const int64_t far = one_of<int64_t>(random, {INT64_MIN, -1, INT64_MAX, int64_t(1) << 61});
  const int64_t size = one_of<int64_t>(random, {INT64_MIN, -1, int64_t(1) << 31, INT64_MAX});
  const int64_t count = one_of<int64_t>(random, {INT64_MIN, -1, 0, 65536, INT64_MAX});
  switch (random() % 28) {
    case 0: a.batch = size; break;
    case 1: a.rows = size; break;
    case 2: a.q_heads = count; break;
    case 3: a.kv_heads = count; break;
    case 4: a.head_dim = one_of<int64_t>(random, {INT64_MIN, -2, 0, 1, 63, 514, INT64_MAX}); break;
    case 5: a.q.data = moved(random, a.q.data); break;
    case 6: a.v.data = moved(random, a.v.data); break;
    case 7: a.k.data = a.k.data == nullptr ? a.v.data : moved(random, a.k.data); break;
    case 8: a.q.row_stride = far; break;
    case 9: a.v.head_stride = far; break;
    case 10: a.q.batch_stride = far; break;
    case 11: a.v_cache.data = moved(random, a.v_cache.data); break;
    case 12: a.k_cache.data = a.k_cache.data == nullptr ? a.v_cache.data : moved(random, a.k_cache.data); break;
    case 13: a.v_cache.entry_stride = far; break;
    case 14: a.v_cache.row_stride = far; break;
    case 15: a.q_weight = moved(random, a.q_weight); break;
    case 16: a.k_weight = a.k_weight == nullptr ? a.q_weight : moved(random, a.k_weight); break;
    case 17: a.cos = moved(random, a.cos); break;
    case 18: a.sin = moved(random, a.sin); break;
    case 19: (random() % 2 ? a.cos_row_stride : a.sin_row_stride) = far; break;
    case 20: a.out = moved(random, a.out); break;
    case 21: a.lengths = moved(random, a.lengths); break;
    case 22: (random() % 2 ? a.entries : a.entry_rows) = one_of<int64_t>(random, {INT64_MIN, -1, 0, int64_t(1) << 31, INT64_MAX}); break;
    case 23: a.eps = one_of(random, {0.0f, -1.0f, NAN, INFINITY}); break;
    case 24: (random() % 2 ? a.dtype : a.q_weight_dtype) = kind; break;
    case 25: a.codes = a.k.data != nullptr ? 1 + int(random() % 2) : kind; break;
    case 26:
      if (a.codes == GEMMA4_CODES_NONE) {
        a.v_scale.data = a.v_cache.data;
      } else if (a.kv_heads > 1 && random() % 2) {
        a.v_scale.head_stride = far;
      } else {
        a.v_scale.data = moved(random, a.v_scale.data);
      }
      break;
    default:
      if (a.block_table != nullptr) {
        a.table_columns = one_of<int64_t>(random, {INT64_MIN, -1, 0, int64_t(1) << 31, INT64_MAX});
      } else {
        a.entries = a.batch - 1;
      }
  }
}

// A call with one fault must be refused in words, with nothing written.
template <class Call, class Arguments>
bool is_refused(Call& call, std::mt19937& random, const char* function, gemma4_status (*run)(const Arguments*, gemma4_stream)) {
  const auto before = call.arguments;
  if (random() % 64 == 0) {
    if (run(nullptr, nullptr) != GEMMA4_INVALID_ARGUMENT) return false;
  } else {
    spoil(call.arguments, random);
    if (std::memcmp(&before, &call.arguments, sizeof before) == 0) return true;
    if (run(&call.arguments, nullptr) == GEMMA4_OK) return std::printf("%s took spoiled arguments\n", function), false;
  }
  if (std::string(gemma4_last_error()).rfind(std::string(function) + ": ", 0) != 0) return false;
  return call.is_untouched() || (std::printf("%s refused, but wrote\n", function), false);
}

int fuzz(int count) {
  std::mt19937 random(7);
  const int dtypes[] = {GEMMA4_BF16, GEMMA4_FP16, GEMMA4_FP32};
  for (int i = 0; i < count; ++i) {
    bool right;
    if (i % 3 == 0) {
      NormCall call({int64_t(2 + random() % 3), int64_t(2 * (1 + random() % 40)), dtypes[random() % 3], dtypes[random() % 3],
                     dtypes[random() % 3], true, true, int64_t(random() % 9), 0}, unsigned(i));
      right = is_refused(call, random, "gemma4_sandwich_norm", gemma4_sandwich_norm);
    } else {
      const bool has_keys = i % 3 == 1;
      PrologueCall call({int64_t(2 + random() % 2), int64_t(2 + random() % 3), 4, 2, int64_t(2 * (1 + random() % 40)),
                         dtypes[random() % 3], has_keys, random() % 2 ? 6 : 0, int64_t(random() % 9), random() % 2 == 0,
                         has_keys ? 0 : int(random() % 3)}, unsigned(i));
      right = is_refused(call, random, has_keys ? "gemma4_qkv_prologue" : "gemma4_k_eq_v_prologue",
                         has_keys ? gemma4_qkv_prologue : gemma4_k_eq_v_prologue);
    }
    if (!right) return std::printf("call %d: %s\n", i, gemma4_last_error()), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "fuzz") return fuzz(std::atoi(arguments[2]));
  return check_norms() != 0 || check_prologue() != 0;
}
