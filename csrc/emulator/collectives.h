// What the 32 lanes of a warp do together, by the fragment layouts of the PTX manual (PTX ISA 9.0).
//
// Like runtime.h not instrumented by ThreadSanitizer: a lane's registers are no shared memory.
#pragma once

#include <cstdint>

namespace emulator {

// shfl.sync.idx and .bfly ("Data Movement and Conversion Instructions: shfl.sync"), all lanes taking part.
uint32_t shuffle(uint32_t value, int source_lane, int line);

// redux.sync of 32-bit integers, all lanes taking part; sums wrap.
enum Reduction { kLargest, kSmallest, kSum };
int reduce(Reduction reduction, int value, int line);

// ldmatrix.x4 of 8 x 8 16-bit elements ("Warp-level matrix load instruction: ldmatrix"): lane 8 i + r has brought row r (16 bytes)
// of matrix i; lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix.
void distribute_matrices(const uint32_t row[4], uint32_t out[4], int line);

// The same with .trans: lane l gets element l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
void distribute_turned_matrices(const uint32_t row[4], uint32_t out[4], int line);

// mma.m16n8k16 with fp32 sums ("Matrix Fragments for mma.m16n8k16 with floating point type"). With g = lane / 4, t = lane % 4:
//   a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8 of A; columns 2t, 2t, 2t + 8, 2t + 8, each with its right neighbour
//   b[0], b[1]               column g of B; rows 2t and 2t + 8, each with the next
//   c[0], c[1], c[2], c[3]   rows g, g, g + 8, g + 8 of C; columns 2t, 2t + 1, 2t, 2t + 1
// The lower half of a register is the element with the lower index. Sums are made in double and rounded once: the hardware's own
// order is not documented, and tests may not depend on it.
void multiply(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4], bool is_bf16, int line);

float bf16_to_float(uint16_t bits);
float fp16_to_float(uint16_t bits);
uint16_t float_to_bf16(float value);  // to nearest, ties to even
uint16_t float_to_fp16(float value);

}  // namespace emulator
