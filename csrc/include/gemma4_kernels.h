/* The C interface of gemma4_kernels: CUDA kernels for Gemma 4, for any language that can call C.
 *
 * Every function takes raw device pointers, sizes, strides in elements, a workspace and a stream, and returns a status. Nothing
 * here allocates, synchronises or keeps state, but for the message of a thread's last failure. On any status but GEMMA4_OK
 * nothing has been launched, unless it is GEMMA4_CUDA_ERROR.
 *
 * docs/cuda.md has the kernels' schedules; examples/c_interface.cpp is a complete caller.
 */
#ifndef GEMMA4_KERNELS_H
#define GEMMA4_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define GEMMA4_API __declspec(dllexport)
#else
#define GEMMA4_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GEMMA4_ABI_VERSION 2

typedef enum gemma4_status {
  GEMMA4_OK = 0,
  GEMMA4_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a size that is not possible or overflows */
  GEMMA4_UNSUPPORTED = 2,      /* a meaningful call that no kernel here serves */
  GEMMA4_WORKSPACE_TOO_SMALL = 3,
  GEMMA4_CUDA_ERROR = 4        /* the runtime or the launch failed; under the emulator also what it found wrong */
} gemma4_status;

typedef enum gemma4_dtype { GEMMA4_BF16 = 0, GEMMA4_FP16 = 1, GEMMA4_FP32 = 2 } gemma4_dtype;

/* A cudaStream_t; 0 is the default stream. */
typedef void* gemma4_stream;

/* The library ----------------------------------------------------------------------------------------------------------- */

GEMMA4_API int32_t gemma4_abi_version(void);

/* What the calling thread's last failed call had to say; "" before the first. Valid until its next failed call. */
GEMMA4_API const char* gemma4_last_error(void);

/* The architectures that there is machine code for, "80 86 89 90 120"; newer ones are compiled from PTX by the driver. */
GEMMA4_API const char* gemma4_architectures(void);

/* Kernels that the calling thread has launched through this library. */
GEMMA4_API uint64_t gemma4_launches(void);

/* GEMMA4_CUDA_ERROR if there is no driver, or one older than the CUDA release that this library was built with. */
GEMMA4_API gemma4_status gemma4_check_driver(void);

/* Products with quantised weights --------------------------------------------------------------------------------------- */

/* How a code q of group j becomes a value; docs/quantization.md has the schemes by name. */
typedef enum gemma4_values {
  GEMMA4_CENTRED = 0, /* scale[n, j] * (q - zero) */
  GEMMA4_ZEROS = 1,   /* scale[n, j] * (q - zeros[n, j]) */
  GEMMA4_OFFSETS = 2, /* scale[n, j] * q + offset[n, j] */
  GEMMA4_TABLE = 3    /* scale[n, j] * table[q], the table rounded to the dtype of x */
} gemma4_values;

/* How the scale of group j is stored, and the offset with it. */
typedef enum gemma4_scales {
  GEMMA4_SCALES_PLAIN = 0, /* one number */
  /* Groups of 32, k a multiple of 256. scales[n, i] is fp16 d and offsets[n, i] fp16 dmin of 256 columns, group_scales[n, i] three
   * words w with the 6-bit codes of its groups j = 0..7:
   *   scale = d * ((w0 >> 4j & 15) + 16 * (w2 >> 2j & 3)),   offset = -dmin * ((w1 >> 4j & 15) + 16 * (w2 >> (16 + 2j) & 3)) */
  GEMMA4_SCALES_SIX_BIT = 1,
  /* k a multiple of 256, groups of 32, of 6-bit codes 16: scales[n, i] is fp16 d of 256 columns, group_scales int8
   * (n, k / group_size); scale = d * group_scales[n, j]. */
  GEMMA4_SCALES_INT8 = 2,
  GEMMA4_SCALES_E8M0 = 3, /* scales uint8 (n, k / group_size); scale = 2^(scales[n, j] - 128) */
  /* scales uint8 (n, g) with g = k / group_size;
   * scale = scale_table[scales[n, j]] * scale_scales[(n * g + j) / 256] + scale_offset */
  GEMMA4_SCALES_NESTED = 4
} gemma4_scales;

