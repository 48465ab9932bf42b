#include "k_eq_v_instances.cuh"

namespace gemma4::attention::k_eq_v {

std::string launch_codes_fp16(const Parameters& parameters, int codes, int head_dim, void* stream) {
  if (codes == GEMMA4_CODES_FLOAT8) return launch_coded<Fp16, Float8>(parameters, head_dim, stream);
  return launch_coded<Fp16, Int8>(parameters, head_dim, stream);
}

}  // namespace gemma4::attention::k_eq_v
