// gemma4_qkv_prologue and gemma4_k_eq_v_prologue: what stands in front of attention, in one launch: norms of q, k and v,
// rotation of q and k, the write into the cache.
//
//   q   (batch, rows, q_heads, head_dim)      k, v  (batch, rows, kv_heads, head_dim), k absent where a cache holds v alone
//   cos, sin  (batch, rows, head_dim)         out   as q, dense
//   caches    (entries, entry_rows, kv_heads, head_dim): a request's own, or pages with a block table
//
// A block owns one row and a few heads of it, LANES lanes of a warp a head of q, k or v: 16 to head_dim 256, else 32. RoPE
// turns the pairs (d, d + D / 2), so a lane holds eight neighbours of the lower half of a head and the same eight of the upper:
// no pair is split, and a 16-bit head is read and written 16 bytes at a time.
//
// A cache of values alone may have 8 bits: the value, rounded as it would be without, is divided by a scale and becomes a code.
//
// A norm is rounded once; of a rotation each product and the sum are. Order of a sum of squares: a lane's lower eight, its
// upper eight, lanes in pairs. It depends on head_dim only, so a row's bits do not depend on the others.
#include <cmath>

#include "../common/checks.h"
#include "../common/rms_norm.cuh"
#include "value_codes.cuh"