/* A weight of n rows (outputs) and k columns (inputs), with codes in the order of `QuantizedWeight`. A plane of b bits has 32 / b
 * neighbours of a row in one 32-bit word, neighbour i at bit 16 * (i % 2) + b * (i / 2). Codes of up to 6 bits are a plane of their
 * low 4 bits, `codes`, and one of the bits above, `high`; those of 8 bits are signed bytes in order. */
typedef struct gemma4_weight {
  int64_t n;
  int64_t k;           /* a multiple of 32 and of group_size */
  int64_t group_size;  /* a multiple of 32; of 6-bit codes 16 */
  const void* codes;   /* uint32 (n, k / 8), of 8 bits int8 (n, k); 16-byte aligned */
  const void* high;    /* of 5 bits uint32 (n, k / 32), of 6 bits uint32 (n, k / 16), 16-byte aligned; else null */
  const void* scales;       /* (n, k / group_size), aligned to its elements; six-bit and int8: (n, k / 256) */
  const void* zeros;        /* uint8 (n, k / group_size), each at most 16, for GEMMA4_ZEROS; else null */
  const void* offsets;      /* as scales, for GEMMA4_OFFSETS; else null */
  const void* group_scales; /* for GEMMA4_SCALES_SIX_BIT and GEMMA4_SCALES_INT8, 4-byte aligned; else null */
  const float* table;       /* (16), for GEMMA4_TABLE; else null */
  const float* scale_table;  /* (256), for GEMMA4_SCALES_NESTED; else null, like the next two */
  const float* scale_scales; /* (ceil(n * (k / group_size) / 256)) */
  const float* scale_offset; /* (1) */
  int32_t scale_dtype;      /* of scales and offsets: gemma4_dtype; of no meaning where scales are bytes */
  int32_t values;           /* gemma4_values */
  int32_t scale_kind;       /* gemma4_scales */
  int32_t zero;             /* for GEMMA4_CENTRED: 0 to 2^bits, of 8 bits 0 */
  /* 4 bits: plain with all values, of GEMMA4_TABLE fp16 or fp32; six-bit with GEMMA4_OFFSETS; the others with GEMMA4_TABLE.
   * 5 bits: fp16, plain with GEMMA4_CENTRED and GEMMA4_OFFSETS, six-bit with GEMMA4_OFFSETS.
   * 6 bits: int8 with GEMMA4_CENTRED. 8 bits: plain fp16 with GEMMA4_CENTRED. */
  int32_t bits;
} gemma4_weight;

/* out (m, n) = x (m, k) W^T + bias + residual, 0 <= m <= 16, summed in fp32 and rounded once. The bits of a row depend on its
 * own numbers, the weight, the device and pieces, not on m or on the other rows. */
typedef struct gemma4_linear_arguments {
  gemma4_weight weight;
  int64_t m;
  int64_t x_stride;   /* elements from row to row of x; a multiple of 8, at least k */
  int64_t out_stride; /* elements from row to row of out; at least n */
  const void* x;      /* bf16 or fp16, 16-byte aligned, dense rows */
  void* out;          /* as x, aligned to its elements, dense rows */
  const void* bias;   /* (n), or null */
  int32_t dtype;      /* of x, out and residual: gemma4_dtype */
  int32_t bias_dtype; /* gemma4_dtype */
  const void* residual;    /* (m, n) as out, which it may be, or null */
  int64_t residual_stride; /* elements from row to row of residual; at least n */
  int32_t pieces; /* of k, each a sum of its own: at most so many, of whole stages of 256 columns, of 8-bit codes 128; 0
                   * leaves it to the library. The same for every m, or a row's bits depend on m. */
} gemma4_linear_arguments;

/* out (m, n) = gelu(x G^T) * (x U^T), gelu by its tanh approximation, all in fp32 and rounded once. gate and up are weights of one
 * shape, group_size, values, scale_kind, scale_dtype and zero. The rest is as in gemma4_linear_arguments. */
