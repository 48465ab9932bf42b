// The choice of an instantiation at run time.
#pragma once

#include "../include/gemma4_kernels.h"
#include "decode.h"

namespace gemma4::linear {

template <class Type, class Scale, bool ZEROS, int TILES>
std::string launch_one(const Parameters& p, int pieces, void* stream) {
  return launch(decode_kernel<Type, Scale, ZEROS, TILES>, unsigned((p.n + kOutputs - 1) / kOutputs), unsigned(pieces), kThreads,
                Stage<TILES, ZEROS>::kRingBytes, stream, p);
}

template <class Type, class Scale>
std::string launch_scale(const Parameters& p, int pieces, void* stream) {
  const bool small = p.m <= kTileRows;
  if (p.zeros != nullptr) {
    return small ? launch_one<Type, Scale, true, 1>(p, pieces, stream) : launch_one<Type, Scale, true, 2>(p, pieces, stream);
  }
  return small ? launch_one<Type, Scale, false, 1>(p, pieces, stream) : launch_one<Type, Scale, false, 2>(p, pieces, stream);
}

template <class Type>
std::string launch_type(const Parameters& p, int scale_dtype, int pieces, void* stream) {
  if (scale_dtype == GEMMA4_FP16) return launch_scale<Type, Fp16Scale>(p, pieces, stream);
  if (scale_dtype == GEMMA4_BF16) return launch_scale<Type, Bf16Scale>(p, pieces, stream);
  return launch_scale<Type, Fp32Scale>(p, pieces, stream);
}

}  // namespace gemma4::linear
