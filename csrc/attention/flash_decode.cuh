// Attention of 1 to 16 query rows over a cache of keys and values that lie side by side: sliding layers while they decode or
// verify.
//
// Query heads of a KV head and rows of a request are one axis: packed row m is row m / GROUP of head m % GROUP. A block owns up
// to TILES tiles of 16 packed rows of one KV head and one chunk of its keys. The chunk goes by in tiles of KEYS keys, 8 KiB of
// keys and 8 KiB of values, through a ring of three slots that cp.async fills two slots ahead:
//
//     slot       keys 0 | values 0 | keys 1 | values 1 | ...    KEYS rows of D columns; 16-byte chunk c of row r at c ^ (r % 8)
//     queries    TILES * 16 rows of D columns                   the same
//     scores     TILES x HALVES x 16 rows of KEYS floats        8 columns n of row r at n ^ (r % 4); 16 keys: n ^ (r / 2 % 2)
//
// so that no ldmatrix and no 8-byte access meets a bank twice. There are 4 warps and two barriers a tile, one for each slot:
//
//     keys       A warp makes scores of 8 keys (two of them share 8 keys at 256 columns, half of the columns each) for all rows
//                and leaves them in shared memory.
//     values     The barrier that says that the values are there says so of the scores. Every warp folds all scores of the tile
//                into the softmax, the same as its neighbours, and multiplies the weights with its own quarter of the columns.
//
// Scores, maximum, sum and accumulator are fp32; weights are rounded to the tensors' type for the second product, their sum is
// not.
//
// A row's bits: rows of an mma do not meet. A tile that a row does not see leaves maximum, sum and accumulator as they are.
// Tiles begin at multiples of KEYS from the request's first key, chunks follow from the row's own number of keys (request.cuh).
#pragma once

#include "request.cuh"
#include "softmax.cuh"

namespace gemma4::attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 3;
constexpr int kSlotBytes = 8192;
constexpr int kTileRows = 16;
constexpr int kSmallestChunkLog2 = 6;  // 64 keys, or starting a block costs more than its keys; a multiple of every tile

// A tensor for the kernel: strides in bytes.
struct Strided {
  const unsigned char* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct FlashParameters {
  Requests requests;
  Splits splits;
  Parts parts;
  Strided q, k, v;
  int kv_heads;
  int group;  // query heads of a KV head
  float scale, softcap, inverse_softcap;
};

// Sizes of an instance, and its shared memory.
template <int D, int TILES>
struct Layout {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kKeys = kSlotBytes / kRowBytes;
  static constexpr int kHalves = D == 256 ? 2 : 1;                  // warps that share 8 keys
  static constexpr int kKeyTiles = kKeys / 8 * kHalves / kWarps;    // of 8 keys, of a warp
  static constexpr int kColumnTiles = D / 8 / kWarps;               // of 8 columns, of a warp
  static constexpr int kQueries = kSlots * kSlotBytes;
  static constexpr int kScores = kQueries + TILES * kTileRows * kRowBytes;
  static constexpr int kScoreBytes = kTileRows * kKeys * 4;         // of one tile of rows and one half
  static constexpr int kSharedBytes = kScores + TILES * kHalves * kScoreBytes;
};

// The copies that a thread issues of a slot: one 16-byte chunk of each of four rows.
template <int D, int TILES>
struct Loader {
  using Map = Layout<D, TILES>;
  static constexpr int kRowChunks = Map::kRowBytes / 16;
  static constexpr int kStep = kThreads / kRowChunks;  // rows that all threads cover with one chunk each
  static constexpr int kCopies = Map::kKeys / kStep;

  const FlashParameters& p;
  const Request& request;
  const unsigned char* keys;    // column 0 of row 0, moved by the thread's chunk
  const unsigned char* values;
  uint64_t policy = ptx::evict_first_policy();
  int b, begin, end;            // keys outside of begin to end are not read
  int row, target;
  Place places[kCopies];

