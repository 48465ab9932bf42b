// What the functions of the C interface check alike. Each sentence begins with the function's name.
#pragma once

#include <cstdint>
#include <string>

#include "status.h"

namespace gemma4 {

inline bool is_dtype(int dtype) { return dtype == GEMMA4_BF16 || dtype == GEMMA4_FP16 || dtype == GEMMA4_FP32; }

inline bool is_aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline std::string number(int64_t value) { return std::to_string(value); }

struct Checks {
  const char* function;

  gemma4_status failed(gemma4_status status, const std::string& sentence) const {
    return fail(status, std::string(function) + ": " + sentence);
  }
  gemma4_status invalid(const std::string& sentence) const { return failed(GEMMA4_INVALID_ARGUMENT, sentence); }
  gemma4_status unsupported(const std::string& sentence) const { return failed(GEMMA4_UNSUPPORTED, sentence); }

  // What a launch came to: "" is no problem.
  gemma4_status launched(const std::string& problem) const {
    return problem.empty() ? GEMMA4_OK : failed(GEMMA4_CUDA_ERROR, problem);
  }

  // A pointer that must be there, to elements of some bytes.
  gemma4_status pointer(const char* name, const void* address, uintptr_t alignment) const {
    if (address == nullptr) return invalid(std::string(name) + " is null");
    if (is_aligned(address, alignment)) return GEMMA4_OK;
    return invalid(std::string(name) + " must be a multiple of " + number(int64_t(alignment)) + " bytes");
  }

  gemma4_status workspace(const void* address, size_t bytes, size_t wanted) const {
    if (wanted == 0) return GEMMA4_OK;
    if (bytes < wanted || address == nullptr) {
      return failed(GEMMA4_WORKSPACE_TOO_SMALL, "the workspace must have " + std::to_string(wanted) + " bytes, got " +
                                                    std::to_string(address == nullptr ? 0 : bytes));
    }
    return is_aligned(address, 16) ? GEMMA4_OK : invalid("workspace must be a multiple of 16 bytes");
  }
};

}  // namespace gemma4