namespace gemma4::prologue {
namespace {

constexpr int kThreads = 128;
constexpr int kMostHeadDim = 512;  // what 32 lanes hold
constexpr unsigned kMostBlocksOfRow = 65535;

// Heads of a tensor (batch, rows, heads, head_dim), or of a cache (entries, rows, heads, head_dim); strides in elements.
struct Heads {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};
struct Cache {
  void* data;
  int64_t entry_stride, row_stride, head_stride;
};

struct Parameters {
  Heads q, k, v;
  const void *q_weight, *k_weight, *cos, *sin;
  int64_t cos_batch_stride, cos_row_stride, sin_batch_stride, sin_row_stride;
  void* out;
  Cache k_cache, v_cache, v_scale;
  const void *lengths, *block_table;
  int64_t entries, entry_rows, table_stride, table_columns;
  int rows, q_heads, kv_heads, head_dim;
  int q_weight_dtype, k_weight_dtype;
  int codes;  // gemma4_codes
  int lengths_are_64_bit, block_table_is_64_bit;
  float eps;
  bool whole;  // every half of a head may be taken 16 bytes at a time
};

enum Kind { kQuery, kKey, kValue, kNothing };

// What a group of lanes does: heads of q come first, then those of k, if there are any, then those of v.
struct Task {
  Kind kind;
  int head;
};

__device__ __forceinline__ Task task_of(const Parameters& p, int number) {
  if (number < p.q_heads) return {kQuery, number};
  number -= p.q_heads;
  if (p.k.data != nullptr) {
    if (number < p.kv_heads) return {kKey, number};
    number -= p.kv_heads;
  }
  return {number < p.kv_heads ? kValue : kNothing, number};
}

__device__ __forceinline__ int64_t whole_number(const void* numbers, int64_t i, int are_64_bit) {
  return are_64_bit ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

// Where in the cache a row goes; entry -1 where there is no such place, because lengths and pages are numbers that nobody has
// seen.
struct Place {
  int64_t entry, row;
};

__device__ __forceinline__ Place place_of(const Parameters& p, int64_t request, int row) {
  // As unsigned, because a length may be any number; a sum that wraps is negative, and so outside.
  const auto position = int64_t(uint64_t(whole_number(p.lengths, request, p.lengths_are_64_bit)) + uint64_t(row));
  // A contiguous cache is one page for each request, the request's own.
  if (position < 0 || position >= p.table_columns * p.entry_rows) return {-1, 0};
  if (p.block_table == nullptr) return {request, position};
  const int64_t page =
      whole_number(p.block_table, request * p.table_stride + position / p.entry_rows, p.block_table_is_64_bit);
  return {page < p.entries ? page : -1, position % p.entry_rows};
}

// The two halves of a head, as far as a lane holds them.
struct Halves {
  float low[kEight], high[kEight];
};

template <class Type>
__device__ __forceinline__ Halves load_halves(const void* head, int first, int half, bool whole) {
  Halves x;
  load_eight<Type>(x.low, head, first, half, whole);
  load_eight<Type>(x.high, static_cast<const Bits<Type>*>(head) + half, first, half, whole);
  return x;
}

__device__ __forceinline__ Halves load_weights(const void* weight, int dtype, int first, int half, bool whole) {
  Halves w;
  load_eight(w.low, weight, dtype, first, half, whole);
  load_eight(w.high, static_cast<const unsigned char*>(weight) + half * bytes_of(dtype), dtype, first, half, whole);
  return w;
}

template <class Type>
__device__ __forceinline__ void store_halves(void* head, const Halves& x, int first, int half, bool whole) {
  store_eight<Type>(head, x.low, first, half, whole);
  store_eight<Type>(static_cast<Bits<Type>*>(head) + half, x.high, first, half, whole);
}

// x * cos + rotate_half(x) * sin with rotate_half((a, b)) = (-b, a), each of the three operations rounded to Type.
template <class Type>
__device__ __forceinline__ void rotate(Halves& x, const Halves& cos, const Halves& sin) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const float low =
        __fsub_rn(rounded<Type>(__fmul_rn(x.low[i], cos.low[i])), rounded<Type>(__fmul_rn(x.high[i], sin.low[i])));
    x.high[i] = __fadd_rn(rounded<Type>(__fmul_rn(x.high[i], cos.high[i])), rounded<Type>(__fmul_rn(x.low[i], sin.high[i])));
    x.low[i] = low;  // the last rounding is the store's
  }
}

template <class Type>
__device__ __forceinline__ const void* head_of(const Heads& heads, int64_t request, int row, int head) {
  return static_cast<const Bits<Type>*>(heads.data) + request * heads.batch_stride + row * heads.row_stride +
         head * heads.head_stride;
}

__device__ __forceinline__ int64_t offset_in(const Cache& cache, const Place& place, int head) {
  return place.entry * cache.entry_stride + place.row * cache.row_stride + head * cache.head_stride;
}

// Where a head goes: into the query that is returned, or into a cache; null where it has no place.
template <class Type>
__device__ __forceinline__ void* target_of(const Parameters& p, const Task& task, int64_t token, int64_t request, int row) {
  if (task.kind == kQuery) return static_cast<Bits<Type>*>(p.out) + (token * p.q_heads + task.head) * p.head_dim;
  const Place place = place_of(p, request, row);
  if (place.entry < 0) return nullptr;
  const Cache& cache = task.kind == kKey ? p.k_cache : p.v_cache;
  const int element_bytes = p.codes == GEMMA4_CODES_NONE ? int(sizeof(Bits<Type>)) : 1;
  return static_cast<unsigned char*>(cache.data) + offset_in(cache, place, task.head) * element_bytes;
}

// The codes of a value and, of int8, their scale. Its place is looked up again: only here is it wanted.
template <class Type>
__device__ __forceinline__ void write_codes(const Parameters& p, void* to, const Halves& x, float largest, int head,
                                            int64_t request, int row, int first, int half) {
  const bool is_int8 = p.codes == GEMMA4_CODES_INT8;
  float* place = static_cast<float*>(p.v_scale.data) + offset_in(p.v_scale, place_of(p, request, row), head);
  const float scale = is_int8 ? int8_scale(largest) : *place;
  if (is_int8 && first == 0) *place = scale;
  auto* codes = static_cast<unsigned char*>(to);
  store_codes(codes, codes_of<Type>(x.low, scale, is_int8), first, half, p.whole);
  store_codes(codes + half, codes_of<Type>(x.high, scale, is_int8), first, half, p.whole);
}

// A row of a table that is wanted after the sum, for which all lanes wait, is sent for before it.
template <class Table>
__device__ __forceinline__ void send_ahead(const Table* row, int first, int half) {
  if (first >= half) return;
  ptx::prefetch(row + first);
  ptx::prefetch(row + half + first);
}

template <class Type, int LANES>
__global__ void __launch_bounds__(kThreads) prologue_kernel(const Parameters p) {
  const int64_t token = blockIdx.x, request = token / p.rows;
  const int row = int(token - request * p.rows);
  const Task task = task_of(p, int(blockIdx.y) * (kThreads / LANES) + int(threadIdx.x) / LANES);
  // A group without a head goes on to the sum, where its warp waits for it, with no numbers.
  const int half = task.kind == kNothing ? 0 : p.head_dim / 2, first = int(threadIdx.x) % LANES * kEight;
  const Heads& from = task.kind == kQuery ? p.q : task.kind == kKey ? p.k : p.v;
  Halves x = load_halves<Type>(head_of<Type>(from, request, row, task.head), first, half, p.whole);
  const auto* cos = static_cast<const Bits<Type>*>(p.cos) + request * p.cos_batch_stride + row * p.cos_row_stride;
  const auto* sin = static_cast<const Bits<Type>*>(p.sin) + request * p.sin_batch_stride + row * p.sin_row_stride;
  const bool turns = task.kind == kQuery || task.kind == kKey;
  if (turns) send_ahead(cos, first, half), send_ahead(sin, first, half);
  void* to = task.kind == kNothing ? nullptr : target_of<Type>(p, task, token, request, row);
  const float inverse = inverse_rms(sum_of_lanes<LANES>(add_squares(add_squares(0, x.low), x.high)), p.head_dim, p.eps);
  // Roundings keep the order of numbers, so the largest after the norm is the largest before it. A NaN or infinity among them
  // is not looked for: with it the product is NaN.
  const float largest =
      p.codes == GEMMA4_CODES_INT8
          ? rounded<Type>(__fmul_rn(largest_of_lanes<LANES>(fmaxf(largest_of(x.low), largest_of(x.high))), inverse))
          : 0;
  if (to == nullptr || first >= half) return;

  Halves weight;
#pragma unroll
  for (int i = 0; i < kEight; ++i) weight.low[i] = weight.high[i] = 1;
  if (task.kind == kQuery) weight = load_weights(p.q_weight, p.q_weight_dtype, first, half, p.whole);
  if (task.kind == kKey) weight = load_weights(p.k_weight, p.k_weight_dtype, first, half, p.whole);
  scale_eight<Type>(x.low, inverse, weight.low);
  scale_eight<Type>(x.high, inverse, weight.high);
  if (turns) rotate<Type>(x, load_halves<Type>(cos, first, half, p.whole), load_halves<Type>(sin, first, half, p.whole));
  if (task.kind == kValue && p.codes != GEMMA4_CODES_NONE) {
    write_codes<Type>(p, to, x, largest, task.head, request, row, first, half);
  } else {
    store_halves<Type>(to, x, first, half, p.whole);
  }
}

// The C interface -------------------------------------------------------------------------------------------------------------

constexpr int64_t kMostElements = int64_t(1) << 60;  // from the first to the last of a tensor: no offset overflows

struct Dim {
  int64_t size, stride;
};

// Checks of one call, and what the pointers and strides that have been seen come to.
struct Arguments {
  const gemma4_prologue_arguments& a;
  Checks checks;
  bool whole;

