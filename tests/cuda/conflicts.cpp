// Kernels whose accesses are known: what the counted build of the emulator must count of them, exactly.
//
//   conflicts NAME    runs one and prints its counts, as emulator/counts.h gives them
//   conflicts         prints the names
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>

#include "../../csrc/common/device.cuh"

using namespace gemma4;

namespace {

constexpr int kRow = 128;  // bytes: all banks once
constexpr size_t kSharedBytes = 64 * kRow;

// Each lane reads the word that is STRIDE * (lane % LANES) from the first.
template <int STRIDE, int LANES>
__global__ void words(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<const uint32_t*>(memory)[threadIdx.x % LANES * STRIDE];
}

template <int STRIDE>
__global__ void stores(const uint32_t*, uint32_t*) {
  GEMMA4_SHARED(memory);
  reinterpret_cast<uint32_t*>(memory)[threadIdx.x * STRIDE] = threadIdx.x;
}

__global__ void bytes(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  out[threadIdx.x] = memory[threadIdx.x];
}

// Chunk 0 of each row of 128 bytes, or (PERMUTED) where it stands if chunk c of row r is at c ^ (r % 8).
template <bool PERMUTED>
__device__ const unsigned char* chunk(const unsigned char* memory) {
  const int row = threadIdx.x % 32;
  return memory + row * kRow + (PERMUTED ? row % 8 * 16 : 0);
}

template <bool PERMUTED>
__global__ void chunks(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  const uint4 loaded = *reinterpret_cast<const uint4*>(chunk<PERMUTED>(memory));
  out[threadIdx.x] = loaded.x + loaded.w;
}

template <bool PERMUTED>
__global__ void chunk_stores(const uint32_t*, uint32_t*) {
  GEMMA4_SHARED(memory);
  *reinterpret_cast<uint4*>(const_cast<unsigned char*>(chunk<PERMUTED>(memory))) = make_uint4(1, 2, 3, threadIdx.x);
}

template <bool PERMUTED>
__global__ void matrices(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  uint32_t got[4];
  ptx::load_matrices(got, chunk<PERMUTED>(memory));
  out[threadIdx.x] = got[0] + got[3];
}

template <bool PERMUTED>
__global__ void copies(const uint32_t* in, uint32_t*) {
  GEMMA4_SHARED(memory);
  ptx::copy_16(const_cast<unsigned char*>(chunk<PERMUTED>(memory)), in + 4 * threadIdx.x, 16);
  ptx::commit();
  ptx::wait<0>();
}

// The upper half of the lanes copies nothing: zeros in shared memory, and nothing is read.
__global__ void copies_of_some(const uint32_t* in, uint32_t*) {
  GEMMA4_SHARED(memory);
  ptx::copy_16(memory + 16 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x < 16 ? 16 : 0);
  ptx::commit();
  ptx::wait<0>();
}

__global__ void pairs(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  const float2 loaded = reinterpret_cast<const float2*>(memory)[threadIdx.x];
  out[threadIdx.x] = __float_as_uint(loaded.x) + __float_as_uint(loaded.y);
}

// Four lanes store what the others do not.
__global__ void pairs_of_some(const uint32_t*, uint32_t*) {
  GEMMA4_SHARED(memory);
  if (threadIdx.x < 4) reinterpret_cast<float2*>(memory)[threadIdx.x] = {1, float(threadIdx.x)};
}

// Four instructions from one place, of which the last two meet banks twice; a lane's first is no other's second.
__global__ void loop(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += reinterpret_cast<const uint32_t*>(memory)[threadIdx.x * (1 + i / 2)];
  out[threadIdx.x] = sum;
}

// Two warps of two blocks; a barrier parts the passes, which are of other strides.
__global__ void barriers(const uint32_t*, uint32_t* out) {
  GEMMA4_SHARED(memory);
  uint32_t sum = 0;
  for (int stride = 1; stride <= 4; stride *= 2) {
    sum += reinterpret_cast<const uint32_t*>(memory)[threadIdx.x % 32 * stride];
    __syncthreads();
  }
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}

// The elements that are STRIDE apart.
template <int STRIDE>
__global__ void global_words(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x * STRIDE] = in[threadIdx.x * STRIDE];
}

__global__ void global_one(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[5]; }

// From the middle of a sector on.
__global__ void global_shifted(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[threadIdx.x + 4]; }

__global__ void global_chunks(const uint32_t* in, uint32_t* out) {
  reinterpret_cast<uint4*>(out)[threadIdx.x] = __ldg(reinterpret_cast<const uint4*>(in) + threadIdx.x);
}

__global__ void global_halves(const uint32_t* in, uint32_t* out) {
  reinterpret_cast<uint16_t*>(out)[threadIdx.x] = reinterpret_cast<const uint16_t*>(in)[16 * threadIdx.x];
}

using Kernel = void (*)(const uint32_t*, uint32_t*);
struct Program {
  Kernel kernel;
  unsigned blocks = 1, threads = 32;
};

std::map<std::string, Program> programs() {
  return {
      {"words", {words<1, 32>}},
      {"two-way", {words<2, 32>}},
      {"thirty-two-way", {words<32, 32>}},
      {"broadcast", {words<1, 1>}},
      {"word-twice", {words<1, 16>}},
      {"row-thrice", {words<32, 3>}},
      {"stores", {stores<1>}},
      {"stores-four-way", {stores<4>}},
      {"bytes", {bytes}},
      {"chunks", {chunks<false>}},
      {"chunks-permuted", {chunks<true>}},
      {"chunk-stores", {chunk_stores<false>}},
      {"chunk-stores-permuted", {chunk_stores<true>}},
      {"matrices", {matrices<false>}},
      {"matrices-permuted", {matrices<true>}},
      {"copies", {copies<false>}},
      {"copies-permuted", {copies<true>}},
      {"copies-of-some", {copies_of_some}},
      {"pairs", {pairs}},
      {"pairs-of-some", {pairs_of_some}},
      {"loop", {loop}},
      {"barriers", {barriers, 2, 64}},
      {"global-words", {global_words<1>}},
      {"global-strided", {global_words<8>}},
      {"global-one", {global_one}},
      {"global-shifted", {global_shifted}},
      {"global-chunks", {global_chunks}},
      {"global-halves", {global_halves}},
  };
}

// At the start of a sector, as the GPU's allocator gives it.
uint32_t* buffer() { return static_cast<uint32_t*>(std::aligned_alloc(128, 4096)); }

}  // namespace

int main(int count, char** arguments) {
  const auto all = programs();
  if (count < 2) {
    for (const auto& [name, program] : all) std::printf("%s\n", name.c_str());
    return 0;
  }
  const Program& program = all.at(arguments[1]);
  const uint32_t* in = buffer();
  const std::string failure =
      launch(program.kernel, program.blocks, 1, program.threads, kSharedBytes, nullptr, in, buffer());
  if (!failure.empty()) return std::printf("%s\n", failure.c_str()), 2;
  std::printf("%s", emulator::take_counts_as_text().c_str());
  return 0;
}
