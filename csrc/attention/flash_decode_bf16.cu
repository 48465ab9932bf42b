#include "flash_decode_instances.cuh"

namespace gemma4::attention {

std::string launch_flash_decode_bf16(const FlashParameters& parameters, int head_dim, void* stream) {
  return launch_flash_decode<Bf16>(parameters, head_dim, stream);
}

}  // namespace gemma4::attention
