#include "status.h"

#include "device.cuh"

namespace gemma4 {
namespace {
thread_local std::string last_error;
thread_local uint64_t launches = 0;
}  // namespace

void count_launch() { ++launches; }

gemma4_status fail(gemma4_status status, const std::string& sentence) {
  last_error = sentence;
  return status;
}

}  // namespace gemma4

extern "C" {

int32_t gemma4_abi_version(void) { return GEMMA4_ABI_VERSION; }

const char* gemma4_last_error(void) { return gemma4::last_error.c_str(); }

uint64_t gemma4_launches(void) { return gemma4::launches; }

const char* gemma4_architectures(void) { return GEMMA4_ARCHITECTURES; }

gemma4_status gemma4_check_driver(void) {
#if !defined(GEMMA4_EMULATED)
  int driver = 0;
  const auto error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return gemma4::fail(GEMMA4_CUDA_ERROR, cudaGetErrorString(error));
  if (driver == 0) return gemma4::fail(GEMMA4_CUDA_ERROR, "there is no NVIDIA driver");
  // Within a major release any driver runs what any toolkit built.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    auto words = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
    return gemma4::fail(GEMMA4_CUDA_ERROR, "the driver knows CUDA up to " + words(driver) + ", the module was built with " +
                                               words(CUDART_VERSION) + ": install a newer driver");
  }
#endif
  return GEMMA4_OK;
}

}  // extern "C"
