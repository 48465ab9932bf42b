// The sum of the parts that splits leave, a kernel of its own because atomics would add in any order.
//
//     parts.values  (B, HEADS, ROWS, SLOTS, D) fp32: softmax(...) V over one chunk of the row's keys
//     parts.lse     (B, HEADS, ROWS, SLOTS) fp32: the log of the sum of exponentials of its scores
//
// A block owns one head of one row, a thread two neighbouring columns. The row's chunks are found again from its own length;
// slots beyond them are never read.
#include "request.cuh"
#include "softmax.cuh"

namespace gemma4::attention {
namespace {

constexpr int kCombineThreads = 128;

template <class Type>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const Requests p, const Splits splits, const Parts parts, const Results results) {
  const int b = blockIdx.x / p.rows, i = blockIdx.x % p.rows, head = blockIdx.y;
  const Request r = request_of(p, b);
  if (i >= r.rows) return;
  const Chunks row = chunks_of(p, splits, r, r.end - r.rows + i);
  const int count = row.count < splits.slots ? row.count : splits.slots;
  const int64_t place = part_of(p, splits, b, results.heads, head, i, 0);
  const float* sums = parts.lse + place;
  float highest = -INFINITY;
  for (int slot = 0; slot < count; ++slot) highest = fmaxf(highest, sums[slot]);
  float total = 0;
  for (int slot = 0; slot < count; ++slot) total += exponential(sums[slot] - highest);
  const float inverse = count == 0 ? 0 : 1 / total;
  auto* out = static_cast<uint16_t*>(results.out) + b * results.out_batch_stride + (r.first_row + i) * results.out_row_stride +
              head * results.out_head_stride;
  for (int column = 2 * threadIdx.x; column < results.head_dim; column += 2 * kCombineThreads) {
    float2 sum = {0, 0};
    for (int slot = 0; slot < count; ++slot) {
      const float weight = exponential(sums[slot] - highest);
      const float2 part = *reinterpret_cast<const float2*>(parts.values + (place + slot) * results.head_dim + column);
      sum.x = fmaf(weight, part.x, sum.x);
      sum.y = fmaf(weight, part.y, sum.y);
    }
    out[column] = rounded(sum.x * inverse, Type());
    out[column + 1] = rounded(sum.y * inverse, Type());
  }
  if (threadIdx.x == 0) {
    float* lse = results.lse + b * results.lse_batch_stride + head * results.lse_head_stride + r.first_row + i;
    *lse = log_sum(highest, total);
  }
}

}  // namespace

std::string launch_combine(const Requests& requests, const Splits& splits, const Parts& parts, const Results& results,
                           bool is_bf16, void* stream) {
  const auto kernel = is_bf16 ? combine_kernel<Bf16> : combine_kernel<Fp16>;
  return launch(kernel, unsigned(requests.batch) * unsigned(requests.rows), unsigned(results.heads), kCombineThreads, 0, stream,
                requests, splits, parts, results);
}

}  // namespace gemma4::attention
