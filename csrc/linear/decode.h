// Between the C interface and the instantiations, which compile side by side.
#pragma once

#include <string>

#include "decode.cuh"

namespace gemma4::linear {

// How a weight's values and scales are stored, which chooses the kernel.
struct Kind {
  int values;       // gemma4_values
  int scales;       // gemma4_scales
  int scale_dtype;  // gemma4_dtype
  int bits;         // of a code
};

// Launches the kernel for one dtype of x; pieces is the number of blocks along K.
std::string launch_bf16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_fp16(const Parameters& parameters, Kind kind, int pieces, void* stream);

// The same for values with offsets, for those of a table, and for codes of more than 4 bits, in files of their own.
std::string launch_offsets_bf16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_offsets_fp16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_table_bf16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_table_fp16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_wide_bf16(const Parameters& parameters, Kind kind, int pieces, void* stream);
std::string launch_wide_fp16(const Parameters& parameters, Kind kind, int pieces, void* stream);

// Adds the pieces in their order: of the product, or of the two of GeGLU.
std::string launch_add_pieces(const Parameters& parameters, bool is_bf16, int pieces, void* stream);

// The largest logit of every row, of the blocks or of the pieces.
std::string launch_argmax(const Parameters& parameters, bool is_bf16, int pieces, void* stream);

}  // namespace gemma4::linear