typedef struct gemma4_linear_geglu_arguments {
  gemma4_weight gate;
  gemma4_weight up;
  int64_t m;
  int64_t x_stride;
  int64_t out_stride;
  const void* x;
  void* out;
  int32_t dtype;
  int32_t pieces; /* of k, for both weights */
} gemma4_linear_geglu_arguments;

/* indices (m): for each row of x the output that gemma4_linear, with the same pieces, makes largest, the lowest of equals; -1
 * for a row with a NaN. The outputs themselves are not written. The rest is as in gemma4_linear_arguments. */
typedef struct gemma4_linear_argmax_arguments {
  gemma4_weight weight;
  int64_t m;
  int64_t x_stride;
  const void* x;
  int64_t* indices;
  int32_t dtype;
  int32_t pieces;
} gemma4_linear_argmax_arguments;

/* out (m, k): row ids[i] of the weight, dequantised in fp32 and rounded once; NaN for an id that is no row. */
typedef struct gemma4_embedding_arguments {
  gemma4_weight weight;
  int64_t m;
  int64_t out_stride;     /* elements from row to row of out; at least k */
  const void* ids;        /* (m) int32 or int64, on the device */
  const int32_t* columns; /* (k): stored column j goes to column columns[j] of out, if that is one; or null: to j */
  void* out;              /* aligned to its elements, dense rows */
  int32_t ids_are_64_bit;
  int32_t dtype;          /* of out: gemma4_dtype */
} gemma4_embedding_arguments;

/* Bytes that gemma4_linear wants of a 16-byte aligned workspace on the current device; may be 0. */
GEMMA4_API gemma4_status gemma4_linear_workspace(const gemma4_linear_arguments* arguments, size_t* bytes);

GEMMA4_API gemma4_status gemma4_linear(const gemma4_linear_arguments* arguments, void* workspace, size_t workspace_bytes,
                                       gemma4_stream stream);

/* The fused forms, called the same way. */
GEMMA4_API gemma4_status gemma4_linear_geglu_workspace(const gemma4_linear_geglu_arguments* arguments, size_t* bytes);
GEMMA4_API gemma4_status gemma4_linear_geglu(const gemma4_linear_geglu_arguments* arguments, void* workspace,
                                             size_t workspace_bytes, gemma4_stream stream);
GEMMA4_API gemma4_status gemma4_linear_argmax_workspace(const gemma4_linear_argmax_arguments* arguments, size_t* bytes);
GEMMA4_API gemma4_status gemma4_linear_argmax(const gemma4_linear_argmax_arguments* arguments, void* workspace,
                                              size_t workspace_bytes, gemma4_stream stream);

GEMMA4_API gemma4_status gemma4_embedding(const gemma4_embedding_arguments* arguments, gemma4_stream stream);

/* Attention over a cache ------------------------------------------------------------------------------------------------ */

/* Whose rows and keys are whose. Numbers behind pointers lie on the device: kernels hold each within what exists, and read no
 * page or entry besides. Row i of a request is the token at position end - rows + i. */
typedef struct gemma4_requests {
  int64_t batch;
  int64_t rows;         /* query rows of each request, with cu_q the most; 0 to 16 */
  int64_t capacity;     /* the most keys of a request */
  int64_t total_rows;   /* of q and out, with cu_q; else 0 */
  int64_t total_keys;   /* of k and v, with cu_k and without block_table; else 0 */
  int64_t entries;      /* of the cache: contiguous ones, or pages; with total_keys of no meaning */
  int64_t page_size;    /* rows of a page, with block_table; else 0 */
  int64_t table_stride; /* elements from request to request of block_table */
  const int32_t* cu_q;        /* (batch + 1): request b has rows cu_q[b] to cu_q[b + 1] of q; or null */
  const int32_t* cu_k;        /* the same for keys; or null */
  const int32_t* lengths;     /* (batch) keys in use; or null: capacity, or what cu_k says */
  const int32_t* first;       /* (batch) the first key in use; or null: 0 */
  const int32_t* entry;       /* (batch) the request's entry of the cache; or null: its own number */
  const int32_t* block_table; /* (batch, pages of a request), or null */
} gemma4_requests;

