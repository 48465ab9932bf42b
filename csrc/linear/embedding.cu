// gemma4_embedding: rows of a quantised weight by token id.
//
//   ids  (m) int32 or int64        out  (m, k) bf16, fp16 or fp32, the bits of a dequantised weight's rows
//
// A thread makes 8 neighbours of one row: one word of 4-bit codes, or two words of bytes, and one scale, because a group has no
// fewer than 16 columns. A row of the 12B is 480 threads. Which kind of weight it is, all threads find out as they go: a row is
// 2 KiB, and what it takes is the way to memory and back.
//
// Operations are those of `QuantizedWeight.rows`, each rounded to fp32, and the last rounding is to the type of out.
#include "../common/eight.cuh"
#include "scales.cuh"
#include "weight_checks.h"

namespace gemma4::linear {
namespace {

constexpr int kEmbeddingThreads = 128;
constexpr int64_t kMostElements = int64_t(1) << 60;  // from the first to the last of out: no offset overflows

// The codes of eight columns. A code is a number already but for its zero point or table; bytes are signed.
__device__ __forceinline__ void load_codes(int (&codes)[kEight], const gemma4_weight& w, int64_t row, int first) {
  if (w.bits == 8) {
    const auto* bytes = static_cast<const uint32_t*>(w.codes) + (row * w.k + first) / 4;
#pragma unroll
    for (int i = 0; i < kEight; ++i) codes[i] = int32_t(__ldg(bytes + i / 4) << (24 - 8 * (i % 4))) >> 24;
    return;
  }
  const uint32_t word = __ldg(static_cast<const uint32_t*>(w.codes) + (row * w.k + first) / 8);
  // The bits above the fourth: 32 or 16 columns share a word, and neighbours of a pair are 16 bits apart in it too.
  const int more = w.bits - 4, columns = more == 0 ? 32 : 32 / more;
  uint32_t high = 0;
  if (more != 0) {
    high = __ldg(static_cast<const uint32_t*>(w.high) + (row * w.k + first) / columns) >> more * (first % columns / 2);
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const uint32_t low = word >> (16 * (i % 2) + 4 * (i / 2)) & 15;
    codes[i] = int(low | (high >> (16 * (i % 2) + more * (i / 2)) & ((1u << more) - 1)) << 4);
  }
}

__device__ __forceinline__ float plain_number(const void* numbers, int dtype, int64_t i) {
  if (dtype == GEMMA4_FP32) return __ldg(static_cast<const float*>(numbers) + i);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(numbers) + i);
  return dtype == GEMMA4_BF16 ? Bf16Scale::value(bits) : Fp16Scale::value(bits);
}

// The 6 bits of group j of 256 columns, the low four from one word and the high two from another: exact, like their products.
__device__ __forceinline__ float six_bits(uint32_t low, uint32_t high, int j) {
  return float((low >> 4 * j & 15) | (high >> 2 * j & 3) << 4);
}

// The scale of a row's group, and the offset where the weight has any.
struct Group {
  float scale, offset;
};

__device__ __forceinline__ Group load_group(const gemma4_weight& w, int64_t row, int64_t group) {
  const int64_t at = row * (w.k / w.group_size) + group;
  const int64_t super = row * (w.k / kSuperColumns) + group * w.group_size / kSuperColumns;
  switch (w.scale_kind) {
    case GEMMA4_SCALES_SIX_BIT: {
      const auto* words = static_cast<const uint32_t*>(w.group_scales) + 3 * super;
      const int j = int(group % 8);
      const uint32_t high = __ldg(words + 2);
      return {__fmul_rn(plain_number(w.scales, GEMMA4_FP16, super), six_bits(__ldg(words), high, j)),
              -__fmul_rn(plain_number(w.offsets, GEMMA4_FP16, super), six_bits(__ldg(words + 1), high >> 16, j))};
    }
    case GEMMA4_SCALES_INT8: {
      const int8_t inner = __ldg(static_cast<const int8_t*>(w.group_scales) + at);
      return {__fmul_rn(plain_number(w.scales, GEMMA4_FP16, super), float(inner)), 0};
    }
    case GEMMA4_SCALES_E8M0: return {E8m0Scale::value(__ldg(static_cast<const unsigned char*>(w.scales) + at)), 0};
    case GEMMA4_SCALES_NESTED: {
      const float number = __ldg(w.scale_table + __ldg(static_cast<const unsigned char*>(w.scales) + at));
      return {__fadd_rn(__fmul_rn(number, __ldg(w.scale_scales + at / 256)), __ldg(w.scale_offset)), 0};
    }
    default:
      return {plain_number(w.scales, w.scale_dtype, at),
              w.values == GEMMA4_OFFSETS ? plain_number(w.offsets, w.scale_dtype, at) : 0};
  }
}

template <class Type>
__global__ void __launch_bounds__(kEmbeddingThreads) embedding_kernel(const gemma4_embedding_arguments a, bool whole) {
  const gemma4_weight& w = a.weight;
  const int first = (int(blockIdx.y) * kEmbeddingThreads + int(threadIdx.x)) * kEight;
  if (first >= w.k) return;
  const int64_t row = a.ids_are_64_bit ? __ldg(static_cast<const int64_t*>(a.ids) + blockIdx.x)
                                       : __ldg(static_cast<const int32_t*>(a.ids) + blockIdx.x);
  float numbers[kEight];
  if (row < 0 || row >= w.n) {  // an id that nobody has seen
#pragma unroll
    for (int i = 0; i < kEight; ++i) numbers[i] = NAN;
  } else {
    int codes[kEight];
    load_codes(codes, w, row, first);
    const int64_t index = first / w.group_size;
    const Group group = load_group(w, row, index);
    const int zero = w.values == GEMMA4_ZEROS
                         ? __ldg(static_cast<const unsigned char*>(w.zeros) + row * (w.k / w.group_size) + index)
                     : w.values == GEMMA4_CENTRED ? w.zero
                                                  : 0;
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const float number = w.values == GEMMA4_TABLE ? __ldg(w.table + codes[i]) : float(codes[i] - zero);
      numbers[i] = __fmul_rn(group.scale, number);
      if (w.values == GEMMA4_OFFSETS) numbers[i] = __fadd_rn(numbers[i], group.offset);
    }
  }
  auto* to = static_cast<Bits<Type>*>(a.out) + blockIdx.x * a.out_stride;
  if (a.columns == nullptr) return store_eight<Type>(to, numbers, first, int(w.k), whole);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const int column = __ldg(a.columns + first + i);
    if (column >= 0 && column < w.k) to[column] = narrowed(numbers[i], Type());
  }
}