  // A tensor that must be there, dense in its last dim. Strides of dims of one size mean nothing, and may be anything.
  gemma4_status tensor(const char* name, const void* data, int element_bytes, std::initializer_list<Dim> dims) {
    if (auto status = checks.pointer(name, data, uintptr_t(element_bytes))) return status;
    whole = whole && is_aligned(data, 16);
    int64_t room = kMostElements;
    for (const Dim& dim : dims) {
      if (dim.size <= 1) continue;
      if (dim.stride < 0 || dim.stride > room / (dim.size - 1)) {
        return checks.invalid(std::string(name) + " must have strides that are not negative and end within 2^60 elements, got " +
                              number(dim.stride) + " for a dim of " + number(dim.size));
      }
      room -= dim.stride * (dim.size - 1);
      whole = whole && dim.stride * element_bytes % 16 == 0;
    }
    return GEMMA4_OK;
  }

  gemma4_status heads(const char* name, const gemma4_rows& h, int64_t count) {
    return tensor(name, h.data, bytes_of(a.dtype), {{a.batch, h.batch_stride}, {a.rows, h.row_stride}, {count, h.head_stride}});
  }

  gemma4_status cache(const char* name, const gemma4_prologue_cache& c, int element_bytes) {
    return tensor(name, c.data, element_bytes,
                  {{a.entries, c.entry_stride}, {a.entry_rows, c.row_stride}, {a.kv_heads, c.head_stride}});
  }

  gemma4_status weight(const char* name, const void* data, int dtype) {
    if (!is_dtype(dtype)) return checks.invalid(std::string(name) + "_dtype " + number(dtype) + " is no gemma4_dtype");
    return tensor(name, data, bytes_of(dtype), {});
  }