/* A tensor (requests, entries or pages; rows; heads; head_dim) with a dense last dimension; strides in elements. */
typedef struct gemma4_rows {
  const void* data;
  int64_t batch_stride; /* of requests, entries or pages */
  int64_t row_stride;
  int64_t head_stride;
} gemma4_rows;

/* What all attention over a cache has. */
typedef struct gemma4_attention {
  gemma4_requests requests;
  gemma4_rows q;
  gemma4_rows v; /* as q and keys: pointer 16-byte aligned, strides multiples of 8 */
  void* out;     /* (requests; rows; heads; head_dim) like q, aligned to its elements */
  int64_t out_batch_stride;
  int64_t out_row_stride;
  int64_t out_head_stride;
  float* lse; /* natural log of the sum of exponentials (requests; heads; rows), dense rows */
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  int64_t query_heads; /* a multiple of kv_heads */
  int64_t kv_heads;
  int64_t head_dim;
  float scale;   /* of scores */
  int32_t dtype; /* of q, the cache and out: gemma4_dtype */
} gemma4_attention;

/* Keys and values side by side, head_dim 64, 128 or 256. A row sees left neighbours on its left and right on its right, -1 for
 * all; causal is right = 0. Scores become softcap * tanh(score / softcap) where softcap is not 0. A row that sees nothing gets
 * zeros and -inf. The bits of a row depend on its own keys, their positions and the device only. */
typedef struct gemma4_flash_decode_arguments {
  gemma4_attention attention;
  gemma4_rows k;
  int64_t left;
  int64_t right;
  float softcap;
} gemma4_flash_decode_arguments;

/* Values in 8 bits: a value is code * scale, rounded to the dtype of q. */
typedef enum gemma4_codes {
  GEMMA4_CODES_NONE = 0,   /* the dtype of q */
  GEMMA4_CODES_FLOAT8 = 1, /* e4m3 without infinities */
  GEMMA4_CODES_INT8 = 2
} gemma4_codes;

/* Values alone, keys a function of them: k[j] = rope(v[j] * k_norm_weight, j), head_dim 128, 256 or 512. Pair
 * (d, d + head_dim / 2) rotates by position * inv_freq[d]; row i of a request sees the keys up to its own token. Row j of a
 * request is position j: cu_q, cu_k, first and entry are null. With codes, head_dim is 128 or 512 and strides of v are multiples of 16. */
typedef struct gemma4_k_eq_v_decode_arguments {
  gemma4_attention attention;
  const void* k_norm_weight;    /* (head_dim) */
  const void* inv_freq;         /* (head_dim / 2) in radians per position, float, or double */
  int32_t weight_dtype;         /* gemma4_dtype */
  int32_t inv_freq_is_double;   /* 0 or 1 */
  int32_t codes;                /* gemma4_codes */
  gemma4_rows values_scale;     /* float, of a row and head of v where the strides say so; without codes null */
} gemma4_k_eq_v_decode_arguments;

/* The workspace is at most batch * query_heads * rows * slots * (head_dim + 1) * 4 bytes, slots bounded by the device. */
GEMMA4_API gemma4_status gemma4_flash_decode_workspace(const gemma4_flash_decode_arguments* arguments, size_t* bytes);

GEMMA4_API gemma4_status gemma4_flash_decode(const gemma4_flash_decode_arguments* arguments, void* workspace,
                                             size_t workspace_bytes, gemma4_stream stream);

GEMMA4_API gemma4_status gemma4_k_eq_v_decode_workspace(const gemma4_k_eq_v_decode_arguments* arguments, size_t* bytes);

GEMMA4_API gemma4_status gemma4_k_eq_v_decode(const gemma4_k_eq_v_decode_arguments* arguments, void* workspace,
                                              size_t workspace_bytes, gemma4_stream stream);

/* In front of attention ------------------------------------------------------------------------------------------------- */

