// Which rows and keys a request has, where a key lies, and how the keys of a row are split: the same functions in the kernel
// that makes parts and in the one that adds them.
//
// Numbers on the device are nobody's to check before the launch. Here each is held within what exists.
#pragma once

#include "attention.h"

namespace gemma4::attention {

struct Request {
  int first_row;  // of q, where requests are packed
  int rows;
  int first_key;  // of k and v, where they are packed
  int start;      // the first key in use
  int end;        // the key after the last
  int entry;      // of the cache
};

__device__ __forceinline__ int within(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

__device__ __forceinline__ Request request_of(const Requests& p, int b) {
  Request r{0, p.rows, 0, 0, p.capacity, b};
  if (p.cu_q != nullptr) {
    r.first_row = within(p.cu_q[b], 0, p.total_rows);
    r.rows = within(within(p.cu_q[b + 1], 0, p.total_rows) - r.first_row, 0, p.rows);
  }
  if (p.cu_k != nullptr) {
    const int offset = within(p.cu_k[b], 0, INT32_MAX);
    r.end = within(within(p.cu_k[b + 1], 0, INT32_MAX) - offset, 0, p.capacity);
    if (p.table == nullptr) {
      r.entry = 0;
      r.first_key = within(offset, 0, p.total_keys);
      r.end = within(r.end, 0, p.total_keys - r.first_key);
    }
  }
  if (p.lengths != nullptr) r.end = within(p.lengths[b], 0, p.capacity);
  if (p.first != nullptr) r.start = within(p.first[b], 0, r.end);
  if (p.entry != nullptr) r.entry = within(p.entry[b], 0, p.entries - 1);
  return r;
}

// Where a key lies: a page, or the request's entry, and a row in it.
struct Place {
  int entry;
  int row;
};

// The key must be one of the request's: of others the table may hold anything.
__device__ __forceinline__ Place place_of(const Requests& p, const Request& r, int b, int key) {
  if (p.page_size == 0) return {r.entry, r.first_key + key};
  uint32_t page = __umulhi(uint32_t(key), p.page_inverse);
  uint32_t row = uint32_t(key) - page * uint32_t(p.page_size);
  if (row >= uint32_t(p.page_size)) {  // the inverse is rounded down: one page short at most
    ++page;
    row -= uint32_t(p.page_size);
  }
  return {within(__ldg(p.table + b * p.table_stride + page), 0, p.entries - 1), int(row)};
}

// The keys that a row at position `token` sees, from low up to high; none where low >= high.
struct Span {
  int low;
  int high;
};

__device__ __forceinline__ Span seen_by(const Requests& p, const Request& r, int token) {
  const int low = token - p.left, high = token + p.right + 1;
  return {low > r.start ? low : r.start, high < r.end ? high : r.end};
}

// The chunks of one row. Chunk i holds keys start + i * size and the next `size`.
struct Chunks {
  int size;
  int first;
  int count;  // 0 for a row that sees nothing
};

// The size is the smallest of those allowed of which `most` hold all keys that the row sees: it depends on nothing but their
// number, so a row's sums are grouped alike in any company. Chunks are counted from `start`: those of one size have the same
// edges for all rows.
__device__ __forceinline__ Chunks chunks_of(const Requests& p, const Splits& splits, const Request& r, int token) {
  const Span span = seen_by(p, r, token);
  const int seen = span.high - span.low;
  int size = 1 << splits.smallest_log2;
  if (seen <= 0) return {size, 0, 0};
  const int wanted = (seen + splits.most - 1) / splits.most;
  if (splits.step == 0) {
    while (size < wanted) size *= 2;
  } else if (size < wanted) {
    size = (wanted + splits.step - 1) / splits.step * splits.step;
  }
  const int first = (span.low - r.start) / size;
  return {size, first, (span.high - 1 - r.start) / size - first + 1};
}

// The chunk that a program makes parts of, for rows first_token to last_token, at most 16 of one request.
struct Chunk {
  int size;
  int index;
  bool exists;
};

// Numbers of keys of such rows differ by 15 at most, and sizes change at multiples of `most` << smallest_log2, so two sizes may
// meet among them, never three: programs of the second half, which seldom have anything to do, serve the larger.
__device__ __forceinline__ Chunk choose_chunk(const Requests& p, const Splits& splits, const Request& r, int first_token,
                                              int last_token, int program) {
  const bool is_second = program >= splits.programs;
  int smallest = INT32_MAX, largest = 0;
  for (int token = first_token; token <= last_token; ++token) {
    const Chunks row = chunks_of(p, splits, r, token);
    if (row.count == 0) continue;
    if (row.size < smallest) smallest = row.size;
    if (row.size > largest) largest = row.size;
  }
  const int size = is_second ? largest : smallest;
  int first = INT32_MAX, last = -1;
  for (int token = first_token; token <= last_token; ++token) {
    const Chunks row = chunks_of(p, splits, r, token);
    if (row.count == 0 || row.size != size) continue;
    if (row.first < first) first = row.first;
    if (row.first + row.count - 1 > last) last = row.first + row.count - 1;
  }
  if (last < 0 || (is_second && smallest == largest)) return {0, 0, false};
  const int index = first + (is_second ? program - splits.programs : program);
  return {size, index, index <= last};
}

// The slot of a row's part that a program makes, or -1: not of the row's size, or not one of its chunks.
__device__ __forceinline__ int slot_of(const Splits& splits, const Chunks& row, const Chunk& chunk) {
  const int slot = chunk.index - row.first;
  return row.size == chunk.size && slot >= 0 && slot < row.count && slot < splits.slots ? slot : -1;
}

// Where the part of a row lies among parts, in units of a slot.
__device__ __forceinline__ int64_t part_of(const Requests& p, const Splits& splits, int b, int heads, int head, int row,
                                           int slot) {
  return ((int64_t(b) * heads + head) * p.rows + row) * splits.slots + slot;
}

}  // namespace gemma4::attention
