// gemma4_k_eq_v_decode and gemma4_k_eq_v_decode_workspace: what they accept, and how keys are split.
#include "k_eq_v.h"

#include <cmath>

#include "checks.h"

namespace gemma4::attention::k_eq_v {
namespace {

constexpr Checks kChecks{"gemma4_k_eq_v_decode"};

gemma4_status check_call_sizes(const gemma4_k_eq_v_decode_arguments* arguments) {
  if (arguments == nullptr) return kChecks.invalid("arguments is null");
  const gemma4_attention& a = arguments->attention;
  if (auto status = check_attention_sizes(kChecks, a)) return status;
  if (a.head_dim != 128 && a.head_dim != 256 && a.head_dim != 512) {
    return kChecks.unsupported("head_dim must be 128, 256 or 512, got " + number(a.head_dim));
  }
  if (arguments->codes < GEMMA4_CODES_NONE || arguments->codes > GEMMA4_CODES_INT8) {
    return kChecks.unsupported("codes " + number(arguments->codes) + " has no kernel in this version");
  }
  if (arguments->codes != GEMMA4_CODES_NONE && a.head_dim == 256) {
    return kChecks.unsupported("with codes head_dim must be 128 or 512, got 256");
  }
  return GEMMA4_OK;
}

gemma4_status check_codes(const gemma4_k_eq_v_decode_arguments& arguments) {
  const gemma4_rows& v = arguments.attention.v;
  const gemma4_rows& scale = arguments.values_scale;
  if (arguments.codes == GEMMA4_CODES_NONE) {
    return scale.data == nullptr ? GEMMA4_OK : kChecks.invalid("values_scale must be null without codes");
  }
  for (const int64_t stride : {v.batch_stride, v.row_stride, v.head_stride}) {
    if (stride % 16 != 0) return kChecks.invalid("strides of v must be multiples of 16 with codes, got " + number(stride));
  }
  for (const int64_t stride : {scale.batch_stride, scale.row_stride, scale.head_stride}) {
    if (stride < 0 || stride > v.batch_stride + v.row_stride + v.head_stride) {
      return kChecks.invalid("strides of values_scale must lie between 0 and the sum of those of v, got " + number(stride));
    }
  }
  return kChecks.pointer("values_scale", scale.data, 4);
}

gemma4_status check(const gemma4_k_eq_v_decode_arguments& arguments) {
  const gemma4_attention& a = arguments.attention;
  const gemma4_requests& r = a.requests;
  if (r.cu_q != nullptr || r.cu_k != nullptr || r.first != nullptr || r.entry != nullptr) {
    return kChecks.invalid("cu_q, cu_k, first and entry must be null: row j of a request is position j");
  }
  if (!std::isfinite(a.scale)) return kChecks.invalid("scale must be a number");
  if (auto status = check_attention_tensors(kChecks, a)) return status;
  if (auto status = check_cache(kChecks, "v", a.v, a)) return status;
  if (r.capacity > 0) {
    if (auto status = check_codes(arguments)) return status;
  }
  if (!is_dtype(arguments.weight_dtype)) {
    return kChecks.invalid("weight_dtype " + number(arguments.weight_dtype) + " is no gemma4_dtype");
  }
  const uintptr_t weight_bytes = arguments.weight_dtype == GEMMA4_FP32 ? 4 : 2;
  if (auto status = kChecks.pointer("k_norm_weight", arguments.k_norm_weight, weight_bytes)) return status;
  if (arguments.inv_freq_is_double != 0 && arguments.inv_freq_is_double != 1) {
    return kChecks.invalid("inv_freq_is_double must be 0 or 1, got " + number(arguments.inv_freq_is_double));
  }
  return kChecks.pointer("inv_freq", arguments.inv_freq, arguments.inv_freq_is_double ? 8 : 4);
}

Strided strided(const gemma4_rows& rows, int element_bytes) {
  return {static_cast<const unsigned char*>(rows.data), element_bytes * rows.batch_stride, element_bytes * rows.row_stride,
          element_bytes * rows.head_stride};
}

// One wave of equal blocks leaves no multiprocessor idle, and multiples of a tile, other than powers of two, leave few blocks
// short.
gemma4_status split(const gemma4_attention& a, Requests* requests, Splits* splits) {
  int count = 0;
  if (auto problem = multiprocessors(&count); !problem.empty()) return kChecks.launched(problem);
  *requests = requests_of(a.requests, -1, 0);
  *splits = splits_of(*requests, count, a.kv_heads, kSmallestChunkLog2);
  splits->step = kKeys;
  return GEMMA4_OK;
}

gemma4_status run(const gemma4_k_eq_v_decode_arguments& arguments, void* workspace, size_t workspace_bytes,
                  gemma4_stream stream) {
  const gemma4_attention& a = arguments.attention;
  Parameters p{};
  if (auto status = split(a, &p.requests, &p.splits)) return status;
  if (auto status = kChecks.workspace(workspace, workspace_bytes, parts_bytes(a, p.splits))) return status;
  p.parts = parts_in(workspace, a, p.splits);
  const bool coded = arguments.codes != GEMMA4_CODES_NONE;
  p.q = strided(a.q, 2);
  p.values = strided(a.v, coded ? 1 : 2);
  p.scales = strided(arguments.values_scale, 4);
  p.weight = arguments.k_norm_weight;
  p.inv_freq = arguments.inv_freq;
  p.weight_dtype = arguments.weight_dtype;
  p.is_double = arguments.inv_freq_is_double != 0;
  p.kv_heads = int(a.kv_heads);
  p.group = int(a.query_heads / a.kv_heads);
  p.groups = (p.requests.rows * p.group + kMostTiles * kTileRows - 1) / (kMostTiles * kTileRows);
  p.scale = a.scale;
  const bool is_bf16 = a.dtype == GEMMA4_BF16;
  std::string problem;
  if (p.requests.capacity > 0) {
    problem = coded ? (is_bf16 ? launch_codes_bf16 : launch_codes_fp16)(p, arguments.codes, int(a.head_dim), stream)
                    : (is_bf16 ? launch_bf16 : launch_fp16)(p, int(a.head_dim), stream);
  }
  if (problem.empty()) problem = launch_combine(p.requests, p.splits, p.parts, results_of(a), is_bf16, stream);
  return kChecks.launched(problem);
}

}  // namespace
}  // namespace gemma4::attention::k_eq_v

extern "C" {

gemma4_status gemma4_k_eq_v_decode_workspace(const gemma4_k_eq_v_decode_arguments* arguments, size_t* bytes) {
  using namespace gemma4::attention::k_eq_v;
  if (bytes == nullptr) return kChecks.invalid("bytes is null");
  *bytes = 0;
  if (auto status = check_call_sizes(arguments)) return status;
  gemma4::attention::Requests requests{};
  gemma4::attention::Splits splits{};
  if (auto status = split(arguments->attention, &requests, &splits)) return status;
  *bytes = gemma4::attention::parts_bytes(arguments->attention, splits);
  return GEMMA4_OK;
}

gemma4_status gemma4_k_eq_v_decode(const gemma4_k_eq_v_decode_arguments* arguments, void* workspace, size_t workspace_bytes,
                                   gemma4_stream stream) {
  using namespace gemma4::attention::k_eq_v;
  if (auto status = check_call_sizes(arguments)) return status;
  const gemma4_requests& r = arguments->attention.requests;
  if (r.batch == 0 || r.rows == 0) return GEMMA4_OK;
  if (auto status = check(*arguments)) return status;
  return run(*arguments, workspace, workspace_bytes, stream);
}

}  // extern "C"
