// gemma4_flash_decode and gemma4_flash_decode_workspace: what they accept, and how keys are split.
#include <cmath>

#include "checks.h"
#include "flash_decode.h"

namespace gemma4::attention {
namespace {

constexpr Checks kChecks{"gemma4_flash_decode"};
constexpr int kBlocksOfMultiprocessor = 2;  // that are resident at a time

gemma4_status check_sizes(const gemma4_flash_decode_arguments* arguments) {
  if (arguments == nullptr) return kChecks.invalid("arguments is null");
  const gemma4_flash_decode_arguments& a = *arguments;
  if (auto status = check_attention_sizes(kChecks, a.attention)) return status;
  const int64_t dim = a.attention.head_dim;
  if (dim != 64 && dim != 128 && dim != 256) return kChecks.unsupported("head_dim must be 64, 128 or 256, got " + number(dim));
  if (a.left < -1 || a.right < -1) return kChecks.invalid("left and right must be at least -1");
  return GEMMA4_OK;
}

bool is_empty(const gemma4_attention& a) { return a.requests.batch == 0 || a.requests.rows == 0; }

gemma4_status check(const gemma4_flash_decode_arguments* arguments) {
  if (auto status = check_sizes(arguments)) return status;
  const gemma4_flash_decode_arguments& a = *arguments;
  if (is_empty(a.attention)) return GEMMA4_OK;
  if (!(std::isfinite(a.attention.scale) && std::isfinite(a.softcap)) || a.softcap < 0) {
    return kChecks.invalid("scale must be a number, and softcap one that is not negative");
  }
  if (auto status = check_attention_tensors(kChecks, a.attention)) return status;
  if (auto status = check_cache(kChecks, "k", a.k, a.attention)) return status;
  return check_cache(kChecks, "v", a.attention.v, a.attention);
}

std::string splits_for(const gemma4_flash_decode_arguments& a, Splits* splits) {
  int count = 0;
  auto problem = multiprocessors(&count);
  *splits = splits_of(requests_of(a.attention.requests, a.left, a.right), int64_t(kBlocksOfMultiprocessor) * std::max(count, 1),
                      a.attention.kv_heads, kSmallestChunkLog2);
  return problem;
}

Strided strided(const gemma4_rows& rows) {
  return {static_cast<const unsigned char*>(rows.data), 2 * rows.batch_stride, 2 * rows.row_stride, 2 * rows.head_stride};
}

gemma4_status run(const gemma4_flash_decode_arguments& arguments, void* workspace, size_t workspace_bytes,
                  gemma4_stream stream) {
  const gemma4_attention& a = arguments.attention;
  FlashParameters p{};
  if (auto problem = splits_for(arguments, &p.splits); !problem.empty()) return kChecks.launched(problem);
  if (auto status = kChecks.workspace(workspace, workspace_bytes, parts_bytes(a, p.splits))) return status;
  p.requests = requests_of(a.requests, arguments.left, arguments.right);
  p.parts = parts_in(workspace, a, p.splits);
  p.q = strided(a.q);
  p.k = strided(arguments.k);
  p.v = strided(a.v);
  p.kv_heads = int(a.kv_heads);
  p.group = int(a.query_heads / a.kv_heads);
  p.scale = a.scale;
  p.softcap = arguments.softcap;
  p.inverse_softcap = arguments.softcap == 0 ? 0 : 1 / arguments.softcap;
  const bool is_bf16 = a.dtype == GEMMA4_BF16;
  std::string problem;
  if (p.requests.capacity > 0) {
    problem = (is_bf16 ? launch_flash_decode_bf16 : launch_flash_decode_fp16)(p, int(a.head_dim), stream);
  }
  if (problem.empty()) problem = launch_combine(p.requests, p.splits, p.parts, results_of(a), is_bf16, stream);
  return kChecks.launched(problem);
}

}  // namespace
}  // namespace gemma4::attention

extern "C" {

gemma4_status gemma4_flash_decode_workspace(const gemma4_flash_decode_arguments* arguments, size_t* bytes) {
  using namespace gemma4::attention;
  if (bytes == nullptr) return kChecks.invalid("bytes is null");
  *bytes = 0;
  if (auto status = check_sizes(arguments)) return status;
  Splits splits{};
  if (auto problem = splits_for(*arguments, &splits); !problem.empty()) return kChecks.launched(problem);
  *bytes = parts_bytes(arguments->attention, splits);
  return GEMMA4_OK;
}

gemma4_status gemma4_flash_decode(const gemma4_flash_decode_arguments* arguments, void* workspace, size_t workspace_bytes,
                                  gemma4_stream stream) {
  using namespace gemma4::attention;
  if (auto status = check(arguments)) return status;
  if (is_empty(arguments->attention)) return GEMMA4_OK;
  return run(*arguments, workspace, workspace_bytes, stream);
}

}  // extern "C"