  __device__ Loader(const FlashParameters& parameters, const Request& r, int request_number, int kv_head, int first, int last)
      : p(parameters), request(r), b(request_number), begin(first), end(last) {
    const int chunk = threadIdx.x % kRowChunks;
    row = threadIdx.x / kRowChunks;
    target = row * Map::kRowBytes + (chunk ^ row % 8) * 16;
    keys = p.k.data + kv_head * p.k.head_stride + chunk * 16;
    values = p.v.data + kv_head * p.v.head_stride + chunk * 16;
  }

  __device__ __forceinline__ bool is_inside(int key) const { return key >= begin && key < end; }

  // Keys that are nobody's become zeros: left of every window there may be a page that belongs to somebody else by now.
  __device__ __forceinline__ void load(unsigned char* slot, const unsigned char* data, const Strided& strides,
                                       int first_key) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // 8 rows further on, or 16: the permutation of chunks is the same, or for rows 4 apart moved by 4.
      const int moved = kStep % 8 == 0 ? target : target ^ (i * kStep % 8) * 16;
      const unsigned char* source = data + places[i].entry * strides.batch_stride + places[i].row * strides.row_stride;
      const uint32_t bytes = is_inside(first_key + row + i * kStep) ? 16 : 0;
      ptx::copy_16_once(slot + moved + i * kStep * Map::kRowBytes, source, bytes, policy);
    }
  }

  __device__ __forceinline__ void load_keys(unsigned char* slot, int first_key) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int key = first_key + row + i * kStep;
      places[i] = {0, 0};
      if (is_inside(key)) places[i] = place_of(p.requests, request, b, key);
    }
    load(slot, keys, p.k, first_key);
  }

  // Of the tile whose keys were loaded last.
  __device__ __forceinline__ void load_values(unsigned char* slot, int first_key) const { load(slot, values, p.v, first_key); }
};

// The queries of the block's packed rows; of rows that there are not, zeros.
template <int D, int TILES>
__device__ __forceinline__ void load_queries(unsigned char* queries, const FlashParameters& p, const Request& r, int b,
                                             int kv_head, int first_packed) {
  constexpr int ROW_BYTES = 2 * D, ROW_CHUNKS = ROW_BYTES / 16, STEP = kThreads / ROW_CHUNKS;
  const int chunk = threadIdx.x % ROW_CHUNKS;
  const unsigned char* heads = p.q.data + b * p.q.batch_stride + kv_head * p.group * p.q.head_stride + chunk * 16;
#pragma unroll
  for (int row = threadIdx.x / ROW_CHUNKS; row < TILES * kTileRows; row += STEP) {
    const int packed = first_packed + row;
    const bool exists = packed < r.rows * p.group;
    const int token = exists ? packed / p.group : 0, head = exists ? packed % p.group : 0;
    const unsigned char* source = heads + (r.first_row + token) * p.q.row_stride + head * p.q.head_stride;
    ptx::copy_16(queries + row * ROW_BYTES + (chunk ^ row % 8) * 16, exists ? source : heads, exists ? 16 : 0);
  }
}

// Where 8 scores of a row begin, in floats.
template <int KEYS>
__device__ __forceinline__ int score_place(int row, int key_tile) {
  const int moved = KEYS == 16 ? row / 2 % 2 : row % 4;
  return row * KEYS + (key_tile ^ moved) * 8;
}

