#include "decode_instances.cuh"

namespace gemma4::linear {

std::string launch_fp16(const Parameters& parameters, int scale_dtype, int pieces, void* stream) {
  return launch_type<Fp16>(parameters, scale_dtype, pieces, stream);
}

}  // namespace gemma4::linear
