#include "collectives.h"

#include <cmath>
#include <cstring>

#include "runtime.h"

namespace emulator {

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float fp16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size;
  if (exponent == 31) {
    size = mantissa ? std::nanf("") : INFINITY;
  } else if (exponent == 0) {
    size = std::ldexp(float(mantissa), -24);
  } else {
    size = std::ldexp(float(1024 + mantissa), exponent - 25);
  }
  return bits & 0x8000 ? -size : size;
}

uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t float_to_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (std::isnan(value)) return 0x7FFF;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7C00;  // halfway between the largest number and the next that there would be
  if (size < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));  // subnormal, or rounds to 2^-14
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // size = fraction * 2^exponent, fraction in [0.5, 1)
  const int mantissa = int(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 to 2048
  return sign | uint16_t(((exponent + 13) << 10) + mantissa);          // a carry out of the mantissa raises the exponent
}

uint32_t shuffle(uint32_t value, int source_lane, int line) {
  const auto* all = static_cast<const uint32_t*>(meet("shfl", line, &value, sizeof value));
  return all[source_lane % kWarp];
}

int reduce(Reduction reduction, int value, int line) {
  const auto* all = static_cast<const int*>(meet("redux", line, &value, sizeof value));
  int result = all[0];
  for (int lane = 1; lane < kWarp; ++lane) {
    const int other = all[lane];
    if (reduction == kSum) result = int(uint32_t(result) + uint32_t(other));
    if (reduction == kLargest && other > result) result = other;
    if (reduction == kSmallest && other < result) result = other;
  }
  return result;
}

void distribute_matrices(const uint32_t row[4], uint32_t out[4], int line) {
  const auto* rows = static_cast<const uint32_t*>(meet("ldmatrix", line, row, 16));
  for (int matrix = 0; matrix < 4; ++matrix) out[matrix] = rows[(8 * matrix + lane() / 4) * 4 + lane() % 4];
}

void distribute_turned_matrices(const uint32_t row[4], uint32_t out[4], int line) {
  const auto* rows = static_cast<const uint32_t*>(meet("ldmatrix", line, row, 16));
  const int column = lane() / 4, first = 2 * (lane() % 4);
  const auto element = [&](int matrix, int r) { return rows[(8 * matrix + r) * 4 + column / 2] >> 16 * (column % 2) & 0xFFFF; };
  for (int matrix = 0; matrix < 4; ++matrix) out[matrix] = element(matrix, first) | element(matrix, first + 1) << 16;
}

namespace {

struct Operands {
  uint32_t a[4], b[2];
  float c[4];
  uint32_t is_bf16;
};


float element(uint32_t pair, int half, bool is_bf16) {
  const auto bits = uint16_t(half ? pair >> 16 : pair);
  return is_bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// From the operands of all lanes to the results of all lanes, in place.
void multiply_all(void* inputs) {
  auto* operands = static_cast<Operands*>(inputs);
  const bool is_bf16 = operands[0].is_bf16 != 0;
  float A[16][16], B[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = element(operands[lane].a[i], half, is_bf16);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) B[2 * t + 8 * i + half][g] = element(operands[lane].b[i], half, is_bf16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float d[4];
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = operands[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B[k][column];
      d[i] = float(sum);
    }
    for (int i = 0; i < 4; ++i) operands[lane].c[i] = d[i];  // not memcpy: see copy_bytes in runtime.cpp
  }
}

}  // namespace

void multiply(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4], bool is_bf16, int line) {
  Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}, is_bf16};
  const auto* all = static_cast<const Operands*>(meet("mma", line, &mine, sizeof mine, multiply_all));
  for (int i = 0; i < 4; ++i) d[i] = all[lane()].c[i];
}

}  // namespace emulator
