// The choice of an instantiation at run time.
#pragma once

#include "../include/gemma4_kernels.h"
#include "decode.h"

namespace gemma4::linear {

template <class Type, class Scales, Values VALUES, int BITS, int TILES>
std::string launch_one(const Parameters& p, int pieces, void* stream) {
  return launch(decode_kernel<Type, Scales, VALUES, BITS, TILES>, unsigned(blocks_of(p.n, p.result)), unsigned(pieces), kThreads,
                Stage<TILES, VALUES, BITS>::kSharedBytes, stream, p);
}

template <class Type, class Scales, Values VALUES, int BITS = 4>
std::string launch_rows(const Parameters& p, int pieces, void* stream) {
  return p.m <= kTileRows ? launch_one<Type, Scales, VALUES, BITS, 1>(p, pieces, stream)
                          : launch_one<Type, Scales, VALUES, BITS, 2>(p, pieces, stream);
}

template <class Type, Values VALUES>
std::string launch_plain(const Parameters& p, int scale_dtype, int pieces, void* stream) {
  if (scale_dtype == GEMMA4_FP16) return launch_rows<Type, PlainScales<Fp16Scale, VALUES>, VALUES>(p, pieces, stream);
  if (scale_dtype == GEMMA4_BF16) return launch_rows<Type, PlainScales<Bf16Scale, VALUES>, VALUES>(p, pieces, stream);
  return launch_rows<Type, PlainScales<Fp32Scale, VALUES>, VALUES>(p, pieces, stream);
}

template <class Type>
std::string launch_subtracting(const Parameters& p, Kind kind, int pieces, void* stream) {
  if (kind.values == GEMMA4_ZEROS) return launch_plain<Type, kZeros>(p, kind.scale_dtype, pieces, stream);
  return launch_plain<Type, kCentred>(p, kind.scale_dtype, pieces, stream);
}

template <class Type>
std::string launch_offsets(const Parameters& p, Kind kind, int pieces, void* stream) {
  if (kind.scales == GEMMA4_SCALES_SIX_BIT) return launch_rows<Type, SixBitScales, kOffsets>(p, pieces, stream);
  return launch_plain<Type, kOffsets>(p, kind.scale_dtype, pieces, stream);
}

template <class Type>
std::string launch_table(const Parameters& p, Kind kind, int pieces, void* stream) {
  if (kind.scales == GEMMA4_SCALES_INT8) return launch_rows<Type, Int8Scales<4>, kTable>(p, pieces, stream);
  if (kind.scales == GEMMA4_SCALES_E8M0) return launch_rows<Type, PlainScales<E8m0Scale, kTable>, kTable>(p, pieces, stream);
  if (kind.scales == GEMMA4_SCALES_NESTED) return launch_rows<Type, NestedScales, kTable>(p, pieces, stream);
  if (kind.scale_dtype == GEMMA4_FP16) return launch_rows<Type, PlainScales<Fp16Scale, kTable>, kTable>(p, pieces, stream);
  return launch_rows<Type, PlainScales<Fp32Scale, kTable>, kTable>(p, pieces, stream);
}

// Codes of 5, 6 and 8 bits, whose scales are fp16: those of GGUF.
template <class Type>
std::string launch_wide(const Parameters& p, Kind kind, int pieces, void* stream) {
  if (kind.bits == 8) return launch_rows<Type, PlainScales<Fp16Scale, kCentred, 2>, kCentred, 8>(p, pieces, stream);
  if (kind.bits == 6) return launch_rows<Type, Int8Scales<8>, kCentred, 6>(p, pieces, stream);
  if (kind.scales == GEMMA4_SCALES_SIX_BIT) return launch_rows<Type, SixBitScales, kOffsets, 5>(p, pieces, stream);
  if (kind.values == GEMMA4_OFFSETS) return launch_rows<Type, PlainScales<Fp16Scale, kOffsets>, kOffsets, 5>(p, pieces, stream);
  return launch_rows<Type, PlainScales<Fp16Scale, kCentred>, kCentred, 5>(p, pieces, stream);
}

}  // namespace gemma4::linear