/* A cache that takes new rows: (entries, entry_rows, kv_heads, head_dim), dense in the last dim. */
typedef struct gemma4_prologue_cache {
  void* data;
  int64_t entry_stride; /* elements */
  int64_t row_stride;
  int64_t head_stride;
} gemma4_prologue_cache;

/* From the projections of a layer to a query and rows in a cache:
 *
 *   out = rope(norm(q) * q_weight)      k_cache <- rope(norm(k) * k_weight)      v_cache <- norm(v)
 *
 * A norm is over head_dim, in fp32, and rounded once. rope(x) is x * cos + rotate_half(x) * sin with rotate_half((a, b)) = (-b, a),
 * each of its three operations rounded to dtype. Row i of a request goes to row lengths[request] + i of its cache, which is entry
 * `request`, or the pages that its row of the block table names. Lengths and pages are looked at on the device: a row for which there
 * is no place is left out. Two rows for one place leave either of them there.
 *
 * With codes, which go with values alone, v_cache holds 8 bits a number. Of a value x, rounded to dtype,
 *   float8   x / v_scale of its head, to nearest, what lies beyond the range as its largest number
 *   int8     x / s, to nearest, where s, written to v_scale, is the largest magnitude of the row and head / 127; a NaN or
 *            infinity among them makes s NaN */
typedef struct gemma4_prologue_arguments {
  int64_t batch;
  int64_t rows; /* of each request */
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim; /* even, up to 512 */
  gemma4_rows q; /* in dtype, like k, v, cos, sin, out and the caches; each aligned to its elements */
  gemma4_rows k;
  gemma4_rows v;
  const void* q_weight; /* (head_dim) */
  const void* k_weight; /* (head_dim) */
  const void* cos;      /* (batch, rows, head_dim), dense in the last dim; a batch stride of 0 is one rotation for all */
  const void* sin;
  int64_t cos_batch_stride;
  int64_t cos_row_stride;
  int64_t sin_batch_stride;
  int64_t sin_row_stride;
  void* out; /* (batch, rows, q_heads, head_dim), dense */
  gemma4_prologue_cache k_cache;
  gemma4_prologue_cache v_cache;
  int64_t entries;    /* of both caches: at least batch, or the number of pages */
  int64_t entry_rows; /* the capacity of a request, or the size of a page */
  const void* lengths;     /* (batch) int32 or int64: rows in use before the call */
  const void* block_table; /* (batch, table_columns) int32 or int64, dense in the last dim; or null */
  int64_t table_stride;
  int64_t table_columns;
  int32_t lengths_are_64_bit;
  int32_t block_table_is_64_bit;
  int32_t dtype; /* gemma4_dtype, like the next two */
  int32_t q_weight_dtype;
  int32_t k_weight_dtype;
  float eps;
  int32_t codes;                 /* gemma4_codes, of v_cache */
  gemma4_prologue_cache v_scale; /* float; of float8 (kv_heads), read; of int8 (entries, entry_rows, kv_heads); else null */
} gemma4_prologue_arguments;

GEMMA4_API gemma4_status gemma4_qkv_prologue(const gemma4_prologue_arguments* arguments, gemma4_stream stream);

/* For a layer whose k and v are one projection and whose cache holds values alone: v is what k_proj gave, and k, k_weight and k_cache
 * are null. */
GEMMA4_API gemma4_status gemma4_k_eq_v_prologue(const gemma4_prologue_arguments* arguments, gemma4_stream stream);

/* Between sublayers ----------------------------------------------------------------------------------------------------- */

/* hidden = (residual + norm(x) * post_weight) * layer_scalar and normed = norm(hidden) * pre_weight, all of them (m, n), where
 * norm(x) is x / sqrt(mean(x^2) + eps) of a row. Sums are fp32; norm times weight, sum and product are each rounded to dtype. hidden
 * may be x or residual, and normed may be the other one: each row with the same stride. */
