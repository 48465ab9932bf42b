// What a request emits of the tokens that a method proposes: cut at an end of text and at the budget. One thread writes it.
#pragma once

#include "row.cuh"

namespace gemma4::verification {

struct Emitter {
  const Parameters& p;
  int64_t request, budget, next_token = -1;
  int emitted = 0;
  bool finished = false;

  __device__ Emitter(const Parameters& parameters, int64_t number) : p(parameters), request(number), budget(parameters.rows) {
    if (p.max_new_tokens == nullptr) return;
    const int64_t given = p.max_new_tokens[request];
    budget = given < 0 ? 0 : given < budget ? given : budget;
  }

  __device__ bool goes_on() const { return emitted < budget && !finished; }

  __device__ void emit(int64_t token) {
    p.tokens[request * p.rows + emitted++] = next_token = token;
    for (int i = 0; i < p.ends_count; ++i) finished |= token == p.ends[i];
  }

  __device__ void close(int accepted, bool refused) {
    for (int column = emitted; column < p.rows; ++column) p.tokens[request * p.rows + column] = -1;
    p.num_accepted[request] = accepted < emitted ? accepted : emitted;
    p.next_token[request] = next_token;
    p.num_emitted[request] = emitted;
    p.hidden_row[request] = emitted > 0 ? emitted - 1 : 0;
    p.finished[request] = finished;
    p.refused[request] = refused;
  }
};

// A number of a finished row that another block has left; volatile, because L1 may hold what was there before.
__device__ __forceinline__ int64_t made_of(const Parameters& p, int64_t request, int row, Made what) {
  return *const_cast<const volatile int64_t*>(p.made + (request * p.all_rows() + row) * kMade + what);
}

// A row that matters has no distribution.
__device__ inline bool is_refused(const Parameters& p, int64_t request, int count) {
  bool usable = true;
  for (int row = 0; row <= count; ++row) usable &= made_of(p, request, row, kUsable) != 0;
  for (int row = 0; row < count && p.drafter_rows > 0; ++row) usable &= made_of(p, request, p.rows + row, kUsable) != 0;
  return !usable;
}

}  // namespace gemma4::verification
