// The C interface from C++, with no Python and no torch: a Q4_0-like weight times a few rows.
//
//     g++ -std=c++17 -I csrc/include examples/c_interface.cpp -L build/csrc -lgemma4_kernels ...
//
// `python -m pytest tests/cuda/test_c_interface.py` builds it twice: against the library for GPUs, and against the emulated one,
// which takes pointers of the CPU (GEMMA4_EMULATED) and so runs anywhere.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "gemma4_kernels.h"

// A runtime has its own way to device memory; this one stays on the CPU, so it only asks where there is no emulator.
#if defined(GEMMA4_EMULATED)
constexpr bool kHostMemory = true;
#else
constexpr bool kHostMemory = false;
#endif

static uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);  // the numbers here are exact in bf16
}

int main() {
  std::printf("gemma4_kernels, C interface %d, machine code for \"%s\"\n", gemma4_abi_version(), gemma4_architectures());
  const int64_t n = 96, k = 320, m = 3;
  // Code 9 everywhere and scale 0.5: every weight is 0.5 * (9 - 8).
  std::vector<uint32_t> codes(n * k / 8 + 4, 0x99999999u);
  std::vector<uint16_t> scales(n * k / 32, 0x3800), x(m * k + 8, 0), out(m * n, 0);
  auto aligned = [](auto& values) {
    auto address = reinterpret_cast<uintptr_t>(values.data());
    return reinterpret_cast<decltype(values.data())>((address + 15) / 16 * 16);
  };
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < k; ++column) aligned(x)[row * k + column] = bf16(float(row + 1));
  }
  gemma4_linear_arguments arguments = {};
  arguments.weight.n = n;
  arguments.weight.k = k;
  arguments.weight.group_size = 32;
  arguments.weight.codes = aligned(codes);
  arguments.weight.scales = scales.data();
  arguments.weight.scale_dtype = GEMMA4_FP16;
  arguments.weight.bits = 4;
  arguments.weight.values = GEMMA4_CENTRED;
  arguments.weight.zero = 8;
  arguments.m = m;
  arguments.x = aligned(x);
  arguments.x_stride = k;
  arguments.out = out.data();
  arguments.out_stride = n;
  arguments.dtype = GEMMA4_BF16;

  arguments.weight.k = 321;
  size_t bytes = 0;
  gemma4_status status = gemma4_linear_workspace(&arguments, &bytes);
  std::printf("a bad size: status %d, \"%s\"\n", status, gemma4_last_error());
  arguments.weight.k = k;
  if (status != GEMMA4_INVALID_ARGUMENT) return 1;

  if (gemma4_check_driver() != GEMMA4_OK) {
    std::printf("no GPU to run on: %s\n", gemma4_last_error());
    return 0;
  }
  if (!kHostMemory) return 0;  // with memory of the device in place of the vectors, what follows is the same
  if (gemma4_linear_workspace(&arguments, &bytes) != GEMMA4_OK) return 1;
  std::vector<float> workspace(bytes / sizeof(float) + 4);
  if (gemma4_linear(&arguments, aligned(workspace), bytes, nullptr) != GEMMA4_OK) {
    std::printf("%s\n", gemma4_last_error());
    return 1;
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t output = 0; output < n; ++output) {
      if (out[row * n + output] != bf16(0.5f * float(row + 1) * float(k))) return 1;
    }
  }
  std::printf("%lld x %lld outputs, all as they should be\n", (long long)m, (long long)n);
  return 0;
}
