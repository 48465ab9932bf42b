// What the functions that attend to a cache check alike, and how they read their arguments.
#pragma once

#include <algorithm>

#include "../common/checks.h"
#include "attention.h"

namespace gemma4::attention {

constexpr int64_t kMostStride = int64_t(1) << 40;
constexpr int64_t kMostElements = int64_t(1) << 60;  // from a tensor's first element to its last
constexpr int64_t kMostGrid = 65535;                 // of a launch's second axis

// Strides that rows of 16-byte copies can have, and that reach no farther than an address goes.
inline gemma4_status check_rows(const Checks& checks, const char* name, const gemma4_rows& t, int64_t batch, int64_t rows,
                                int64_t heads) {
  if (auto status = checks.pointer(name, t.data, 16)) return status;
  for (const int64_t stride : {t.batch_stride, t.row_stride, t.head_stride}) {
    if (stride < 0 || stride % 8 != 0 || stride > kMostStride) {
      const std::string sentence = std::string("a stride of ") + name + " must be a multiple of 8 in [0, 2^40], got ";
      return checks.invalid(sentence + number(stride));
    }
  }
  // Each factor is below 2^31 and each stride below 2^41: compared one by one, nothing overflows.
  if (batch * double(t.batch_stride) + rows * double(t.row_stride) + heads * double(t.head_stride) > double(kMostElements)) {
    return checks.invalid(std::string("the strides of ") + name + " reach beyond 2^60 elements");
  }
  return GEMMA4_OK;
}

inline gemma4_status check_numbers(const Checks& checks, const char* name, const int32_t* numbers) {
  return is_aligned(numbers, 4) ? GEMMA4_OK : checks.invalid(std::string(name) + " is not aligned to its elements");
}

// Sizes alone, which decide on the workspace.
inline gemma4_status check_attention_sizes(const Checks& checks, const gemma4_attention& a) {
  const gemma4_requests& r = a.requests;
  const auto lies = [&](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return GEMMA4_OK;
    return checks.invalid(std::string(name) + " must lie in [" + number(low) + ", " + number(high) + "], got " + number(value));
  };
  if (r.rows > kMostRows) return checks.unsupported("rows goes to 16, got " + number(r.rows));
  if (auto status = lies("rows", r.rows, 0, kMostRows)) return status;
  if (auto status = lies("batch", r.batch, 0, int64_t(1) << 26)) return status;
  if (auto status = lies("capacity", r.capacity, 0, kMostKeys)) return status;
  if (auto status = lies("total_rows", r.total_rows, 0, INT32_MAX)) return status;
  if (auto status = lies("total_keys", r.total_keys, 0, INT32_MAX)) return status;
  if (auto status = lies("entries", r.entries, 0, INT32_MAX)) return status;
  if (auto status = lies("page_size", r.page_size, 0, kMostKeys)) return status;
  if (auto status = lies("kv_heads", a.kv_heads, 1, kMostGrid)) return status;
  if (auto status = lies("query_heads", a.query_heads, 1, kMostGrid)) return status;
  if (a.query_heads % a.kv_heads != 0) {
    return checks.invalid("query_heads must be a multiple of kv_heads = " + number(a.kv_heads) + ", got " +
                          number(a.query_heads));
  }
  if (r.batch * a.kv_heads > kMostGrid) {
    return checks.unsupported("batch times kv_heads goes to " + number(kMostGrid) + ", got " + number(r.batch * a.kv_heads));
  }
  if (!is_dtype(a.dtype)) return checks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
  if (a.dtype == GEMMA4_FP32) return checks.unsupported("q and the cache must be bf16 or fp16");
  return GEMMA4_OK;
}

// Everything else of a call that has rows.
inline gemma4_status check_attention_tensors(const Checks& checks, const gemma4_attention& a) {
  const gemma4_requests& r = a.requests;
  const struct {
    const char* name;
    const int32_t* numbers;
  } all[] = {{"cu_q", r.cu_q},   {"cu_k", r.cu_k},   {"lengths", r.lengths},
             {"first", r.first}, {"entry", r.entry}, {"block_table", r.block_table}};
  for (const auto& each : all) {
    if (auto status = check_numbers(checks, each.name, each.numbers)) return status;
  }
  if ((r.page_size != 0) != (r.block_table != nullptr)) {
    return checks.invalid("page_size must be at least 1 with block_table, else 0");
  }
  if (r.block_table != nullptr) {
    if (r.table_stride < 0 || r.table_stride > kMostStride) {
      return checks.invalid("table_stride must lie in [0, 2^40], got " + number(r.table_stride));
    }
    if (r.first != nullptr || r.entry != nullptr) return checks.invalid("first and entry must be null with block_table");
  }
  const bool packed = r.cu_k != nullptr && r.block_table == nullptr;
  if (packed && r.entry != nullptr) return checks.invalid("entry must be null with cu_k");
  if (!packed && r.capacity > 0 && r.entry == nullptr && r.block_table == nullptr && r.entries < r.batch) {
    return checks.invalid("entries must be at least batch = " + number(r.batch) + ", got " + number(r.entries));
  }
  if (!packed && r.capacity > 0 && r.entries < 1) return checks.invalid("entries must be at least 1 where capacity is not 0");
  if (auto status = checks.pointer("out", a.out, 2)) return status;
  if (auto status = checks.pointer("lse", a.lse, 4)) return status;
  for (const int64_t stride :
       {a.out_batch_stride, a.out_row_stride, a.out_head_stride, a.lse_batch_stride, a.lse_head_stride}) {
    if (stride < 0 || stride > kMostStride) {
      return checks.invalid("strides of out and lse must lie in [0, 2^40], got " + number(stride));
    }
  }
  return check_rows(checks, "q", a.q, r.batch, std::max<int64_t>(r.rows, r.total_rows), a.query_heads);
}

// Keys or values.
inline gemma4_status check_cache(const Checks& checks, const char* name, const gemma4_rows& cache, const gemma4_attention& a) {
  const gemma4_requests& r = a.requests;
  if (r.capacity == 0) return GEMMA4_OK;
  const int64_t rows = r.page_size != 0 ? r.page_size : std::max<int64_t>(r.capacity, r.total_keys);
  return check_rows(checks, name, cache, r.entries, rows, a.kv_heads);
}

inline Requests requests_of(const gemma4_requests& r, int64_t left, int64_t right) {
  Requests p{};
  p.cu_q = r.cu_q;
  p.cu_k = r.cu_k;
  p.lengths = r.lengths;
  p.first = r.first;
  p.entry = r.entry;
  p.table = r.block_table;
  p.table_stride = r.table_stride;
  p.batch = int(r.batch);
  p.rows = int(r.rows);
  p.capacity = int(r.capacity);
  p.total_rows = int(r.total_rows);
  p.total_keys = int(r.total_keys);
  p.entries = int(r.entries);
  p.page_size = int(r.page_size);
  p.page_inverse = r.page_size == 0 ? 0 : uint32_t(std::min<uint64_t>((uint64_t(1) << 32) / uint64_t(r.page_size), UINT32_MAX));
  p.left = left < 0 || left > kNoLimit ? kNoLimit : int(left);
  p.right = right < 0 || right > kNoLimit ? kNoLimit : int(right);
  return p;
}

// Splits for a kernel of which `programs_at_once` run on the device together, with room for the chunks that rows can have: a
// window may begin inside a chunk, which makes one more, and rows of one request may begin in neighbouring ones.
inline Splits splits_of(const Requests& p, int64_t programs_at_once, int64_t kv_heads, int smallest_log2) {
  Splits splits{};
  splits.most = int(std::max<int64_t>(1, programs_at_once / kv_heads));
  splits.smallest_log2 = smallest_log2;
  const int64_t smallest = int64_t(1) << smallest_log2;
  const int64_t all = std::max<int64_t>(1, (p.capacity + smallest - 1) / smallest);
  const int64_t seen = std::min<int64_t>(p.capacity, int64_t(p.left) + p.right + 1);
  const int64_t chunks = std::min<int64_t>(splits.most, (seen + smallest - 1) / smallest) + 1;
  splits.slots = int(std::min(all, chunks));
  splits.programs = int(std::min(all, chunks + 1));
  return splits;
}

// Parts lie in the workspace, values first.
inline size_t parts_bytes(const gemma4_attention& a, const Splits& splits) {
  return size_t(a.requests.batch) * size_t(a.query_heads) * size_t(a.requests.rows) * size_t(splits.slots) *
         (size_t(a.head_dim) + 1) * sizeof(float);
}

inline Parts parts_in(void* workspace, const gemma4_attention& a, const Splits& splits) {
  auto* values = static_cast<float*>(workspace);
  const size_t parts = parts_bytes(a, splits) / sizeof(float) / (size_t(a.head_dim) + 1);
  return {values, values + parts * size_t(a.head_dim)};
}

inline Results results_of(const gemma4_attention& a) {
  return {a.out, a.lse, a.out_batch_stride, a.out_row_stride, a.out_head_stride, a.lse_batch_stride, a.lse_head_stride,
          int(a.query_heads), int(a.head_dim)};
}

}  // namespace gemma4::attention
