// Buffers of the programs here, and the numbers in them: heap blocks of exactly their size, so that AddressSanitizer sees the
// first byte beyond.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../../csrc/emulator/collectives.h"
#include "../../csrc/include/gemma4_kernels.h"

namespace checks {

// A heap block with its first byte at a multiple of 16, filled with NaN.
struct Block {
  explicit Block(size_t bytes) : size(bytes), data(static_cast<unsigned char*>(std::aligned_alloc(16, round(bytes)))) {
    // aligned_alloc wants whole multiples; AddressSanitizer is told of the rest by giving it back.
    if (void* exact = bytes != 0 ? std::realloc(data, bytes) : nullptr) data = static_cast<unsigned char*>(exact);
    std::memset(data, 0xFF, size);
  }
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  static size_t round(size_t bytes) { return std::max<size_t>(16, (bytes + 15) / 16 * 16); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  bool is_untouched() const {
    return std::all_of(data, data + size, [](unsigned char byte) { return byte == 0xFF; });
  }
  size_t size;
  unsigned char* data;
};

inline uint16_t to_half(float value, int dtype) {
  return dtype == GEMMA4_BF16 ? emulator::float_to_bf16(value) : emulator::float_to_fp16(value);
}

inline float from_half(uint16_t bits, int dtype) {
  return dtype == GEMMA4_BF16 ? emulator::bf16_to_float(bits) : emulator::fp16_to_float(bits);
}

inline void put(Block& block, int64_t i, float value, int dtype) {
  if (dtype == GEMMA4_FP32) {
    std::memcpy(block.data + 4 * i, &value, 4);
  } else {
    const uint16_t bits = to_half(value, dtype);
    std::memcpy(block.data + 2 * i, &bits, 2);
  }
}

inline float get(const Block& block, int64_t i, int dtype) {
  if (dtype == GEMMA4_FP32) {
    float value;
    std::memcpy(&value, block.data + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, block.data + 2 * i, 2);
  return from_half(bits, dtype);
}

inline int64_t bytes_of(int dtype) { return dtype == GEMMA4_FP32 ? 4 : 2; }

}  // namespace checks
