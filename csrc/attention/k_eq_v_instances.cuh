// The choice of an instantiation at run time.
#pragma once

#include "k_eq_v.h"
#include "k_eq_v_codes.cuh"

namespace gemma4::attention::k_eq_v {

template <class Cache, int D>
std::string launch_one(const Parameters& p, void* stream) {
  const Requests& r = p.requests;
  return launch(k_eq_v_kernel<Cache, D>, 2u * unsigned(p.splits.programs) * unsigned(p.groups),
                unsigned(r.batch) * unsigned(p.kv_heads), kThreads, Layout<D>::kBytes, stream, p);
}

template <class Type>
std::string launch_any(const Parameters& p, int head_dim, void* stream) {
  if (head_dim == 512) return launch_one<PlainCache<Type, 512>, 512>(p, stream);
  if (head_dim == 256) return launch_one<PlainCache<Type, 256>, 256>(p, stream);
  return launch_one<PlainCache<Type, 128>, 128>(p, stream);
}

template <class Type, class Codes>
std::string launch_coded(const Parameters& p, int head_dim, void* stream) {
  if (head_dim == 512) return launch_one<CodedCache<Type, Codes, 512>, 512>(p, stream);
  return launch_one<CodedCache<Type, Codes, 128>, 128>(p, stream);
}

}  // namespace gemma4::attention::k_eq_v
