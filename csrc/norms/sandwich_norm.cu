// gemma4_sandwich_norm: what stands between two sublayers of a layer.
//
//   hidden = (residual + norm(x) * post_weight) * layer_scalar        normed = norm(hidden) * pre_weight
//
//   x, residual, hidden, normed   (m, n) in one type, rows dense        weights   (n), each in a type of its own
//
// A block owns a row and holds it in registers, eight neighbours of it in a thread (16 for rows of more than 8192 numbers): x
// and residual are read once, hidden and normed written once. The weights' loads come after a barrier that waits for x; they
// are sent ahead to L1, for which no thread waits.
//
// Order of a sum of squares: a thread's eight, then the next eight that it has, lanes and then warps in pairs. It depends on n
// only, so a row's bits do not depend on the others. Shared memory: 32 sums of warps for each of the two norms, 256 bytes.
#include <cmath>

#include "../common/checks.h"
#include "../common/rms_norm.cuh"

namespace gemma4::norms {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostChunks = 2;  // of eight numbers in a thread: more would not fit into 64 registers
constexpr int kMostNumbers = kMostThreads * kMostChunks * kEight;
constexpr int kSums = 32;  // warps of a block

struct Parameters {
  const void *x, *residual, *post_weight, *pre_weight, *layer_scalar;
  void *hidden, *normed;
  int64_t x_stride, residual_stride, hidden_stride, normed_stride;  // elements
  int n;
  int post_weight_dtype, pre_weight_dtype, layer_scalar_dtype;
  float eps;
  bool whole;  // every row and weight may be taken 16 bytes at a time
};

template <class Type>
__device__ __forceinline__ const void* row_of(const void* base, int64_t stride) {
  return static_cast<const Bits<Type>*>(base) + blockIdx.x * stride;
}
template <class Type>
__device__ __forceinline__ void* row_of(void* base, int64_t stride) {
  return static_cast<Bits<Type>*>(base) + blockIdx.x * stride;
}

__device__ __forceinline__ void send_ahead(const void* weight, int dtype, int first, int count) {
  if (weight != nullptr && first < count) ptx::prefetch(static_cast<const unsigned char*>(weight) + first * bytes_of(dtype));
}

// The sum over the block, the same bits in each thread; `sums` is used once.
__device__ __forceinline__ float sum_of_block(float own, float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  own = sum_of_lanes<32>(own);
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  return sum_of_lanes<32>(lane < int(blockDim.x) / 32 ? sums[lane] : 0.0f);
}

template <int CHUNKS>
__device__ __forceinline__ float inverse_rms_of_row(const float (&x)[CHUNKS][kEight], const Parameters& p, float* sums) {
  float sum = 0;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) sum = add_squares(sum, x[chunk]);
  return inverse_rms(sum_of_block(sum, sums), p.n, p.eps);
}

// (residual + normed) * layer_scalar, each operation rounded; into `normed`.
template <class Type>
__device__ __forceinline__ void add_residual(float (&normed)[kEight], const float (&residual)[kEight], bool scaled,
                                             float scalar) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    normed[i] = rounded<Type>(__fadd_rn(residual[i], normed[i]));
    if (scaled) normed[i] = rounded<Type>(__fmul_rn(normed[i], scalar));
  }
}

template <class Type, int CHUNKS>
__global__ void __launch_bounds__(kMostThreads) sandwich_norm_kernel(const Parameters p) {
  GEMMA4_SHARED(shared);
  auto* sums = reinterpret_cast<float*>(shared);  // [2][kSums]
  const int step = kEight * blockDim.x, start = kEight * threadIdx.x;
  const void* x_row = row_of<Type>(p.x, p.x_stride);
  const void* residual_row = row_of<Type>(p.residual, p.residual_stride);
  float x[CHUNKS][kEight], residual[CHUNKS][kEight], weight[kEight];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int first = start + chunk * step;
    load_eight<Type>(x[chunk], x_row, first, p.n, p.whole);
    load_eight<Type>(residual[chunk], residual_row, first, p.n, p.whole);
    send_ahead(p.post_weight, p.post_weight_dtype, first, p.n);
    send_ahead(p.pre_weight, p.pre_weight_dtype, first, p.n);
  }
  float scalar[kEight] = {};
  if (p.layer_scalar != nullptr) load_eight(scalar, p.layer_scalar, p.layer_scalar_dtype, 0, 1, false);

  float inverse = inverse_rms_of_row<CHUNKS>(x, p, sums);
  void* hidden_row = row_of<Type>(p.hidden, p.hidden_stride);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int first = start + chunk * step;
    load_eight(weight, p.post_weight, p.post_weight_dtype, first, p.n, p.whole);
    scale_eight<Type>(x[chunk], inverse, weight);
    add_residual<Type>(x[chunk], residual[chunk], p.layer_scalar != nullptr, scalar[0]);
    store_eight<Type>(hidden_row, x[chunk], first, p.n, p.whole);
  }
  if (p.pre_weight == nullptr) return;

  inverse = inverse_rms_of_row<CHUNKS>(x, p, sums + kSums);
  void* normed_row = row_of<Type>(p.normed, p.normed_stride);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int first = start + chunk * step;
    load_eight(weight, p.pre_weight, p.pre_weight_dtype, first, p.n, p.whole);
    scale_eight<Type>(x[chunk], inverse, weight);
    store_eight<Type>(normed_row, x[chunk], first, p.n, p.whole);
  }
}

