// gemma4_linear and its fused forms: what they accept, and how K is cut.
#include <cstdint>

#include "decode.h"
#include "weight_checks.h"

namespace gemma4::linear {
namespace {

constexpr int64_t kMostRows = 16;
constexpr int64_t kMostStride = int64_t(1) << 40;  // 16 rows of it are no overflow
constexpr int kFewestStages = 4;                   // of a piece: the ring takes two of them to fill
constexpr int kBlocksOfMultiprocessor = 2;         // that are resident at a time, by shared memory

// What the functions here have in common: a weight, the gate where there are two, and x.
struct Call {
  Checks checks;
  const gemma4_weight& weight;
  const gemma4_weight* up;  // for kGeglu
  Result result;
  int64_t m, x_stride;
  const void* x;
  int32_t dtype, pieces;
};

Call call_of(const gemma4_linear_arguments& a) {
  return {{"gemma4_linear"}, a.weight, nullptr, kProduct, a.m, a.x_stride, a.x, a.dtype, a.pieces};
}
Call call_of(const gemma4_linear_geglu_arguments& a) {
  return {{"gemma4_linear_geglu"}, a.gate, &a.up, kGeglu, a.m, a.x_stride, a.x, a.dtype, a.pieces};
}
Call call_of(const gemma4_linear_argmax_arguments& a) {
  return {{"gemma4_linear_argmax"}, a.weight, nullptr, kArgmax, a.m, a.x_stride, a.x, a.dtype, a.pieces};
}

// One kernel reads both weights, and cuts them alike.
gemma4_status check_pair(const Call& call) {
  const gemma4_weight &gate = call.weight, &up = *call.up;
  if (auto status = check_weight({"gemma4_linear_geglu: up"}, up)) return status;
  if (up.n != gate.n || up.k != gate.k) {
    return call.checks.invalid("up must be " + number(gate.n) + " x " + number(gate.k) + " like gate, got " + number(up.n) + " x " +
                               number(up.k));
  }
  if (up.group_size != gate.group_size || up.values != gate.values || up.scale_kind != gate.scale_kind ||
      up.scale_dtype != gate.scale_dtype || up.zero != gate.zero || up.bits != gate.bits) {
    return call.checks.unsupported("gate and up must have the same bits, group_size, values, scale_kind, scale_dtype and zero");
  }
  return GEMMA4_OK;
}

gemma4_status check_sizes(const Call& call) {
  const Checks& checks = call.checks;
  if (call.m < 0) return checks.invalid("m must be at least 0, got " + number(call.m));
  const bool is_pair = call.up != nullptr;
  if (auto status = check_weight(is_pair ? Checks{"gemma4_linear_geglu: gate"} : checks, call.weight)) return status;
  if (auto status = is_pair ? check_pair(call) : GEMMA4_OK) return status;
  if (call.m > kMostRows) return checks.unsupported("m goes to 16, got " + number(call.m));
  if (call.pieces < 0) return checks.invalid("pieces must be at least 0, got " + number(call.pieces));
  if (!is_dtype(call.dtype)) return checks.invalid("dtype " + number(call.dtype) + " is no gemma4_dtype");
  if (call.dtype == GEMMA4_FP32) return checks.unsupported("x must be bf16 or fp16");
  return GEMMA4_OK;
}

gemma4_status check_x(const Call& call) {
  if (auto status = call.checks.pointer("x", call.x, 16)) return status;
  if (call.x_stride < call.weight.k || call.x_stride % 8 != 0 || call.x_stride > kMostStride) {
    return call.checks.invalid("x_stride must be a multiple of 8, at least k = " + number(call.weight.k) + ", got " +
                               number(call.x_stride));
  }
  return GEMMA4_OK;
}

// Rows of 16-bit outputs, or of what is added to them.
gemma4_status check_rows(const Call& call, const char* name, const void* rows, int64_t stride) {
  if (auto status = call.checks.pointer(name, rows, 2)) return status;
  if (stride < call.weight.n || stride > kMostStride) {
    return call.checks.invalid(std::string(name) + "_stride must be at least n = " + number(call.weight.n) + ", got " +
                               number(stride));
  }
  return GEMMA4_OK;
}

gemma4_status check_addends(const Call& call, const gemma4_linear_arguments& a) {
  if (a.bias != nullptr) {
    if (!is_dtype(a.bias_dtype)) return call.checks.invalid("bias_dtype " + number(a.bias_dtype) + " is no gemma4_dtype");
    if (!is_aligned(a.bias, a.bias_dtype == GEMMA4_FP32 ? 4 : 2)) {
      return call.checks.invalid("bias is not aligned to its elements");
    }
  }
  return a.residual == nullptr ? GEMMA4_OK : check_rows(call, "residual", a.residual, a.residual_stride);
}

// How a call is cut, and the workspace that this takes.
struct Cut {
  int stages = 0;  // of a piece of K
  int pieces = 0;
  size_t bytes = 0;
};

// Stages of a piece by the library's own rule: K is halved until there are two blocks for every multiprocessor, or pieces get
// short.
int halved(int stages, int64_t blocks, int multiprocessors) {
  while (blocks < int64_t(kBlocksOfMultiprocessor) * multiprocessors && stages >= 2 * kFewestStages) {
    blocks *= 2;
    stages = (stages + 1) / 2;
  }
  return stages;
}

// As many pieces as the caller asks for, or as the rule makes. That depends on the weight's shape, on what is made of it and on
// the device only, never on x. gemma4_kernels/linear/cuda_table.py has the twin.
gemma4_status cut(const Call& call, Cut* found) {
  int multiprocessors = 0;
  if (auto problem = gemma4::multiprocessors(&multiprocessors); !problem.empty()) return call.checks.launched(problem);
  const gemma4_weight& w = call.weight;
  const int64_t blocks = blocks_of(w.n, call.result);
  const int all = int((w.k + stage_columns(w.bits) - 1) / stage_columns(w.bits));
  const int asked = call.pieces < all ? call.pieces : all;  // a piece has a stage at least
  const int stages = asked > 0 ? (all + asked - 1) / asked : halved(all, blocks, multiprocessors);
  found->stages = stages;
  found->pieces = (all + stages - 1) / stages;
  const size_t rows = size_t(call.m), sums = rows * size_t(w.n) * (call.result == kGeglu ? 2 : 1);
  const size_t candidates = call.result == kArgmax ? rows * size_t(blocks) : 0;
  found->bytes = found->pieces > 1 ? size_t(found->pieces) * sums * sizeof(float) : candidates * sizeof(Candidate);
  return GEMMA4_OK;
}

Weight tensors_of(const gemma4_weight& w) {
  return {static_cast<const unsigned char*>(w.codes), static_cast<const unsigned char*>(w.high), w.scales,
          w.values == GEMMA4_OFFSETS ? w.offsets : w.zeros, w.group_scales, w.table, w.scale_table, w.scale_scales, w.scale_offset};
}

// Adds to the parameters, which say where results go, what the call is, and launches.
gemma4_status run(const Call& call, Parameters p, void* workspace, size_t workspace_bytes, gemma4_stream stream) {
  const gemma4_weight& w = call.weight;
  Cut found;
  if (auto status = cut(call, &found)) return status;
  if (auto status = call.checks.workspace(workspace, workspace_bytes, found.bytes)) return status;
  static_cast<Weight&>(p) = tensors_of(w);
  if (call.up != nullptr) p.up = tensors_of(*call.up);
  p.result = call.result;
  p.x = static_cast<const unsigned char*>(call.x);
  p.partial = found.pieces > 1 ? static_cast<float*>(workspace) : nullptr;
  p.candidates = found.pieces > 1 ? nullptr : static_cast<Candidate*>(workspace);
  p.x_stride = 2 * call.x_stride;
  p.n = int(w.n);
  p.k = int(w.k);
  p.m = int(call.m);
  p.groups = int(w.k / w.group_size);
  p.piece_stages = found.stages;
  const auto slots_of_group = uint32_t(w.bits == 6 ? 1 : w.group_size / 32);
  p.group_inverse = ((1u << 31) + slots_of_group - 1) / slots_of_group;
  p.zero = w.values == GEMMA4_CENTRED ? uint32_t(w.zero) : 0;
  const bool is_bf16 = call.dtype == GEMMA4_BF16;
  auto launch_kind = is_bf16 ? launch_bf16 : launch_fp16;
  if (w.values == GEMMA4_OFFSETS) launch_kind = is_bf16 ? launch_offsets_bf16 : launch_offsets_fp16;
  if (w.values == GEMMA4_TABLE) launch_kind = is_bf16 ? launch_table_bf16 : launch_table_fp16;
  if (w.bits != 4) launch_kind = is_bf16 ? launch_wide_bf16 : launch_wide_fp16;
  auto problem = launch_kind(p, {w.values, w.scale_kind, w.scale_dtype, w.bits}, found.pieces, stream);
  if (problem.empty() && call.result == kArgmax) {
    problem = launch_argmax(p, is_bf16, found.pieces, stream);
  } else if (problem.empty() && found.pieces > 1) {
    problem = launch_add_pieces(p, is_bf16, found.pieces, stream);
  }
  return call.checks.launched(problem);
}

template <class Arguments>
gemma4_status workspace_of(const char* function, const Arguments* arguments, size_t* bytes) {
  const Checks checks{function};
  if (bytes == nullptr) return checks.invalid("bytes is null");
  *bytes = 0;
  if (arguments == nullptr) return checks.invalid("arguments is null");
  const Call call = call_of(*arguments);
  if (auto status = check_sizes(call)) return status;
  Cut found;
  if (auto status = cut(call, &found)) return status;
  *bytes = found.bytes;
  return GEMMA4_OK;
}

}  // namespace
}  // namespace gemma4::linear