// Scores of the warp's keys for all rows, as sums over the warp's columns.
template <class Type, int D, int TILES>
__device__ __forceinline__ void make_scores(const unsigned char* keys, const unsigned char* queries, unsigned char* scores) {
  using Map = Layout<D, TILES>;
  constexpr int COLUMNS = D / Map::kHalves;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int half = warp % Map::kHalves, first_tile = warp / Map::kHalves * Map::kKeyTiles;
  const int first_chunk = half * COLUMNS / 8;
  // Lane l names row l % 8 of matrix l / 8: of keys four chunks of the same 8 keys, of queries rows 0 and 8, then the next
  // chunk.
  const unsigned char* key_row = keys + (first_tile * 8 + lane % 8) * Map::kRowBytes;
  const unsigned char* query_row = queries + (lane % 16) * Map::kRowBytes;
  float sums[TILES][Map::kKeyTiles][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < COLUMNS / 8; chunk += 4) {
    uint32_t k[Map::kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < Map::kKeyTiles; ++n) {
      ptx::load_matrices(k[n], key_row + n * 8 * Map::kRowBytes + ((first_chunk + chunk + lane / 8) ^ lane % 8) * 16);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t q[4];
        const int query_chunk = (first_chunk + chunk + 2 * step + lane / 16) ^ lane % 8;
        ptx::load_matrices(q, query_row + tile * kTileRows * Map::kRowBytes + query_chunk * 16);
#pragma unroll
        for (int n = 0; n < Map::kKeyTiles; ++n) {
          ptx::multiply<Type>(sums[tile][n], q, {k[n][2 * step], k[n][2 * step + 1]}, sums[tile][n]);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    auto* rows = reinterpret_cast<float*>(scores + (tile * Map::kHalves + half) * Map::kScoreBytes);
#pragma unroll
    for (int n = 0; n < Map::kKeyTiles; ++n) {
      const auto& sum = sums[tile][n];
      *reinterpret_cast<float2*>(rows + score_place<Map::kKeys>(g, first_tile + n) + 2 * t) = {sum[0], sum[1]};
      *reinterpret_cast<float2*>(rows + score_place<Map::kKeys>(g + 8, first_tile + n) + 2 * t) = {sum[2], sum[3]};
    }
  }
}

// Two rows of a tile of 16, g and g + 8, as a lane has them: what they see, and their softmax so far. The sum is over the
// lane's own keys until the end.
struct Rows {
  Span seen[2];
  float highest[2];
  float sum[2];
};

// Caps the block's scores where they lie, two halves of a sum in the place of the first: a pass of its own, with a barrier of
// its own, because no layer of Gemma 4 asks for it and the loop would be twice as long.
template <int D, int TILES>
__device__ __forceinline__ void cap_scores(const FlashParameters& p, unsigned char* scores) {
  using Map = Layout<D, TILES>;
  constexpr int NUMBERS = Map::kScoreBytes / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < TILES * NUMBERS; i += kThreads) {
    float* score = reinterpret_cast<float*>(scores) + i / NUMBERS * Map::kHalves * NUMBERS + i % NUMBERS;
    float sum = score[0];
    if constexpr (Map::kHalves == 2) {
      sum += score[NUMBERS];
      score[NUMBERS] = 0;
    }
    score[0] = capped(sum * p.scale, p.softcap, p.inverse_softcap);
  }
}

// The lane's scores of one tile of rows become weights, and the softmax takes them in. `rescale` is what earlier sums are
// multiplied with. Key 8 n + 2 t + j of row g + 8 i is weights[n][2 i + j].
template <int D, int TILES>
__device__ __forceinline__ void fold(float scale, const unsigned char* scores, int first_key, bool crosses_edge, Rows& rows,
                                     float (&weights)[Layout<D, TILES>::kKeys / 8][4], float (&rescale)[2]) {
  using Map = Layout<D, TILES>;
  constexpr int KEY_TILES = Map::kKeys / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto* first_half = reinterpret_cast<const float*>(scores);
  const auto* second_half = reinterpret_cast<const float*>(scores + Map::kScoreBytes);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n) {
      const int place = score_place<Map::kKeys>(g + 8 * i, n) + 2 * t;
      float2 score = *reinterpret_cast<const float2*>(first_half + place);
      if constexpr (Map::kHalves == 2) {
        const float2 rest = *reinterpret_cast<const float2*>(second_half + place);
        score = {score.x + rest.x, score.y + rest.y};
      }
      weights[n][2 * i] = score.x * scale;
      weights[n][2 * i + 1] = score.y * scale;
    }
  }
  if (crosses_edge) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = first_key + 8 * n + 2 * t + j % 2;
        if (key < rows.seen[j / 2].low || key >= rows.seen[j / 2].high) weights[n][j] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float highest = rows.highest[i];
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n) highest = fmaxf(highest, fmaxf(weights[n][2 * i], weights[n][2 * i + 1]));
    highest = largest_of_row(highest);
    const float safe = safe_maximum(highest);
    rescale[i] = exponential(rows.highest[i] - safe);
    rows.highest[i] = highest;
    rows.sum[i] *= rescale[i];
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n) {
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        weights[n][j] = exponential(weights[n][j] - safe);
        rows.sum[i] += weights[n][j];
      }
    }
  }
}

