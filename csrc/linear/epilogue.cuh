// What becomes of a block's sums when all of K, or its piece, has gone by.
//
//     a piece of K   sums to the workspace, fp32; a kernel of pieces.cu adds them in their order and goes on from there
//     product        sum + bias + residual, in fp32, rounded once
//     GeGLU          gelu(gate) * up, in fp32, rounded once; two of the warps have the one, two the other
//     argmax         the largest of the block's outputs for each row of x, each rounded as the product is
//
// All of it is decided at run time: it is done once a block, after the loop, and a kernel more for each kind of weight would be
// a kernel more to compile.
#pragma once

#include "stage.cuh"

namespace gemma4::linear {

// Which rows of a block are of up, and the output that a row is of.
__device__ __forceinline__ bool is_of_up(const Parameters& p, int block_row) {
  return p.result == kGeglu && block_row >= kPairs;
}

__device__ __forceinline__ int output_of(const Parameters& p, int block_row) {
  return p.result == kGeglu ? blockIdx.x * kPairs + block_row % kPairs : blockIdx.x * kOutputs + block_row;
}

// The numbers that are rounded ----------------------------------------------------------------------------------------

__device__ __forceinline__ float load_bias(const Parameters& p, int output) {
  if (p.bias == nullptr) return 0;
  if (p.bias_dtype == 2) return static_cast<const float*>(p.bias)[output];
  const uint16_t bits = static_cast<const uint16_t*>(p.bias)[output];
  return p.bias_dtype == 1 ? number_of(bits, Fp16()) : number_of(bits, Bf16());
}

// out of a sum. The residual may be out itself: whoever stores an element has read it.
template <class Type>
__device__ __forceinline__ uint16_t product_of(const Parameters& p, int row, int output, float sum) {
  sum += load_bias(p, output);
  if (p.residual != nullptr) {
    sum += number_of(static_cast<const uint16_t*>(p.residual)[row * p.residual_stride + output], Type());
  }
  return rounded(sum, Type());
}

// GeLU by its tanh approximation, x / 2 * (1 + tanh(u)). (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)): so written nothing cancels
// where u is negative, and the exponential, of a number that is never positive, cannot overflow.
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
  const float shrunk = expf(-2 * fabsf(u));
  return x * ((u < 0 ? shrunk : 1.0f) / (1 + shrunk));
}

template <class Type>
__device__ __forceinline__ Candidate candidate_of(const Parameters& p, int row, int output, float sum) {
  const float logit = number_of(product_of<Type>(p, row, output, sum), Type());
  return logit == logit ? Candidate{logit, output} : Candidate{INFINITY, -1};
}

// Before every logit.
__device__ __forceinline__ Candidate no_candidate() { return {-INFINITY, INT32_MAX}; }

// The larger; of equals the one with the lower index. Any order of comparisons ends with the same.
__device__ __forceinline__ Candidate first_of(Candidate a, Candidate b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The place of a sum of a piece.
__device__ __forceinline__ int64_t place_of_piece(const Parameters& p, int piece, bool of_up, int row, int output) {
  const int weights = p.result == kGeglu ? 2 : 1;
  return ((int64_t(piece) * weights + of_up) * p.m + row) * p.n + output;
}

// A block's sums ------------------------------------------------------------------------------------------------------

// Calls use(row of x, row of the block, sum) for each sum that the thread has.
template <int TILES, class Use>
__device__ __forceinline__ void for_each_sum(const float (&sums)[TILES][4], const Use& use) {
  const int lane = threadIdx.x % 32, block_row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) use(tile * kTileRows + 2 * (lane % 4) + i % 2, block_row + 8 * (i / 2), sums[tile][i]);
  }
}

// All sums of the block in shared memory, (rows of x, kOutputs), for whoever needs those of other threads.
template <int TILES>
__device__ __forceinline__ float* share(unsigned char* shared, const float (&sums)[TILES][4]) {
  auto* all = reinterpret_cast<float*>(shared);
  __syncthreads();  // everyone has left the ring
  for_each_sum<TILES>(sums, [&](int row, int block_row, float sum) { all[row * kOutputs + block_row] = sum; });
  __syncthreads();
  return all;
}

template <class Type, int TILES>
__device__ __forceinline__ void store_geglu(const Parameters& p, unsigned char* shared, const float (&sums)[TILES][4]) {
  const float* all = share<TILES>(shared, sums);
  const int block_row = threadIdx.x % kPairs, output = output_of(p, block_row);
  if (output >= p.n) return;
#pragma unroll 1  // a small loop: it is not where time goes
  for (int row = threadIdx.x / kPairs; row < p.m; row += kThreads / kPairs) {
    const float* gate = all + row * kOutputs + block_row;
    static_cast<uint16_t*>(p.out)[row * p.out_stride + output] = rounded(gelu_tanh(gate[0]) * gate[kPairs], Type());
  }
}

template <class Type, int TILES>
__device__ __forceinline__ void store_candidate(const Parameters& p, unsigned char* shared, const float (&sums)[TILES][4]) {
  constexpr int ROWS = TILES * kTileRows, THREADS = kThreads / ROWS;  // of a row of x
  const float* all = share<TILES>(shared, sums);
  auto* found = reinterpret_cast<Candidate*>(shared + ROWS * kOutputs * sizeof(float));  // (rows of x, THREADS)
  const int row = threadIdx.x / THREADS, place = threadIdx.x % THREADS;
  Candidate best = no_candidate();
#pragma unroll 1
  for (int block_row = place; block_row < kOutputs; block_row += THREADS) {
    const int output = output_of(p, block_row);
    if (output < p.n && row < p.m) best = first_of(best, candidate_of<Type>(p, row, output, all[row * kOutputs + block_row]));
  }
  found[threadIdx.x] = best;
  __syncthreads();
  if (place != 0 || row >= p.m) return;
#pragma unroll 1
  for (int i = 1; i < THREADS; ++i) best = first_of(best, found[threadIdx.x + i]);
  p.candidates[int64_t(row) * gridDim.x + blockIdx.x] = best;
}

// `shared` is what the ring lay in; no copy to it is under way.
template <class Type, int TILES>
__device__ __forceinline__ void finish(const Parameters& p, int piece, unsigned char* shared, const float (&sums)[TILES][4]) {
  if (p.partial != nullptr) {
    for_each_sum<TILES>(sums, [&](int row, int block_row, float sum) {
      const int output = output_of(p, block_row);
      if (row < p.m && output < p.n) p.partial[place_of_piece(p, piece, is_of_up(p, block_row), row, output)] = sum;
    });
  } else if (p.result == kGeglu) {
    store_geglu<Type, TILES>(p, shared, sums);
  } else if (p.result == kArgmax) {
    store_candidate<Type, TILES>(p, shared, sums);
  } else {
    for_each_sum<TILES>(sums, [&](int row, int block_row, float sum) {
      const int output = output_of(p, block_row);
      if (row >= p.m || output >= p.n) return;
      static_cast<uint16_t*>(p.out)[row * p.out_stride + output] = product_of<Type>(p, row, output, sum);
    });
  }
}

}  // namespace gemma4::linear
