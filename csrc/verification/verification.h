// Between the C interface of verification and its kernels.
//
//   facts      (B, ALL_ROWS, kFacts, TILES) int64      what the tiles of a row's vocabulary have to say
//   lists      (B, ALL_ROWS, TILES, LIST) int64        places of a tile's largest scores, -1 behind them
//   made       (B, ALL_ROWS, kMade) int64              a row that is finished
//   residuals  (B, K, kResiduals, SEGMENTS) int64      by rejection and block
//   counters   (B, 2) uint32                           blocks of a request that are done: rows, residuals
//
// ALL_ROWS are the K + 1 rows of the target, then K of the drafter if its logits are given.
#pragma once

#include <cstdint>
#include <string>

#include "../common/device.cuh"
#include "../include/gemma4_kernels.h"

namespace gemma4::verification {

// STATUS: 2 for NaN or +inf, 1 for a finite logit, 0 for nothing but -inf. LARGEST, SAMPLE: the prizes of the largest score and
// of the largest score + noise. FLOOR: the list has every token whose key reaches it. The others are of the survey: mass up to
// the sample and of all, and how many places lie above the sample; these are listed, as far as there is room.
enum Fact { kStatus, kLargest, kSample, kFloor, kBelow, kWhole, kAbove, kFacts };
// USABLE: whether the row has a distribution. TOKEN: its sample, where one was wanted; else the distribution: bits of the
// LARGEST score, FIRST place of the survivors and the place behind them, their TOTAL mass, and bits of a PROBABILITY, the
// draft's.
enum Made { kUsable, kToken, kLargestScore, kFirst, kLast, kTotal, kProbability, kMade };
// Of max(joint p - q, 0): its mass and the prize of its sample; the prize of the sample of p.
enum ResidualFact { kMass, kResidualPrize, kTargetPrize, kResiduals };

constexpr int kMostEnds = 64;
constexpr int kTile = 2048;          // tokens of a tile: see tiles.cu
constexpr int kScratch = 4096;       // places that a block holds in shared memory: all lists of a row
constexpr int kLongestList = 64, kShortestList = 8;
constexpr int kLongestTopK = 512;    // from a larger top_k on, noise serves better than lists
constexpr int kSegment = 4096;       // tokens of a block that reads p and q

struct Parameters {
  const void* logits;
  const void* draft_logits;  // or null
  const int64_t* drafts;
  const int64_t* num_drafts;  // or null
  const float *temperature, *cut, *min_p, *softcap;
  const int64_t *top_k, *seeds, *positions;
  const int64_t* max_new_tokens;  // or null
  int64_t *tokens, *num_accepted, *next_token, *num_emitted, *hidden_row;
  uint8_t *finished, *refused;
  int64_t *facts, *lists, *made, *residuals;
  uint32_t* counters;
  int64_t stride_batch, stride_row, draft_stride_batch, draft_stride_row;
  int batch, rows, drafter_rows, vocabulary;
  int tiles, list, segments;
  int stream, method, ends_count;
  int64_t ends[kMostEnds];

  __host__ __device__ int all_rows() const { return rows + drafter_rows; }
  __host__ __device__ bool is_match() const { return method == GEMMA4_MATCH; }
};

std::string launch_tiles(const Parameters& parameters, int dtype, void* stream);
std::string launch_survey(const Parameters& parameters, int dtype, void* stream);
std::string launch_rows(const Parameters& parameters, int dtype, void* stream);
std::string launch_residuals(const Parameters& parameters, int dtype, void* stream);

}  // namespace gemma4::verification
