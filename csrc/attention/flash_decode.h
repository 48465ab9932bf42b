// Between the C interface and the instantiations, which compile side by side.
#pragma once

#include "flash_decode.cuh"

namespace gemma4::attention {

// Launches the kernel for one type and head_dim 64, 128 or 256.
std::string launch_flash_decode_bf16(const FlashParameters& parameters, int head_dim, void* stream);
std::string launch_flash_decode_fp16(const FlashParameters& parameters, int head_dim, void* stream);

}  // namespace gemma4::attention
