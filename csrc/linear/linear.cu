// gemma4_linear and gemma4_linear_workspace: what they accept, and how K is cut.
#include <cstdint>

#include "../common/checks.h"
#include "decode.h"

namespace gemma4::linear {
namespace {

constexpr int64_t kMostRows = 16;
constexpr int64_t kMostColumns = 1 << 20;                // see group_of
constexpr int64_t kMostOutputs = INT32_MAX - kOutputs;   // block numbers times kOutputs are ints
constexpr int64_t kMostStride = int64_t(1) << 40;        // 16 rows of it are no overflow
constexpr int kFewestStages = 4;                         // of a piece: the ring takes two of them to fill
constexpr int kBlocksOfMultiprocessor = 2;               // that are resident at a time, by shared memory

constexpr Checks kChecks{"gemma4_linear"};

// What goes with a kind of scales.
gemma4_status check_scale_kind(const gemma4_weight& w) {
  const bool six_bit = w.scale_kind == GEMMA4_SCALES_SIX_BIT, int8 = w.scale_kind == GEMMA4_SCALES_INT8;
  const bool e8m0 = w.scale_kind == GEMMA4_SCALES_E8M0;
  if (w.scale_kind != GEMMA4_SCALES_PLAIN && !six_bit && !int8 && !e8m0) {
    return kChecks.unsupported("scale_kind " + number(w.scale_kind) + " has no kernel in this version");
  }
  if ((six_bit || int8) != (w.group_scales != nullptr)) {
    return kChecks.invalid("group_scales must be there for six-bit and int8 scales, else null");
  }
  if (!is_aligned(w.group_scales, 4)) return kChecks.invalid("group_scales must be a multiple of 4 bytes");
  if ((six_bit || int8) && (w.k % kColumns != 0 || w.group_size != 32 || w.scale_dtype != GEMMA4_FP16)) {
    return kChecks.invalid("six-bit and int8 scales go with groups of 32, k a multiple of 256, and fp16");
  }
  const bool fits = six_bit ? w.values == GEMMA4_OFFSETS : int8 || e8m0 ? w.values == GEMMA4_TABLE : true;
  const bool bf16_table = w.values == GEMMA4_TABLE && !e8m0 && w.scale_dtype == GEMMA4_BF16;
  if (!fits || bf16_table) {
    return kChecks.unsupported("no kernel has these scales with values " + number(w.values));
  }
  return GEMMA4_OK;
}

gemma4_status check_weight(const gemma4_weight& w) {
  if (w.n < 1 || w.n > kMostOutputs) return kChecks.invalid("n must lie in [1, " + number(kMostOutputs) + "], got " + number(w.n));
  if (w.k < 32 || w.k % 32 != 0 || w.k > kMostColumns) {
    return kChecks.invalid("k must be a multiple of 32 in [32, " + number(kMostColumns) + "], got " + number(w.k));
  }
  if (w.group_size < 32 || w.group_size % 32 != 0 || w.k % w.group_size != 0) {
    return kChecks.invalid("group_size must be a multiple of 32 that divides k = " + number(w.k) + ", got " + number(w.group_size));
  }
  if (!is_dtype(w.scale_dtype)) return kChecks.invalid("scale_dtype " + number(w.scale_dtype) + " is no gemma4_dtype");
  if (w.values < GEMMA4_CENTRED || w.values > GEMMA4_TABLE) {
    return kChecks.unsupported("values " + number(w.values) + " has no kernel in this version");
  }
  if (auto status = kChecks.pointer("codes", w.codes, 16)) return status;
  const uintptr_t bytes = w.scale_kind == GEMMA4_SCALES_E8M0 ? 1 : w.scale_dtype == GEMMA4_FP32 ? 4 : 2;
  if (auto status = kChecks.pointer("scales", w.scales, bytes)) return status;
  if ((w.values == GEMMA4_ZEROS) != (w.zeros != nullptr)) return kChecks.invalid("zeros must be there for GEMMA4_ZEROS, else null");
  if ((w.values == GEMMA4_OFFSETS) != (w.offsets != nullptr)) return kChecks.invalid("offsets must be there for GEMMA4_OFFSETS, else null");
  if ((w.values == GEMMA4_TABLE) != (w.table != nullptr)) return kChecks.invalid("table must be there for GEMMA4_TABLE, else null");
  if (!is_aligned(w.table, 4)) return kChecks.invalid("table is not aligned to its elements");
  if (!is_aligned(w.offsets, bytes)) return kChecks.invalid("offsets is not aligned to its elements");
  if (w.values == GEMMA4_CENTRED && (w.zero < 0 || w.zero > 16)) return kChecks.invalid("zero must lie in [0, 16], got " + number(w.zero));
  return check_scale_kind(w);
}

gemma4_status check_sizes(const gemma4_linear_arguments* arguments) {
  if (arguments == nullptr) return kChecks.invalid("arguments is null");
  const gemma4_linear_arguments& a = *arguments;
  if (a.m < 0) return kChecks.invalid("m must be at least 0, got " + number(a.m));
  if (auto status = check_weight(a.weight)) return status;
  if (a.m > kMostRows) return kChecks.unsupported("m goes to 16, got " + number(a.m));
  if (a.pieces < 0) return kChecks.invalid("pieces must be at least 0, got " + number(a.pieces));
  if (!is_dtype(a.dtype)) return kChecks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
  if (a.dtype == GEMMA4_FP32) return kChecks.unsupported("x must be bf16 or fp16");
  return GEMMA4_OK;
}

gemma4_status check(const gemma4_linear_arguments* arguments) {
  if (auto status = check_sizes(arguments)) return status;
  const gemma4_linear_arguments& a = *arguments;
  if (a.m == 0) return GEMMA4_OK;
  if (auto status = kChecks.pointer("x", a.x, 16)) return status;
  if (auto status = kChecks.pointer("out", a.out, 2)) return status;
  if (a.x_stride < a.weight.k || a.x_stride % 8 != 0 || a.x_stride > kMostStride) {
    return kChecks.invalid("x_stride must be a multiple of 8, at least k = " + number(a.weight.k) + ", got " + number(a.x_stride));
  }
  if (a.out_stride < a.weight.n || a.out_stride > kMostStride) {
    return kChecks.invalid("out_stride must be at least n = " + number(a.weight.n) + ", got " + number(a.out_stride));
  }
  if (a.bias != nullptr) {
    if (!is_dtype(a.bias_dtype)) return kChecks.invalid("bias_dtype " + number(a.bias_dtype) + " is no gemma4_dtype");
    if (!is_aligned(a.bias, a.bias_dtype == GEMMA4_FP32 ? 4 : 2)) return kChecks.invalid("bias is not aligned to its elements");
  }
  return GEMMA4_OK;
}

int stages_of_weight(const gemma4_weight& w) { return int((w.k + kColumns - 1) / kColumns); }

// Stages of a piece: as many as make the pieces that the caller asks for. Unasked, K is halved until there are two blocks for
// every multiprocessor, or pieces get short: that depends on the weight's shape and the device only, never on x.
// gemma4_kernels/linear/cuda_table.py has the twin.
int piece_stages(const gemma4_linear_arguments& a, int multiprocessors) {
  const gemma4_weight& w = a.weight;
  int stages = stages_of_weight(w);
  if (a.pieces > 0) return a.pieces < stages ? (stages + a.pieces - 1) / a.pieces : 1;
  const int64_t blocks = (w.n + kOutputs - 1) / kOutputs;
  int pieces = 1;
  while (blocks * pieces < int64_t(kBlocksOfMultiprocessor) * multiprocessors && stages >= 2 * kFewestStages) {
    pieces *= 2;
    stages = (stages + 1) / 2;
  }
  return stages;
}

int pieces_of(const gemma4_weight& w, int stages) { return (stages_of_weight(w) + stages - 1) / stages; }

size_t workspace_bytes_of(const gemma4_linear_arguments& a, int pieces) {
  return pieces == 1 ? 0 : size_t(pieces) * size_t(a.m) * size_t(a.weight.n) * sizeof(float);
}

gemma4_status run(const gemma4_linear_arguments& a, void* workspace, size_t workspace_bytes, gemma4_stream stream) {
  int count = 0;
  if (auto problem = multiprocessors(&count); !problem.empty()) return kChecks.launched(problem);
  const gemma4_weight& w = a.weight;
  const int stages = piece_stages(a, count), pieces = pieces_of(w, stages);
  const size_t wanted = workspace_bytes_of(a, pieces);
  if (auto status = kChecks.workspace(workspace, workspace_bytes, wanted)) return status;
  Parameters p{};
  p.codes = static_cast<const unsigned char*>(w.codes);
  p.scales = w.scales;
  p.shifts = w.values == GEMMA4_OFFSETS ? w.offsets : w.zeros;
  p.group_scales = w.group_scales;
  p.table = w.table;
  p.x = static_cast<const unsigned char*>(a.x);
  p.out = a.out;
  p.bias = a.bias;
  p.partial = pieces == 1 ? nullptr : static_cast<float*>(workspace);
  p.x_stride = 2 * a.x_stride;
  p.out_stride = a.out_stride;
  p.n = int(w.n);
  p.k = int(w.k);
  p.m = int(a.m);
  p.groups = int(w.k / w.group_size);
  p.piece_stages = stages;
  const auto blocks_of_group = uint32_t(w.group_size / 32);
  p.group_inverse = ((1u << 31) + blocks_of_group - 1) / blocks_of_group;
  p.zero = w.values == GEMMA4_CENTRED ? uint32_t(w.zero) : 0;
  p.bias_dtype = a.bias_dtype;
  const bool is_bf16 = a.dtype == GEMMA4_BF16;
  auto launch_kind = is_bf16 ? launch_bf16 : launch_fp16;
  if (w.values == GEMMA4_OFFSETS) launch_kind = is_bf16 ? launch_offsets_bf16 : launch_offsets_fp16;
  if (w.values == GEMMA4_TABLE) launch_kind = is_bf16 ? launch_table_bf16 : launch_table_fp16;
  auto problem = launch_kind(p, {w.values, w.scale_kind, w.scale_dtype}, pieces, stream);
  if (problem.empty() && pieces > 1) problem = launch_add_pieces(p, is_bf16, pieces, stream);
  return kChecks.launched(problem);
}

}  // namespace
}  // namespace gemma4::linear

extern "C" {

gemma4_status gemma4_linear_workspace(const gemma4_linear_arguments* arguments, size_t* bytes) {
  using namespace gemma4::linear;
  if (bytes == nullptr) return kChecks.invalid("bytes is null");
  *bytes = 0;
  if (auto status = check_sizes(arguments)) return status;
  int count = 0;
  if (auto problem = gemma4::multiprocessors(&count); !problem.empty()) return kChecks.launched(problem);
  *bytes = workspace_bytes_of(*arguments, pieces_of(arguments->weight, piece_stages(*arguments, count)));
  return GEMMA4_OK;
}

gemma4_status gemma4_linear(const gemma4_linear_arguments* arguments, void* workspace, size_t workspace_bytes,
                            gemma4_stream stream) {
  using namespace gemma4::linear;
  if (auto status = check(arguments)) return status;
  if (arguments->m == 0) return GEMMA4_OK;
  return run(*arguments, workspace, workspace_bytes, stream);
}

}  // extern "C"