template <class Type>
std::string launch_embedding(const gemma4_embedding_arguments& a, void* stream) {
  const int64_t row_bytes = a.out_stride * int64_t(sizeof(Bits<Type>));
  const bool whole = is_aligned(a.out, 16) && (a.m == 1 || row_bytes % 16 == 0);
  const int64_t eights = a.weight.k / kEight, blocks = (eights + kEmbeddingThreads - 1) / kEmbeddingThreads;
  return launch(embedding_kernel<Type>, unsigned(a.m), unsigned(blocks), kEmbeddingThreads, 0, stream, a, whole);
}

}  // namespace
}  // namespace gemma4::linear

extern "C" gemma4_status gemma4_embedding(const gemma4_embedding_arguments* arguments, gemma4_stream stream) {
  using namespace gemma4;
  const Checks checks{"gemma4_embedding"};
  if (arguments == nullptr) return checks.invalid("arguments is null");
  const gemma4_embedding_arguments& a = *arguments;
  if (auto status = linear::check_weight(checks, a.weight)) return status;
  if (a.m < 0 || a.m > INT32_MAX) return checks.invalid("m must lie in [0, 2147483647], got " + number(a.m));
  if (!is_dtype(a.dtype)) return checks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
  if (a.m == 0) return GEMMA4_OK;
  if (auto status = checks.pointer("ids", a.ids, a.ids_are_64_bit ? 8 : 4)) return status;
  if (auto status = checks.pointer("out", a.out, uintptr_t(bytes_of(a.dtype)))) return status;
  if (!is_aligned(a.columns, 4)) return checks.invalid("columns must be a multiple of 4 bytes");
  if (a.m > 1 && (a.out_stride < a.weight.k || a.out_stride > linear::kMostElements / a.m)) {
    return checks.invalid("out_stride must be at least k = " + number(a.weight.k) + ", with m rows within 2^60 elements, got " +
                          number(a.out_stride));
  }
  auto launch_dtype = linear::launch_embedding<Fp32>;
  if (a.dtype == GEMMA4_BF16) launch_dtype = linear::launch_embedding<Bf16>;
  if (a.dtype == GEMMA4_FP16) launch_dtype = linear::launch_embedding<Fp16>;
  return checks.launched(launch_dtype(a, stream));
}
