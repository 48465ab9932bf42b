// What kernels that attend to a cache are told, and how the keys of a row are split. Between the C interface and the kernels.
#pragma once

#include <cstdint>
#include <string>

#include "../common/device.cuh"

namespace gemma4::attention {

using ptx::Bf16;
using ptx::Fp16;

constexpr int kMostRows = 16;        // query rows of a request while it decodes or verifies
constexpr int kNoLimit = 1 << 29;    // a distance farther than any two positions; sums of both do not overflow
constexpr int kMostKeys = 1 << 29;   // of a request

// gemma4_requests for the device. Null pointers: what a call does not have.
struct Requests {
  const int32_t* cu_q;     // (batch + 1)
  const int32_t* cu_k;     // (batch + 1)
  const int32_t* lengths;  // (batch)
  const int32_t* first;    // (batch)
  const int32_t* entry;    // (batch)
  const int32_t* table;    // (batch, pages of a request)
  int64_t table_stride;
  int batch;
  int rows;
  int capacity;
  int total_rows;
  int total_keys;
  int entries;
  int page_size;          // 0: contiguous
  uint32_t page_inverse;  // 2^32 / page_size, rounded down
  int left;               // kNoLimit for no limit
  int right;
};

// How the keys of a row are cut into chunks, and where the parts go. Nothing but the device, the kernel and the number of KV
// heads decides on `most` and `smallest_log2`; the others are room.
struct Splits {
  int most;           // chunks of the smallest size that would do, but for one more where a window begins inside a chunk
  int smallest_log2;  // keys of the smallest chunk
  int step;           // larger sizes are multiples of it; 0: powers of two
  int slots;          // parts that a row has room for
  int programs;       // chunks that the rows of one request may have together
};

// What the splits leave: values (batch, heads, rows, slots, head_dim), lse (batch, heads, rows, slots).
struct Parts {
  float* values;
  float* lse;
};

struct Results {
  void* out;
  float* lse;
  int64_t out_batch_stride, out_row_stride, out_head_stride;  // elements
  int64_t lse_batch_stride, lse_head_stride;
  int heads;
  int head_dim;  // even
};

// Adds the parts of each row in their order, divides, rounds, and writes out and lse. For kernels in attention/.
std::string launch_combine(const Requests& requests, const Splits& splits, const Parts& parts, const Results& results,
                           bool is_bf16, void* stream);

}  // namespace gemma4::attention