  // What makes codes of values, if anything does. One number is read at a time, so `whole` has nothing to do with it.
  gemma4_status scale(bool has_keys) {
    if (a.codes < GEMMA4_CODES_NONE || a.codes > GEMMA4_CODES_INT8) {
      return checks.invalid("codes " + number(a.codes) + " is no gemma4_codes");
    }
    if (a.codes == GEMMA4_CODES_NONE) {
      return a.v_scale.data == nullptr ? GEMMA4_OK : checks.invalid("v_scale must be null without codes");
    }
    if (has_keys) return checks.unsupported("codes go with values alone");
    Arguments apart = *this;
    if (a.codes == GEMMA4_CODES_INT8) return apart.cache("v_scale", a.v_scale, 4);
    return apart.tensor("v_scale", a.v_scale.data, 4, {{a.kv_heads, a.v_scale.head_stride}});
  }

  gemma4_status size(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value >= least && value <= most) return GEMMA4_OK;
    return checks.invalid(std::string(name) + " must lie in [" + number(least) + ", " + number(most) + "], got " + number(value));
  }

  gemma4_status sizes() const {
    if (auto status = size("batch", a.batch, 0, INT32_MAX)) return status;
    if (auto status = size("rows", a.rows, 0, INT32_MAX)) return status;
    if (a.batch * a.rows > INT32_MAX) return checks.invalid("batch * rows must be at most 2147483647");
    if (auto status = size("q_heads", a.q_heads, 1, kMostBlocksOfRow)) return status;
    if (auto status = size("kv_heads", a.kv_heads, 1, kMostBlocksOfRow)) return status;
    if (a.head_dim < 2 || a.head_dim % 2 != 0) {
      return checks.invalid("head_dim must be even and positive, got " + number(a.head_dim));
    }
    if (a.head_dim > kMostHeadDim) return checks.unsupported("head_dim goes to 512, got " + number(a.head_dim));
    if (a.batch * a.rows > kMostElements / (a.q_heads * a.head_dim)) {
      return checks.invalid("out would have more than 2^60 elements");
    }
    if (!is_dtype(a.dtype)) return checks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
    if (!(a.eps > 0) || std::isinf(a.eps)) return checks.invalid("eps must be positive and finite");
    return GEMMA4_OK;
  }

  gemma4_status places() {
    if (auto status = size("entries", a.entries, 1, INT32_MAX)) return status;
    if (auto status = size("entry_rows", a.entry_rows, 1, INT32_MAX)) return status;
    const uintptr_t lengths = a.lengths_are_64_bit ? 8 : 4, pages = a.block_table_is_64_bit ? 8 : 4;
    if (auto status = checks.pointer("lengths", a.lengths, lengths)) return status;
    if (a.block_table == nullptr) {
      return a.entries >= a.batch ? GEMMA4_OK : checks.invalid("entries must be at least batch without block_table");
    }
    if (auto status = checks.pointer("block_table", a.block_table, pages)) return status;
    if (auto status = size("table_columns", a.table_columns, 1, INT32_MAX)) return status;
    if (a.batch > 1) return size("table_stride", a.table_stride, 0, kMostElements / a.batch);
    return GEMMA4_OK;
  }

  gemma4_status tensors(bool has_keys) {
    const int bytes = bytes_of(a.dtype);
    if (auto status = heads("q", a.q, a.q_heads)) return status;
    if (auto status = heads("v", a.v, a.kv_heads)) return status;
    if (auto status = cache("v_cache", a.v_cache, a.codes == GEMMA4_CODES_NONE ? bytes : 1)) return status;
    if (auto status = weight("q_weight", a.q_weight, a.q_weight_dtype)) return status;
    if (auto status = tensor("cos", a.cos, bytes, {{a.batch, a.cos_batch_stride}, {a.rows, a.cos_row_stride}})) return status;
    if (auto status = tensor("sin", a.sin, bytes, {{a.batch, a.sin_batch_stride}, {a.rows, a.sin_row_stride}})) return status;
    if (auto status = tensor("out", a.out, bytes, {})) return status;
    if (!has_keys) return GEMMA4_OK;
    if (auto status = heads("k", a.k, a.kv_heads)) return status;
    if (auto status = cache("k_cache", a.k_cache, bytes)) return status;
    return weight("k_weight", a.k_weight, a.k_weight_dtype);
  }
};