typedef struct gemma4_sandwich_norm_arguments {
  int64_t m;
  int64_t n;               /* 1 to 16384 */
  int64_t x_stride;        /* elements from row to row, at least 0 for x and residual, at least n for hidden and normed; rows are */
  int64_t residual_stride; /* dense. Rows and weights at multiples of 16 bytes, with n a multiple of 8, are taken 16 bytes at a */
  int64_t hidden_stride;   /* time */
  int64_t normed_stride;
  const void* x; /* these four in dtype, aligned to their elements */
  const void* residual;
  void* hidden;
  void* normed; /* null without pre_weight */
  const void* post_weight;  /* (n) */
  const void* pre_weight;   /* (n), or null: there is no second norm */
  const void* layer_scalar; /* one number on the device, or null: there is no product */
  float eps;
  int32_t dtype; /* gemma4_dtype, like the next three */
  int32_t post_weight_dtype;
  int32_t pre_weight_dtype;
  int32_t layer_scalar_dtype;
} gemma4_sandwich_norm_arguments;

GEMMA4_API gemma4_status gemma4_sandwich_norm(const gemma4_sandwich_norm_arguments* arguments, gemma4_stream stream);

/* Verification ---------------------------------------------------------------------------------------------------------- */

/* How drafts are accepted; docs/mtp.md has the methods, the filters and the noise. */
typedef enum gemma4_method { GEMMA4_MATCH = 0, GEMMA4_REJECTION = 1, GEMMA4_BLOCK = 2 } gemma4_method;

/* From the target's logits over a bonus token and K drafts to the tokens that each of B requests emits; with K = 0 a sample for
 * each. Tokens do not depend on the batch, the strides or the device. Lengths and tokens out of range mean the nearest that is
 * possible, and no token. Pointers are to device memory, but for `ends`. */
typedef struct gemma4_verify_arguments {
  int64_t batch;        /* B */
  int64_t drafts_count; /* K, at most 4095 */
  int64_t vocabulary;   /* V, at most 2^24 */
  const void* logits;   /* (B, K + 1, V), rows dense, strides in elements */
  int64_t stride_batch;
  int64_t stride_row;
  const void* draft_logits; /* (B, K, V), of the same dtype, for rejection and block; or null */
  int64_t draft_stride_batch;
  int64_t draft_stride_row;
  const int64_t* draft_tokens;   /* (B, K) */
  const int64_t* num_drafts;     /* (B), or null for K each */
  const int64_t* max_new_tokens; /* (B), or null */
  const float* temperature;      /* (B); 0 is greedy */
  const int64_t* top_k;          /* (B); 0 for all */
  const float* cut;              /* (B); 1 - top_p */
  const float* min_p;            /* (B) */
  const float* softcap;          /* (B); 0 for none */
  const int64_t* seeds;          /* (B); the key of the noise */
  const int64_t* positions;      /* (B); of the token that row 0 predicts */
  const int64_t* ends;           /* host memory: tokens that end a text */
  int64_t* tokens;               /* out (B, K + 1), -1 behind what is emitted */
  int64_t* num_accepted;         /* out (B) */
  int64_t* next_token;           /* out (B); -1 if nothing was emitted */
  int64_t* num_emitted;          /* out (B) */
  int64_t* hidden_row;           /* out (B); the row that next_token comes from */
  uint8_t* finished;             /* out (B); 0 or 1: next_token ends the text */
  uint8_t* refused;              /* out (B); 0 or 1: a row that matters has no distribution; nothing is emitted */
  int32_t dtype;                 /* of logits and draft_logits: gemma4_dtype */
  int32_t method;                /* gemma4_method */
  int32_t stream;                /* of the noise, 0 for samples of the target, 3 for a drafter's own */
  int32_t ends_count;            /* at most 64 */
} gemma4_verify_arguments;

/* Bytes that gemma4_verify wants of a 16-byte aligned workspace. */
GEMMA4_API gemma4_status gemma4_verify_workspace(const gemma4_verify_arguments* arguments, size_t* bytes);

GEMMA4_API gemma4_status gemma4_verify(const gemma4_verify_arguments* arguments, void* workspace, size_t workspace_bytes,
                                       gemma4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
