// CUDA's runtime, or the emulator in its place: what a source file includes first, and how it launches a kernel.
#pragma once

#include <cstddef>
#include <string>

#if defined(GEMMA4_EMULATED)
#include "../emulator/device.h"
// The dynamic shared memory of the block, under a name.
#define GEMMA4_SHARED(name) auto* name = static_cast<unsigned char*>(::emulator::shared_memory())
#else
#include <cuda_runtime.h>
#define GEMMA4_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include "ptx.cuh"

namespace gemma4 {

// Shared memory of a block that needs no leave, and the most there is on sm_86, sm_89 and sm_120.
constexpr size_t kPlainSharedBytes = 48 * 1024;
constexpr size_t kMostSharedBytes = 101376;

// Adds one to what gemma4_launches says.
void count_launch();

// What went wrong, or "". Does not wait for the kernel. `kernel` is a pointer to a __global__ function, in both worlds.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), unsigned grid_x, unsigned grid_y, unsigned threads, size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
#if defined(GEMMA4_EMULATED)
  (void)stream;
  // Reading a kernel's parameters is nothing that it does to memory.
  const auto body = [&]() GEMMA4_UNCOUNTED { kernel(arguments...); };
  count_launch();
  return emulator::launch(body, {grid_x, grid_y, 1}, {threads, 1, 1}, shared_bytes, reinterpret_cast<const void*>(kernel));
#else
  if (shared_bytes > kPlainSharedBytes) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(grid_x, grid_y), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const auto error = cudaGetLastError();
  if (error == cudaSuccess) count_launch();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
#endif
}

// Multiprocessors of the current device; under the emulator those of an RTX 3060. What went wrong, or "".
inline std::string multiprocessors(int* count) {
#if defined(GEMMA4_EMULATED)
  *count = 28;
  return "";
#else
  int device = 0;
  auto error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
#endif
}

}  // namespace gemma4
