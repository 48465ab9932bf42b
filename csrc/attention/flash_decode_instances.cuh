// The choice of an instantiation at run time.
#pragma once

#include "flash_decode.h"

namespace gemma4::attention {

template <class Type, int D, int TILES>
std::string launch_tiles(const FlashParameters& p, int groups, void* stream) {
  return launch(flash_decode_kernel<Type, D, TILES>, unsigned(groups) * unsigned(p.splits.programs) * 2,
                unsigned(p.requests.batch) * unsigned(p.kv_heads), kThreads, Layout<D, TILES>::kSharedBytes, stream, p, groups);
}

// 64 packed rows take the tensor cores as long as memory takes to bring the keys: of more rows, a second block reads the same
// keys from L2 and nothing is lost.
template <class Type, int D>
std::string launch_rows(const FlashParameters& p, void* stream) {
  const int tiles = (p.requests.rows * p.group + kTileRows - 1) / kTileRows;
  if (tiles == 1) return launch_tiles<Type, D, 1>(p, 1, stream);
  if (tiles == 2) return launch_tiles<Type, D, 2>(p, 1, stream);
  return launch_tiles<Type, D, 4>(p, (tiles + 3) / 4, stream);
}

template <class Type>
std::string launch_flash_decode(const FlashParameters& p, int head_dim, void* stream) {
  if (head_dim == 64) return launch_rows<Type, 64>(p, stream);
  if (head_dim == 128) return launch_rows<Type, 128>(p, stream);
  return launch_rows<Type, 256>(p, stream);
}

}  // namespace gemma4::attention