extern "C" {

gemma4_status gemma4_linear_workspace(const gemma4_linear_arguments* arguments, size_t* bytes) {
  return gemma4::linear::workspace_of("gemma4_linear", arguments, bytes);
}

gemma4_status gemma4_linear_geglu_workspace(const gemma4_linear_geglu_arguments* arguments, size_t* bytes) {
  return gemma4::linear::workspace_of("gemma4_linear_geglu", arguments, bytes);
}

gemma4_status gemma4_linear_argmax_workspace(const gemma4_linear_argmax_arguments* arguments, size_t* bytes) {
  return gemma4::linear::workspace_of("gemma4_linear_argmax", arguments, bytes);
}

gemma4_status gemma4_linear(const gemma4_linear_arguments* arguments, void* workspace, size_t workspace_bytes,
                            gemma4_stream stream) {
  using namespace gemma4::linear;
  if (arguments == nullptr) return gemma4::Checks{"gemma4_linear"}.invalid("arguments is null");
  const gemma4_linear_arguments& a = *arguments;
  const Call call = call_of(a);
  if (auto status = check_sizes(call)) return status;
  if (a.m == 0) return GEMMA4_OK;
  if (auto status = check_x(call)) return status;
  if (auto status = check_rows(call, "out", a.out, a.out_stride)) return status;
  if (auto status = check_addends(call, a)) return status;
  Parameters p{};
  p.out = a.out;
  p.out_stride = a.out_stride;
  p.bias = a.bias;
  p.bias_dtype = a.bias_dtype;
  p.residual = a.residual;
  p.residual_stride = a.residual_stride;
  return run(call, p, workspace, workspace_bytes, stream);
}

gemma4_status gemma4_linear_geglu(const gemma4_linear_geglu_arguments* arguments, void* workspace, size_t workspace_bytes,
                                  gemma4_stream stream) {
  using namespace gemma4::linear;
  if (arguments == nullptr) return gemma4::Checks{"gemma4_linear_geglu"}.invalid("arguments is null");
  const Call call = call_of(*arguments);
  if (auto status = check_sizes(call)) return status;
  if (call.m == 0) return GEMMA4_OK;
  if (auto status = check_x(call)) return status;
  if (auto status = check_rows(call, "out", arguments->out, arguments->out_stride)) return status;
  Parameters p{};
  p.out = arguments->out;
  p.out_stride = arguments->out_stride;
  return run(call, p, workspace, workspace_bytes, stream);
}

gemma4_status gemma4_linear_argmax(const gemma4_linear_argmax_arguments* arguments, void* workspace, size_t workspace_bytes,
                                   gemma4_stream stream) {
  using namespace gemma4::linear;
  if (arguments == nullptr) return gemma4::Checks{"gemma4_linear_argmax"}.invalid("arguments is null");
  const Call call = call_of(*arguments);
  if (auto status = check_sizes(call)) return status;
  if (call.m == 0) return GEMMA4_OK;
  if (auto status = check_x(call)) return status;
  if (auto status = call.checks.pointer("indices", arguments->indices, 8)) return status;
  Parameters p{};
  p.out = arguments->indices;
  return run(call, p, workspace, workspace_bytes, stream);
}

}  // extern "C"
