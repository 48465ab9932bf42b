// What is left when all blocks are done: the pieces of K, added in their order, and the largest logit of a row. Kernels of
// their own, because atomics would add in any order.
#include "decode.h"
#include "epilogue.cuh"

namespace gemma4::linear {
namespace {

constexpr int kAddThreads = 128;
constexpr int kArgmaxThreads = 256;

__device__ __forceinline__ float sum_of_pieces(const Parameters& p, int pieces, bool of_up, int row, int output) {
  float sum = 0;
  for (int piece = 0; piece < pieces; ++piece) sum += p.partial[place_of_piece(p, piece, of_up, row, output)];
  return sum;
}

// Grid (blocks of outputs, rows of x).
template <class Type>
__global__ void __launch_bounds__(kAddThreads) add_pieces_kernel(const Parameters p, int pieces) {
  const int output = blockIdx.x * kAddThreads + threadIdx.x, row = blockIdx.y;
  if (output >= p.n) return;
  const float sum = sum_of_pieces(p, pieces, false, row, output);
  auto& out = static_cast<uint16_t*>(p.out)[row * p.out_stride + output];
  if (p.result == kGeglu) {
    out = rounded(gelu_tanh(sum) * sum_of_pieces(p, pieces, true, row, output), Type());
  } else {
    out = product_of<Type>(p, row, output, sum);
  }
}

// Grid (rows of x): of so many candidates of a row the first, its index to out.
template <class Load>
__device__ __forceinline__ void store_first(const Parameters& p, int row, int count, const Load& load) {
  GEMMA4_SHARED(shared);
  auto* found = reinterpret_cast<Candidate*>(shared);  // (kArgmaxThreads)
  Candidate best = no_candidate();
  for (int i = threadIdx.x; i < count; i += kArgmaxThreads) best = first_of(best, load(i));
  found[threadIdx.x] = best;
  for (int half = kArgmaxThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) found[threadIdx.x] = first_of(found[threadIdx.x], found[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) static_cast<int64_t*>(p.out)[row] = found[0].index;
}

template <class Type>
__global__ void __launch_bounds__(kArgmaxThreads) argmax_of_pieces_kernel(const Parameters p, int pieces) {
  const int row = blockIdx.x;
  store_first(p, row, p.n, [&](int output) {
    return candidate_of<Type>(p, row, output, sum_of_pieces(p, pieces, false, row, output));
  });
}

__global__ void __launch_bounds__(kArgmaxThreads) argmax_of_blocks_kernel(const Parameters p, int blocks) {
  const int row = blockIdx.x;
  store_first(p, row, blocks, [&](int block) { return p.candidates[int64_t(row) * blocks + block]; });
}

}  // namespace

std::string launch_add_pieces(const Parameters& p, bool is_bf16, int pieces, void* stream) {
  const auto kernel = is_bf16 ? add_pieces_kernel<Bf16> : add_pieces_kernel<Fp16>;
  return launch(kernel, unsigned((p.n + kAddThreads - 1) / kAddThreads), unsigned(p.m), kAddThreads, 0, stream, p, pieces);
}

std::string launch_argmax(const Parameters& p, bool is_bf16, int pieces, void* stream) {
  const size_t bytes = kArgmaxThreads * sizeof(Candidate);
  if (pieces == 1) {
    const int blocks = int(blocks_of(p.n, kArgmax));
    return launch(argmax_of_blocks_kernel, unsigned(p.m), 1, kArgmaxThreads, bytes, stream, p, blocks);
  }
  const auto kernel = is_bf16 ? argmax_of_pieces_kernel<Bf16> : argmax_of_pieces_kernel<Fp16>;
  return launch(kernel, unsigned(p.m), 1, kArgmaxThreads, bytes, stream, p, pieces);
}

}  // namespace gemma4::linear
