// The sum of the pieces of K, in their order, plus the bias, rounded once: a kernel of its own, because atomics would add in any
// order.
#include "decode.h"

namespace gemma4::linear {
namespace {

constexpr int kAddThreads = 128;

template <class Type>
__global__ void __launch_bounds__(kAddThreads) add_pieces_kernel(const Parameters p, int pieces) {
  const int output = blockIdx.x * kAddThreads + threadIdx.x, row = blockIdx.y;
  if (output >= p.n) return;
  float sum = 0;
  for (int piece = 0; piece < pieces; ++piece) sum += p.partial[(int64_t(piece) * p.m + row) * p.n + output];
  static_cast<uint16_t*>(p.out)[row * p.out_stride + output] = rounded(sum + load_bias(p, output), Type());
}

}  // namespace

std::string launch_add_pieces(const Parameters& p, bool is_bf16, int pieces, void* stream) {
  const auto kernel = is_bf16 ? add_pieces_kernel<Bf16> : add_pieces_kernel<Fp16>;
  return launch(kernel, unsigned((p.n + kAddThreads - 1) / kAddThreads), unsigned(p.m), kAddThreads, 0, stream, p, pieces);
}

}  // namespace gemma4::linear