// Weights times the warp's columns of the values, for one tile of rows after the other.
template <class Type, int D, int TILES>
__device__ __forceinline__ void add_values(float scale, const unsigned char* values, const unsigned char* scores, int first_key,
                                           bool crosses_edge, Rows (&rows)[TILES],
                                           float (&sums)[TILES][Layout<D, TILES>::kColumnTiles][4]) {
  using Map = Layout<D, TILES>;
  constexpr int STEPS = Map::kKeys / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t weights[TILES][STEPS][4];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    float exact[Map::kKeys / 8][4], rescale[2];
    fold<D, TILES>(scale, scores + tile * Map::kHalves * Map::kScoreBytes, first_key, crosses_edge, rows[tile], exact, rescale);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      weights[tile][step][0] = ptx::round_pair(exact[2 * step][0], exact[2 * step][1], Type());
      weights[tile][step][1] = ptx::round_pair(exact[2 * step][2], exact[2 * step][3], Type());
      weights[tile][step][2] = ptx::round_pair(exact[2 * step + 1][0], exact[2 * step + 1][1], Type());
      weights[tile][step][3] = ptx::round_pair(exact[2 * step + 1][2], exact[2 * step + 1][3], Type());
    }
#pragma unroll
    for (int c = 0; c < Map::kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][c][i] *= rescale[i / 2];
    }
  }
  // Matrices: keys 0 and 8 of a step, then the same of the next 8 columns.
  const unsigned char* value_row = values + (lane % 16) * Map::kRowBytes;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int c = 0; c < Map::kColumnTiles; c += 2) {
      uint32_t v[4];
      const int chunk = (warp * Map::kColumnTiles + c + lane / 16) ^ lane % 8;
      ptx::load_matrices_turned(v, value_row + step * 16 * Map::kRowBytes + chunk * 16);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        ptx::multiply<Type>(sums[tile][c], weights[tile][step], {v[0], v[1]}, sums[tile][c]);
        ptx::multiply<Type>(sums[tile][c + 1], weights[tile][step], {v[2], v[3]}, sums[tile][c + 1]);
      }
    }
  }
}

// What the block's chunk came to, for the rows of which it is one.
template <int D, int TILES>
__device__ __forceinline__ void store_parts(const FlashParameters& p, const Request& r, const Chunk& chunk, int b, int kv_head,
                                            int first_packed, const Rows (&rows)[TILES],
                                            const float (&sums)[TILES][Layout<D, TILES>::kColumnTiles][4]) {
  constexpr int COLUMN_TILES = Layout<D, TILES>::kColumnTiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(rows[tile].sum[i]);
      const int packed = first_packed + tile * kTileRows + g + 8 * i;
      if (packed >= r.rows * p.group) continue;
      const int row = packed / p.group, head = kv_head * p.group + packed % p.group;
      const int slot = slot_of(p.splits, chunks_of(p.requests, p.splits, r, r.end - r.rows + row), chunk);
      if (slot < 0) continue;
      const int64_t place = part_of(p.requests, p.splits, b, p.kv_heads * p.group, head, row, slot);
      const float inverse = 1 / sum;
      float* part = p.parts.values + place * D + warp * COLUMN_TILES * 8 + 2 * t;
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c) {
        *reinterpret_cast<float2*>(part + 8 * c) = {sums[tile][c][2 * i] * inverse, sums[tile][c][2 * i + 1] * inverse};
      }
      if (warp == 0 && t == 0) p.parts.lse[place] = log_sum(rows[tile].highest[i], sum);
    }
  }
}

