// p(token) = exp(score - largest) / total of the row's survivors, 0 for the others: made of the row each time, never stored.
#pragma once

#include "outcome.cuh"

namespace gemma4::verification {

struct Distribution {
  const Request& request;
  float largest, total;
  int64_t first, last;

  // Of a row that its block has finished.
  __device__ Distribution(const Parameters& p, const Where& at, const Request& filters) : request(filters) {
    largest = float_of(int(made_of(p, at.request, at.row, kLargestScore)));
    total = from_fixed(made_of(p, at.request, at.row, kTotal));
    first = made_of(p, at.request, at.row, kFirst);
    last = made_of(p, at.request, at.row, kLast);
  }

  __device__ __forceinline__ float of(float score, int token) const {
    const int64_t place = place_of(key_of(score), token);
    if (place < first || place >= last) return 0.0f;
    const float weight = weight_of(score, largest);
    return weight >= request.min_p ? over(weight, total) : 0.0f;
  }
};

}  // namespace gemma4::verification
