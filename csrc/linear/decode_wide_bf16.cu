#include "decode_instances.cuh"

namespace gemma4::linear {

std::string launch_wide_bf16(const Parameters& parameters, Kind kind, int pieces, void* stream) {
  return launch_wide<Bf16>(parameters, kind, pieces, stream);
}

}  // namespace gemma4::linear
