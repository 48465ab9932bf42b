// Between the C interface and the instantiations, which compile side by side.
#pragma once

#include <string>

#include "decode.cuh"

namespace gemma4::linear {

// Launches the kernel for one dtype of x. scale_dtype is a gemma4_dtype, pieces the number of blocks along K.
std::string launch_bf16(const Parameters& parameters, int scale_dtype, int pieces, void* stream);
std::string launch_fp16(const Parameters& parameters, int scale_dtype, int pieces, void* stream);

// Adds the pieces in their order.
std::string launch_add_pieces(const Parameters& parameters, bool is_bf16, int pieces, void* stream);

}  // namespace gemma4::linear
