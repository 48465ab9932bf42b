// Between the C interface and the instantiations, which compile side by side.
#pragma once

#include "k_eq_v.cuh"

namespace gemma4::attention::k_eq_v {

// Launches the kernel for one type and head_dim 128, 256 or 512.
std::string launch_bf16(const Parameters& parameters, int head_dim, void* stream);
std::string launch_fp16(const Parameters& parameters, int head_dim, void* stream);

// The same for values in 8 bits, `codes` a gemma4_codes, and head_dim 128 or 512.
std::string launch_codes_bf16(const Parameters& parameters, int codes, int head_dim, void* stream);
std::string launch_codes_fp16(const Parameters& parameters, int codes, int head_dim, void* stream);

}  // namespace gemma4::attention::k_eq_v
