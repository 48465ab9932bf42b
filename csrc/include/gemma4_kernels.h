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

#define GEMMA4_ABI_VERSION 1

typedef enum gemma4_status {
  GEMMA4_OK = 0,
  GEMMA4_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a size that is not possible or overflows */
  GEMMA4_UNSUPPORTED = 2,      /* a meaningful call that no kernel here serves */
  GEMMA4_WORKSPACE_TOO_SMALL = 3,
  GEMMA4_CUDA_ERROR = 4        /* the runtime or the launch failed; under the emulator also what it found wrong */
} gemma4_status;

typedef enum gemma4_dtype { GEMMA4_BF16 = 0, GEMMA4_FP16 = 1, GEMMA4_FP32 = 2 } gemma4_dtype;

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
  /* The same sizes: scales[n, i] is fp16 d of 256 columns, group_scales int8 (n, k / 32); scale = d * group_scales[n, j]. */
  GEMMA4_SCALES_INT8 = 2,
  GEMMA4_SCALES_E8M0 = 3 /* scales uint8 (n, k / group_size); scale = 2^(scales[n, j] - 128) */
} gemma4_scales;

/* A cudaStream_t; 0 is the default stream. */
typedef void* gemma4_stream;

/* A weight of n rows (outputs) and k columns (inputs), with 4-bit codes in the order of `QuantizedWeight`: eight neighbours of a
 * row are one 32-bit word, in which neighbour i stands at bit 16 * (i % 2) + 4 * (i / 2). */
typedef struct gemma4_weight {
  int64_t n;
  int64_t k;           /* a multiple of 32 and of group_size */
  int64_t group_size;  /* a multiple of 32 */
  const void* codes;   /* uint32 (n, k / 8), 16-byte aligned */
  const void* scales;       /* (n, k / group_size), aligned to its elements; six-bit and int8: (n, k / 256) */
  const void* zeros;        /* uint8 (n, k / group_size), each at most 16, for GEMMA4_ZEROS; else null */
  const void* offsets;      /* as scales, for GEMMA4_OFFSETS; else null */
  const void* group_scales; /* for GEMMA4_SCALES_SIX_BIT and GEMMA4_SCALES_INT8, 4-byte aligned; else null */
  const float* table;       /* (16), for GEMMA4_TABLE; else null */
  int32_t scale_dtype;      /* of scales and offsets: gemma4_dtype; of no meaning for GEMMA4_SCALES_E8M0 */
  int32_t values;           /* gemma4_values */
  int32_t scale_kind;       /* gemma4_scales; six-bit goes with GEMMA4_OFFSETS, int8 and e8m0 with GEMMA4_TABLE */
  int32_t zero;             /* 0 to 16, for GEMMA4_CENTRED */
} gemma4_weight;

/* out (m, n) = x (m, k) W^T + bias, 0 <= m <= 16, summed in fp32 and rounded once. The bits of a row depend on its own numbers,
 * the weight, the device and pieces, not on m or on the other rows. */
typedef struct gemma4_linear_arguments {
  gemma4_weight weight;
  int64_t m;
  int64_t x_stride;   /* elements from row to row of x; a multiple of 8, at least k */
  int64_t out_stride; /* elements from row to row of out; at least n */
  const void* x;      /* bf16 or fp16, 16-byte aligned, dense rows */
  void* out;          /* as x, aligned to its elements, dense rows */
  const void* bias;   /* (n), or null */
  int32_t dtype;      /* of x and out: gemma4_dtype */
  int32_t bias_dtype; /* gemma4_dtype */
  int32_t pieces;     /* of k, each a sum of its own: at most so many, of whole stages of 256 columns; 0 leaves it to the
                       * library. The same for every m, or a row's bits depend on m. */
} gemma4_linear_arguments;

GEMMA4_API int32_t gemma4_abi_version(void);

/* What the calling thread's last failed call had to say; "" before the first. Valid until its next failed call. */
GEMMA4_API const char* gemma4_last_error(void);

/* The architectures that there is machine code for, "80 86 89 90 120"; newer ones are compiled from PTX by the driver. */
GEMMA4_API const char* gemma4_architectures(void);

/* GEMMA4_CUDA_ERROR if there is no driver, or one older than the CUDA release that this library was built with. */
GEMMA4_API gemma4_status gemma4_check_driver(void);

/* Bytes that gemma4_linear wants of a 16-byte aligned workspace on the current device; may be 0. */
GEMMA4_API gemma4_status gemma4_linear_workspace(const gemma4_linear_arguments* arguments, size_t* bytes);

GEMMA4_API gemma4_status gemma4_linear(const gemma4_linear_arguments* arguments, void* workspace, size_t workspace_bytes,
                                       gemma4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