// Grid (groups of tiles of rows x chunks of two sizes, B x KV heads): blocks that share keys start next to one another.
template <class Type, int D, int TILES>
__global__ void __launch_bounds__(kThreads, TILES == 4 ? 1 : 2) flash_decode_kernel(const FlashParameters p, int groups) {
  using Map = Layout<D, TILES>;
  GEMMA4_SHARED(shared);
  const int b = blockIdx.y / p.kv_heads, kv_head = blockIdx.y % p.kv_heads;
  const int first_packed = blockIdx.x % groups * (TILES * kTileRows), program = blockIdx.x / groups;
  const Request r = request_of(p.requests, b);
  if (first_packed >= r.rows * p.group) return;
  const int last_packed = within(first_packed + TILES * kTileRows - 1, 0, r.rows * p.group - 1);
  const int first_token = r.end - r.rows + first_packed / p.group, last_token = r.end - r.rows + last_packed / p.group;
  const Chunk chunk = choose_chunk(p.requests, p.splits, r, first_token, last_token, program);
  if (!chunk.exists) return;

  // The keys of the chunk that some row sees: windows of later rows begin and end later.
  const int chunk_begin = r.start + chunk.index * chunk.size, chunk_end = chunk_begin + chunk.size;
  const Span first_seen = seen_by(p.requests, r, first_token), last_seen = seen_by(p.requests, r, last_token);
  const int begin = within(first_seen.low, chunk_begin, chunk_end), end = within(last_seen.high, chunk_begin, chunk_end);
  const int first_key = begin - (begin - r.start) % Map::kKeys;
  const int tiles = end > begin ? (end - first_key + Map::kKeys - 1) / Map::kKeys : 0;

  unsigned char* queries = shared + Map::kQueries;
  unsigned char* scores = shared + Map::kScores;
  Loader<D, TILES> loader(p, r, b, kv_head, begin, end);
  load_queries<D, TILES>(queries, p, r, b, kv_head, first_packed);
  loader.load_keys(shared, first_key);
  ptx::commit();
  loader.load_values(shared + kSlotBytes, first_key);
  ptx::commit();

  Rows rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Rows that there are not do as the last one does, and are not stored.
      const int packed = within(first_packed + tile * kTileRows + int(threadIdx.x) % 32 / 4 + 8 * i, 0, last_packed);
      rows[tile].seen[i] = seen_by(p.requests, r, r.end - r.rows + packed / p.group);
      rows[tile].highest[i] = -INFINITY;
      rows[tile].sum[i] = 0;
    }
  }
  float sums[TILES][Map::kColumnTiles][4] = {};
  const float scale = p.softcap != 0 ? 1 : p.scale;
  int slot = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int key = first_key + tile * Map::kKeys;
    unsigned char* keys = shared + slot * kSlotBytes;
    unsigned char* values = shared + (slot == 2 ? 0 : slot + 1) * kSlotBytes;
    unsigned char* next = shared + (slot == 0 ? 2 : slot - 1) * kSlotBytes;
    ptx::wait<1>();
    __syncthreads();  // everyone's copies of these keys are there, and everyone has left the last values and the scores
    loader.load_keys(next, key + Map::kKeys);
    ptx::commit();
    make_scores<Type, D, TILES>(keys, queries, scores);
    ptx::wait<1>();
    __syncthreads();  // everyone's copies of these values are there, and everyone's scores; everyone has left the keys
    loader.load_values(keys, key + Map::kKeys);
    ptx::commit();
    if (p.softcap != 0) {
      cap_scores<D, TILES>(p, scores);
      __syncthreads();
    }
    // Whether some row does not see some key of the tile.
    const bool crosses_edge = key < last_seen.low || key + Map::kKeys > first_seen.high;
    add_values<Type, D, TILES>(scale, values, scores, key, crosses_edge, rows, sums);
    slot = slot == 0 ? 2 : slot - 1;
  }
  ptx::wait<0>();  // no copy may be under way when the block ends
  store_parts<D, TILES>(p, r, chunk, b, kv_head, first_packed, rows, sums);
}

}  // namespace gemma4::attention
