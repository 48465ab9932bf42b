// Sizes first, because alignments follow from them; then what each kind of codes, values and scales wants; then which of them go
// together, which is what decode_instances.cuh has.
#include "weight_checks.h"

#include <cstdint>

#include "stage.cuh"

namespace gemma4::linear {
namespace {

constexpr int64_t kMostColumns = 1 << 20;               // see group_of
constexpr int64_t kMostOutputs = INT32_MAX - kOutputs;  // block numbers times kOutputs are ints

// A tensor that there is for one kind of weight and for no other.
gemma4_status only_for(const Checks& checks, const char* name, const void* address, uintptr_t alignment, bool wanted,
                       const char* kind) {
  if (wanted != (address != nullptr)) return checks.invalid(std::string(name) + " must be there for " + kind + ", else null");
  if (is_aligned(address, alignment)) return GEMMA4_OK;
  return checks.invalid(std::string(name) + " must be a multiple of " + number(int64_t(alignment)) + " bytes");
}

gemma4_status check_sizes_of(const Checks& checks, const gemma4_weight& w) {
  if (w.n < 1 || w.n > kMostOutputs) return checks.invalid("n must lie in [1, " + number(kMostOutputs) + "], got " + number(w.n));
  if (w.k < 32 || w.k % 32 != 0 || w.k > kMostColumns) {
    return checks.invalid("k must be a multiple of 32 in [32, " + number(kMostColumns) + "], got " + number(w.k));
  }
  if (w.bits != 4 && w.bits != 5 && w.bits != 6 && w.bits != 8) {
    return checks.invalid("bits must be 4, 5, 6 or 8, got " + number(w.bits));
  }
  if (w.bits == 6 && w.group_size != 16) return checks.invalid("group_size of 6 bits must be 16, got " + number(w.group_size));
  if (w.bits != 6 && (w.group_size < 32 || w.group_size % 32 != 0 || w.k % w.group_size != 0)) {
    return checks.invalid("group_size must be a multiple of 32 that divides k = " + number(w.k) + ", got " + number(w.group_size));
  }
  return GEMMA4_OK;
}

gemma4_status check_codes(const Checks& checks, const gemma4_weight& w) {
  if (auto status = checks.pointer("codes", w.codes, 16)) return status;
  return only_for(checks, "high", w.high, 16, w.bits == 5 || w.bits == 6, "5 and 6 bits");
}

gemma4_status check_values(const Checks& checks, const gemma4_weight& w) {
  if (w.values < GEMMA4_CENTRED || w.values > GEMMA4_TABLE) {
    return checks.unsupported("values " + number(w.values) + " has no kernel in this version");
  }
  const uintptr_t bytes = w.scale_dtype == GEMMA4_FP32 ? 4 : 2;
  if (auto status = only_for(checks, "zeros", w.zeros, 1, w.values == GEMMA4_ZEROS, "GEMMA4_ZEROS")) return status;
  if (auto status = only_for(checks, "offsets", w.offsets, bytes, w.values == GEMMA4_OFFSETS, "GEMMA4_OFFSETS")) return status;
  if (auto status = only_for(checks, "table", w.table, 4, w.values == GEMMA4_TABLE, "GEMMA4_TABLE")) return status;
  const int most = w.bits == 8 ? 0 : 1 << w.bits;
  if (w.values == GEMMA4_CENTRED && (w.zero < 0 || w.zero > most)) {
    return checks.invalid("zero must lie in [0, " + number(most) + "], got " + number(w.zero));
  }
  return GEMMA4_OK;
}

gemma4_status check_scales(const Checks& checks, const gemma4_weight& w) {
  const int kind = w.scale_kind;
  if (kind < GEMMA4_SCALES_PLAIN || kind > GEMMA4_SCALES_NESTED) {
    return checks.unsupported("scale_kind " + number(kind) + " has no kernel in this version");
  }
  if (!is_dtype(w.scale_dtype)) return checks.invalid("scale_dtype " + number(w.scale_dtype) + " is no gemma4_dtype");
  const bool six_bit = kind == GEMMA4_SCALES_SIX_BIT, int8 = kind == GEMMA4_SCALES_INT8, nested = kind == GEMMA4_SCALES_NESTED;
  const uintptr_t bytes = kind == GEMMA4_SCALES_E8M0 || nested ? 1 : w.scale_dtype == GEMMA4_FP32 ? 4 : 2;
  if (auto status = checks.pointer("scales", w.scales, bytes)) return status;
  const char* in_two = "six-bit and int8 scales";
  if (auto status = only_for(checks, "group_scales", w.group_scales, 4, six_bit || int8, in_two)) return status;
  if (auto status = only_for(checks, "scale_table", w.scale_table, 4, nested, "nested scales")) return status;
  if (auto status = only_for(checks, "scale_scales", w.scale_scales, 4, nested, "nested scales")) return status;
  if (auto status = only_for(checks, "scale_offset", w.scale_offset, 4, nested, "nested scales")) return status;
  const bool groups_fit = w.bits == 6 || w.group_size == 32;
  if ((six_bit || int8) && (w.k % kSuperColumns != 0 || !groups_fit || w.scale_dtype != GEMMA4_FP16)) {
    return checks.invalid("six-bit and int8 scales go with groups of 32 (6 bits: 16), k a multiple of 256, and fp16");
  }
  return GEMMA4_OK;
}

// Which kinds have a kernel together.
bool has_kernel(const gemma4_weight& w) {
  const bool plain = w.scale_kind == GEMMA4_SCALES_PLAIN, six_bit = w.scale_kind == GEMMA4_SCALES_SIX_BIT;
  const bool fp16 = w.scale_dtype == GEMMA4_FP16;
  switch (w.bits) {
    case 8: return plain && fp16 && w.values == GEMMA4_CENTRED;
    case 6: return w.scale_kind == GEMMA4_SCALES_INT8 && w.values == GEMMA4_CENTRED;
    case 5: return (plain && fp16 && w.values == GEMMA4_CENTRED) || ((plain || six_bit) && fp16 && w.values == GEMMA4_OFFSETS);
    default: break;
  }
  if (plain) return w.values != GEMMA4_TABLE || w.scale_dtype != GEMMA4_BF16;
  return w.values == (six_bit ? GEMMA4_OFFSETS : GEMMA4_TABLE);
}

}  // namespace

gemma4_status check_weight(const Checks& checks, const gemma4_weight& w) {
  if (auto status = check_sizes_of(checks, w)) return status;
  if (auto status = check_codes(checks, w)) return status;
  if (auto status = check_values(checks, w)) return status;
  if (auto status = check_scales(checks, w)) return status;
  if (!has_kernel(w)) {
    return checks.unsupported("no kernel has codes of " + number(w.bits) + " bits with values " + number(w.values) +
                              ", scale_kind " + number(w.scale_kind) + " and scale_dtype " + number(w.scale_dtype));
  }
  return GEMMA4_OK;
}

}  // namespace gemma4::linear
