// The choice of an instantiation at run time.
#pragma once

#include "k_eq_v.h"

namespace gemma4::attention::k_eq_v {

template <class Type, int D>
std::string launch_one(const Parameters& p, void* stream) {
  const Requests& r = p.requests;
  return launch(k_eq_v_kernel<PlainCache<Type, D>, D>, 2u * unsigned(p.splits.programs) * unsigned(p.groups),
                unsigned(r.batch) * unsigned(p.kv_heads), kThreads, Layout<D>::kBytes, stream, p);
}

template <class Type>
std::string launch_any(const Parameters& p, int head_dim, void* stream) {
  if (head_dim == 512) return launch_one<Type, 512>(p, stream);
  if (head_dim == 256) return launch_one<Type, 256>(p, stream);
  return launch_one<Type, 128>(p, stream);
}

}  // namespace gemma4::attention::k_eq_v