// The C interface -------------------------------------------------------------------------------------------------------------

constexpr Checks kChecks{"gemma4_sandwich_norm"};
constexpr int64_t kMostElements = int64_t(1) << 60;  // from the first to the last of a tensor: no offset overflows

// Rows of a tensor that must be there, dense, `least` elements apart or more.
gemma4_status check_rows(const char* name, const void* address, int64_t stride, int64_t least,
                         const gemma4_sandwich_norm_arguments& a) {
  if (auto status = kChecks.pointer(name, address, bytes_of(a.dtype))) return status;
  if (stride >= least && stride <= kMostElements / a.m) return GEMMA4_OK;
  return kChecks.invalid(std::string(name) + "_stride must lie in [" + number(least) + ", 2^60 / m], got " + number(stride));
}

gemma4_status check_weight(const char* name, const void* address, int dtype) {
  if (!is_dtype(dtype)) return kChecks.invalid(std::string(name) + "_dtype " + number(dtype) + " is no gemma4_dtype");
  return kChecks.pointer(name, address, bytes_of(dtype));
}

gemma4_status check(const gemma4_sandwich_norm_arguments* arguments) {
  if (arguments == nullptr) return kChecks.invalid("arguments is null");
  const gemma4_sandwich_norm_arguments& a = *arguments;
  if (a.m < 0 || a.m > INT32_MAX) return kChecks.invalid("m must lie in [0, 2147483647], got " + number(a.m));
  if (a.n < 1) return kChecks.invalid("n must be at least 1, got " + number(a.n));
  if (a.n > kMostNumbers) return kChecks.unsupported("n goes to " + number(kMostNumbers) + ", got " + number(a.n));
  if (!is_dtype(a.dtype)) return kChecks.invalid("dtype " + number(a.dtype) + " is no gemma4_dtype");
  if (!(a.eps > 0) || std::isinf(a.eps)) return kChecks.invalid("eps must be positive and finite");
  if (a.m == 0) return GEMMA4_OK;
  if ((a.pre_weight == nullptr) != (a.normed == nullptr)) return kChecks.invalid("pre_weight and normed go together");
  if (auto status = check_rows("x", a.x, a.x_stride, 0, a)) return status;
  if (auto status = check_rows("residual", a.residual, a.residual_stride, 0, a)) return status;
  if (auto status = check_rows("hidden", a.hidden, a.hidden_stride, a.n, a)) return status;
  if (auto status = check_weight("post_weight", a.post_weight, a.post_weight_dtype)) return status;
  if (a.layer_scalar != nullptr) {
    if (auto status = check_weight("layer_scalar", a.layer_scalar, a.layer_scalar_dtype)) return status;
  }
  if (a.pre_weight == nullptr) return GEMMA4_OK;
  if (auto status = check_rows("normed", a.normed, a.normed_stride, a.n, a)) return status;
  return check_weight("pre_weight", a.pre_weight, a.pre_weight_dtype);
}

bool is_whole(const gemma4_sandwich_norm_arguments& a) {
  const int64_t elements = 16 / bytes_of(a.dtype);
  for (const int64_t stride : {a.x_stride, a.residual_stride, a.hidden_stride, a.normed == nullptr ? 0 : a.normed_stride}) {
    if (a.m > 1 && stride % elements != 0) return false;
  }
  for (const void* pointer : {a.x, a.residual, a.post_weight, a.pre_weight, (const void*)a.hidden, (const void*)a.normed}) {
    if (!is_aligned(pointer, 16)) return false;
  }
  return a.n % kEight == 0;
}

template <class Type>
std::string launch_for(const Parameters& p, unsigned rows, void* stream) {
  const int eights = (p.n + kEight - 1) / kEight;
  const bool one = eights <= kMostThreads;
  const auto kernel = one ? sandwich_norm_kernel<Type, 1> : sandwich_norm_kernel<Type, kMostChunks>;
  const int wanted = one ? eights : (eights + kMostChunks - 1) / kMostChunks;
  return launch(kernel, rows, 1, unsigned((wanted + 31) / 32 * 32), 2 * kSums * sizeof(float), stream, p);
}

}  // namespace
}  // namespace gemma4::norms

extern "C" gemma4_status gemma4_sandwich_norm(const gemma4_sandwich_norm_arguments* arguments, gemma4_stream stream) {
  using namespace gemma4;
  using namespace gemma4::norms;
  if (auto status = check(arguments)) return status;
  const gemma4_sandwich_norm_arguments& a = *arguments;
  if (a.m == 0) return GEMMA4_OK;
  const Parameters p{
      a.x,        a.residual,        a.post_weight,   a.pre_weight,    a.layer_scalar,      a.hidden,
      a.normed,   a.x_stride,        a.residual_stride, a.hidden_stride, a.normed_stride,     int(a.n),
      a.post_weight_dtype, a.pre_weight_dtype, a.layer_scalar_dtype, a.eps, is_whole(a),
  };
  auto launch_type = launch_for<Fp32>;
  if (a.dtype == GEMMA4_BF16) launch_type = launch_for<Bf16>;
  if (a.dtype == GEMMA4_FP16) launch_type = launch_for<Fp16>;
  return kChecks.launched(launch_type(p, unsigned(a.m), stream));
}
