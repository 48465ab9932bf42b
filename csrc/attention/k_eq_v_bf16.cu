#include "k_eq_v_instances.cuh"

namespace gemma4::attention::k_eq_v {

std::string launch_bf16(const Parameters& parameters, int head_dim, void* stream) {
  return launch_any<Bf16>(parameters, head_dim, stream);
}

}  // namespace gemma4::attention::k_eq_v