Heads heads_of(const gemma4_rows& h) { return {h.data, h.batch_stride, h.row_stride, h.head_stride}; }
Cache cache_of(const gemma4_prologue_cache& c) { return {c.data, c.entry_stride, c.row_stride, c.head_stride}; }

Parameters parameters_of(const gemma4_prologue_arguments& a, bool whole) {
  Parameters p{};
  p.q = heads_of(a.q), p.k = heads_of(a.k), p.v = heads_of(a.v);
  p.q_weight = a.q_weight, p.k_weight = a.k_weight;
  p.cos = a.cos, p.sin = a.sin;
  p.cos_batch_stride = a.cos_batch_stride, p.cos_row_stride = a.cos_row_stride;
  p.sin_batch_stride = a.sin_batch_stride, p.sin_row_stride = a.sin_row_stride;
  p.out = a.out;
  p.k_cache = cache_of(a.k_cache), p.v_cache = cache_of(a.v_cache);
  p.codes = a.codes, p.v_scale = cache_of(a.v_scale);
  if (a.codes == GEMMA4_CODES_FLOAT8) p.v_scale.entry_stride = p.v_scale.row_stride = 0;
  p.lengths = a.lengths, p.block_table = a.block_table;
  p.lengths_are_64_bit = a.lengths_are_64_bit, p.block_table_is_64_bit = a.block_table_is_64_bit;
  p.entries = a.entries, p.entry_rows = a.entry_rows;
  p.table_stride = a.batch > 1 ? a.table_stride : 0;
  p.table_columns = a.block_table == nullptr ? 1 : a.table_columns;
  p.rows = int(a.rows), p.q_heads = int(a.q_heads), p.kv_heads = int(a.kv_heads), p.head_dim = int(a.head_dim);
  p.q_weight_dtype = a.q_weight_dtype, p.k_weight_dtype = a.k_weight_dtype;
  p.eps = a.eps;
  p.whole = whole;
  return p;
}

template <class Type, int LANES>
std::string launch_lanes(const Parameters& p, unsigned tokens, void* stream) {
  const int heads = p.q_heads + p.kv_heads * (p.k.data == nullptr ? 1 : 2), of_block = kThreads / LANES;
  return launch(prologue_kernel<Type, LANES>, tokens, unsigned((heads + of_block - 1) / of_block), kThreads, 0, stream, p);
}

template <class Type>
std::string launch_type(const Parameters& p, unsigned tokens, void* stream) {
  return p.head_dim <= 16 * 2 * kEight ? launch_lanes<Type, 16>(p, tokens, stream) : launch_lanes<Type, 32>(p, tokens, stream);
}

gemma4_status run(const char* function, const gemma4_prologue_arguments* arguments, bool has_keys, gemma4_stream stream) {
  const Checks checks{function};
  if (arguments == nullptr) return checks.invalid("arguments is null");
  const gemma4_prologue_arguments& a = *arguments;
  Arguments checked{a, checks, a.head_dim % (2 * kEight) == 0};
  if (auto status = checked.sizes()) return status;
  if (!has_keys && (a.k.data != nullptr || a.k_weight != nullptr || a.k_cache.data != nullptr)) {
    return checks.invalid("k, k_weight and k_cache must be null");
  }
  if (a.batch * a.rows == 0) return GEMMA4_OK;
  if (auto status = checked.places()) return status;
  if (auto status = checked.scale(has_keys)) return status;
  if (auto status = checked.tensors(has_keys)) return status;
  const Parameters p = parameters_of(a, checked.whole);
  auto launch_dtype = launch_type<Fp32>;
  if (a.dtype == GEMMA4_BF16) launch_dtype = launch_type<Bf16>;
  if (a.dtype == GEMMA4_FP16) launch_dtype = launch_type<Fp16>;
  return checks.launched(launch_dtype(p, unsigned(a.batch * a.rows), stream));
}

}  // namespace
}  // namespace gemma4::prologue

extern "C" {

gemma4_status gemma4_qkv_prologue(const gemma4_prologue_arguments* arguments, gemma4_stream stream) {
  return gemma4::prologue::run("gemma4_qkv_prologue", arguments, true, stream);
}

gemma4_status gemma4_k_eq_v_prologue(const gemma4_prologue_arguments* arguments, gemma4_stream stream) {
  return gemma4::prologue::run("gemma4_k_eq_v_prologue", arguments, false, stream);
}

}  // extern "C"
