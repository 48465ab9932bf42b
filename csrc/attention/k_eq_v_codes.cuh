// Caches of 8 bits a number, on their way to the tile that k_eq_v.cuh knows: code times scale, rounded to the tensors' type.
//
// A thread asks for 16 codes of each of its rows a tile ahead, while nothing else wants its registers, and puts them into the
// slot when the tile before is done. A lane brings the scale of its own key of the tile.
#pragma once

#include "k_eq_v.cuh"

namespace gemma4::attention::k_eq_v {

// e4m3: a sign, four bits of an exponent that begins at 2^-6, three of a fraction; no infinities, and 0x7F is NaN.
struct Float8 {
  // Four codes as numbers. The bits of a code, seven places higher, are an fp16 number 2^8 times as small, subnormal or not.
  static __device__ __forceinline__ void numbers(uint32_t word, float (&out)[4]) {
    const uint32_t pairs[2] = {__byte_perm(word, 0, 0x1404), __byte_perm(word, 0, 0x3424)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = (pairs[i] & 0x80008000u) | (pairs[i] & 0x7F007F00u) >> 1;
      out[2 * i] = 256 * ptx::fp16_to_float(uint16_t(bits));
      out[2 * i + 1] = 256 * ptx::fp16_to_float(uint16_t(bits >> 16));
    }
    if (((word & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((word >> 8 * i & 0x7F) == 0x7F) out[i] = __uint_as_float(0x7FC00000u);
      }
    }
  }
};

struct Int8 {
  // A byte that counts from -128, in the last places of 2^23, is 2^23 + 128 + code.
  static __device__ __forceinline__ void numbers(uint32_t word, float (&out)[4]) {
    const uint32_t shifted = word ^ 0x80808080u;
    out[0] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7440)) - 8388736.0f;
    out[1] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7441)) - 8388736.0f;
    out[2] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7442)) - 8388736.0f;
    out[3] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7443)) - 8388736.0f;
  }
};

template <class Number, class Codes, int D>
struct CodedCache {
  using Type = Number;
  static constexpr bool kIsCopied = false;
  static constexpr int kRowChunks = D / 16;
  static constexpr int kStep = kThreads / kRowChunks;  // rows that all threads cover with 16 codes each
  static constexpr int kLoads = kKeys / kStep;

  const Parameters& p;
  int kv_head, row, chunk;
  uint4 codes[kLoads];
  float scale;  // of the lane's key

  __device__ CodedCache(const Parameters& parameters, const Work& w)
      : p(parameters), kv_head(w.kv_head), row(threadIdx.x / kRowChunks), chunk(threadIdx.x % kRowChunks) {}

  __device__ __forceinline__ void begin(unsigned char*, Place place) {
    const int64_t mine = place.entry < 0 ? -1 : place.entry * p.values.batch_stride + place.row * p.values.row_stride;
    const unsigned char* values = p.values.data + kv_head * p.values.head_stride + chunk * 16;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t source = ptx::from_lane(mine, row + i * kStep);
      codes[i] = source < 0 ? make_uint4(0, 0, 0, 0) : ptx::load_16_once(values + source);
    }
    const int64_t its_scale =
        place.entry * p.scales.batch_stride + place.row * p.scales.row_stride + kv_head * p.scales.head_stride;
    scale = place.entry < 0 ? 0 : __ldg(reinterpret_cast<const float*>(p.scales.data + its_scale));
  }

  __device__ __forceinline__ void finish(unsigned char* slot) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int key = row + i * kStep;
      const float factor = ptx::from_lane(scale, key);
      const uint4 lower = rounded_eight(codes[i].x, codes[i].y, factor), upper = rounded_eight(codes[i].z, codes[i].w, factor);
      // Eight lanes write at a time, to even chunks in eight of them: half of the lanes begin with the odd one, for other
      // banks.
      unsigned char* to = slot + key * Layout<D>::kRowBytes;
      const int odd = chunk / 4 % 2;
      *reinterpret_cast<uint4*>(to + ((2 * chunk + odd) ^ key % 8) * 16) = odd ? upper : lower;
      *reinterpret_cast<uint4*>(to + ((2 * chunk + 1 - odd) ^ key % 8) * 16) = odd ? lower : upper;
    }
  }

  static __device__ __forceinline__ uint4 rounded_eight(uint32_t first, uint32_t second, float factor) {
    float low[4], high[4];
    Codes::numbers(first, low);
    Codes::numbers(second, high);
    return make_uint4(ptx::round_pair(low[0] * factor, low[1] * factor, Type()),
                      ptx::round_pair(low[2] * factor, low[3] * factor, Type()),
                      ptx::round_pair(high[0] * factor, high[1] * factor, Type()),
                      ptx::round_pair(high[2] * factor, high[3] * factor, Type()));
  }
};

}  // namespace gemma4::attention::k_eq_v
