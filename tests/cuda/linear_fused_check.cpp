// The fused forms of gemma4_linear, and gemma4_embedding, on the emulator, called through the C interface, for builds that no
// Python can load.
//
//   linear_fused_check           GeGLU against products in double, the argmax against gemma4_linear's outputs, a residual;
//                                rows of the weight by id
//   linear_fused_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
#include <cmath>
#include <cstdio>
#include <random>
#include <string>

#include "blocks.h"

namespace {

using checks::Block, checks::get, checks::put;

struct Shape {
  int64_t n, k, m;
  int dtype, values;
  int64_t x_padding, out_padding;  // elements between rows
};

// 4-bit codes with fp16 scales for 32 columns, around 8 or with offsets.
struct Weight {
  int64_t n, k;
  Block codes, scales, offsets;
  gemma4_weight fields{};

  Weight(const Shape& shape, std::mt19937& random)
      : n(shape.n), k(shape.k), codes(n * k / 2), scales(n * (k / 32) * 2), offsets(scales.size) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < codes.size; ++i) codes.data[i] = uint8_t(random());
    for (int64_t i = 0; i < n * (k / 32); ++i) {
      put(scales, i, 0.02f * normal(random), GEMMA4_FP16);
      put(offsets, i, 0.05f * normal(random), GEMMA4_FP16);
    }
    fields.n = n;
    fields.k = k;
    fields.bits = 4;
    fields.group_size = 32;
    fields.codes = codes.data;
    fields.scales = scales.data;
    fields.scale_dtype = GEMMA4_FP16;
    fields.values = shape.values;
    fields.offsets = shape.values == GEMMA4_OFFSETS ? offsets.data : nullptr;
    fields.zero = shape.values == GEMMA4_CENTRED ? 8 : 0;
  }

  double value(int64_t row, int64_t column) const {
    uint32_t word;
    std::memcpy(&word, codes.data + (row * k + column) / 8 * 4, 4);
    const int i = column % 8, code = word >> (16 * (i % 2) + 4 * (i / 2)) & 15;
    const int64_t group = row * (k / 32) + column / 32;
    return get(scales, group, GEMMA4_FP16) * double(code - fields.zero) +
           (fields.offsets != nullptr ? get(offsets, group, GEMMA4_FP16) : 0.0);
  }
};

struct Call {
  Shape shape;
  std::mt19937 random;
  Weight gate, up;
  Block x, out, residual, indices, ids, rows;
  gemma4_linear_arguments product{};
  gemma4_linear_geglu_arguments geglu{};
  gemma4_linear_argmax_arguments argmax{};
  gemma4_embedding_arguments embedding{};

  Call(const Shape& s, unsigned seed)
      : shape(s),
        random(seed),
        gate(s, random),
        up(s, random),
        x(2 * ((s.m - 1) * (s.k + s.x_padding) + s.k)),
        out(2 * ((s.m - 1) * (s.n + s.out_padding) + s.n)),
        residual(out.size),
        indices(8 * s.m),
        ids(4 * s.m),
        rows(2 * ((s.m - 1) * (s.k + s.out_padding) + s.k)) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < int64_t(x.size) / 2; ++i) put(x, i, normal(random), s.dtype);
    for (int64_t i = 0; i < int64_t(residual.size) / 2; ++i) put(residual, i, normal(random), s.dtype);
    forget();
    const auto fill = [&](auto& arguments) {
      arguments.m = s.m;
      arguments.x = x.data;
      arguments.x_stride = s.k + s.x_padding;
      arguments.dtype = s.dtype;
    };
    fill(product);
    fill(geglu);
    fill(argmax);
    product.weight = geglu.gate = argmax.weight = gate.fields;
    geglu.up = up.fields;
    product.out = geglu.out = out.data;
    product.out_stride = geglu.out_stride = product.residual_stride = s.n + s.out_padding;
    argmax.indices = reinterpret_cast<int64_t*>(indices.data);
    for (int64_t i = 0; i < s.m; ++i) {  // the last row, and in each five one that is none
      const int32_t id = i % 5 == 3 ? int32_t(s.n) : int32_t(random() % s.n);
      const int32_t chosen = i == 0 ? int32_t(s.n - 1) : id;
      std::memcpy(ids.data + 4 * i, &chosen, 4);
    }
    embedding.weight = gate.fields;
    embedding.m = s.m;
    embedding.ids = ids.data;
    embedding.out = rows.data;
    embedding.out_stride = s.k + s.out_padding;
    embedding.dtype = s.dtype;
  }

  void forget() {
    std::memset(out.data, 0xFF, out.size);
    std::memset(indices.data, 0xFF, indices.size);
    std::memset(rows.data, 0xFF, rows.size);
  }

  bool is_untouched() const {
    const auto is_ones = [](const Block& block) {
      return std::all_of(block.data, block.data + block.size, [](unsigned char byte) { return byte == 0xFF; });
    };
    return is_ones(out) && is_ones(indices) && is_ones(rows);
  }

  float output(int64_t row, int64_t i) const { return get(out, row * (shape.n + shape.out_padding) + i, shape.dtype); }
  float factor(int64_t row, int64_t i) const { return get(x, row * (shape.k + shape.x_padding) + i, shape.dtype); }
};

template <class Arguments, class Workspace, class Run>
gemma4_status run(const Arguments& arguments, Workspace workspace_of, Run call) {
  size_t bytes = 0;
  if (auto status = workspace_of(&arguments, &bytes)) return status;
  Block workspace(bytes);
  std::memset(workspace.data, 0xFF, bytes);
  return call(&arguments, workspace.data, bytes, nullptr);
}
gemma4_status run(const gemma4_linear_arguments& a) { return run(a, gemma4_linear_workspace, gemma4_linear); }
gemma4_status run(const gemma4_linear_geglu_arguments& a) { return run(a, gemma4_linear_geglu_workspace, gemma4_linear_geglu); }
gemma4_status run(const gemma4_linear_argmax_arguments& a) {
  return run(a, gemma4_linear_argmax_workspace, gemma4_linear_argmax);
}

// Shapes --------------------------------------------------------------------------------------------------------------

struct Sum {
  double value = 0, size = 0;
};

Sum sum_of(const Call& call, const Weight& weight, int64_t row, int64_t output) {
  Sum sum;
  for (int64_t column = 0; column < call.shape.k; ++column) {
    const double term = weight.value(output, column) * call.factor(row, column);
    sum.value += term;
    sum.size += 2 * std::fabs(term);
  }
  return sum;
}

// Largest error over what is allowed: fp32 sums of exact products, in any order, an fp32 GeLU, and one rounding.
double worst_of_geglu(const Call& call) {
  const double last_place = call.shape.dtype == GEMMA4_BF16 ? 1.0 / 256 : 1.0 / 2048;
  double worst = 0;
  for (int64_t row = 0; row < call.shape.m; ++row) {
    for (int64_t i = 0; i < call.shape.n; ++i) {
      const Sum gate = sum_of(call, call.gate, row, i), up = sum_of(call, call.up, row, i);
      const double g = gate.value, gelu = g / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
      const double result = gelu * up.value;
      const double sums = 1e-6 * (gate.size * std::fabs(up.value) + up.size * std::fabs(gelu));
      const double error = std::fabs(call.output(row, i) - result) / (last_place * std::fabs(result) + sums + 1e-6);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  return worst;
}

bool argmax_is_right(const Call& call) {
  for (int64_t row = 0; row < call.shape.m; ++row) {
    int64_t best = 0;
    for (int64_t i = 0; i < call.shape.n; ++i) {
      if (std::isnan(call.output(row, i))) {
        best = -1;
        break;
      }
      if (call.output(row, i) > call.output(row, best)) best = i;
    }
    if (call.argmax.indices[row] != best) return false;
  }
  return true;
}

// A residual that out is itself gives the same bits as one that lies elsewhere.
bool residual_is_right(Call& call) {
  call.product.residual = call.residual.data;
  call.forget();
  if (run(call.product) != GEMMA4_OK) return false;
  Block apart(call.out.size);
  std::memcpy(apart.data, call.out.data, call.out.size);
  std::memcpy(call.out.data, call.residual.data, call.out.size);
  call.product.residual = call.out.data;
  if (run(call.product) != GEMMA4_OK) return false;
  for (int64_t row = 0; row < call.shape.m; ++row) {
    const int64_t first = 2 * row * (call.shape.n + call.shape.out_padding);
    if (std::memcmp(apart.data + first, call.out.data + first, 2 * call.shape.n) != 0) return false;
  }
  return true;
}

// Every number within one rounding of the weight's.
bool embedding_is_right(const Call& call) {
  if (gemma4_embedding(&call.embedding, nullptr) != GEMMA4_OK) return false;
  const double last_place = call.shape.dtype == GEMMA4_BF16 ? 1.0 / 256 : 1.0 / 2048;
  for (int64_t i = 0; i < call.shape.m; ++i) {
    int32_t id;
    std::memcpy(&id, call.ids.data + 4 * i, 4);
    for (int64_t column = 0; column < call.shape.k; ++column) {
      const float got = get(call.rows, i * call.embedding.out_stride + column, call.shape.dtype);
      const double want = id == call.shape.n ? NAN : call.gate.value(id, column);
      const bool right = std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= last_place * std::fabs(want) + 1e-6;
      if (!right) return false;
    }
  }
  return true;
}

int check_shapes() {
  const Shape shapes[] = {
      {70, 160, 1, GEMMA4_BF16, GEMMA4_CENTRED, 0, 0},    {33, 288, 5, GEMMA4_FP16, GEMMA4_OFFSETS, 8, 3},
      {1, 32, 16, GEMMA4_FP16, GEMMA4_CENTRED, 0, 0},     {129, 544, 9, GEMMA4_BF16, GEMMA4_OFFSETS, 0, 0},
      {40, 2080, 13, GEMMA4_BF16, GEMMA4_CENTRED, 16, 1}, {66, 2336, 3, GEMMA4_FP16, GEMMA4_OFFSETS, 0, 5},
  };
  unsigned seed = 0;
  for (const Shape& shape : shapes) {
    Call call(shape, ++seed);
    call.geglu.pieces = call.argmax.pieces = call.product.pieces = seed % 4;  // of few stages there may be fewer
    const bool ran = run(call.geglu) == GEMMA4_OK;
    const double worst = ran ? worst_of_geglu(call) : INFINITY;
    std::printf("n %ld k %ld m %ld: %s, %.3f of what is allowed\n", long(shape.n), long(shape.k), long(shape.m),
                ran ? "ran" : gemma4_last_error(), worst);
    if (worst > 1) return 1;
    for (const bool with_nan : {false, true}) {
      if (with_nan) put(call.x, 0, NAN, shape.dtype);
      call.forget();
      if (run(call.argmax) != GEMMA4_OK || run(call.product) != GEMMA4_OK || !argmax_is_right(call)) {
        return std::printf("another argmax than that of the product\n"), 1;
      }
    }
    if (!embedding_is_right(call)) return std::printf("another row than that of the weight: %s\n", gemma4_last_error()), 1;
    if (!residual_is_right(call)) return std::printf("a residual in place gave other bits\n"), 1;
  }
  return 0;
}

// Arguments out of order ----------------------------------------------------------------------------------------------

const void* moved(const void* pointer, std::mt19937& random) {
  return random() % 2 ? nullptr : static_cast<const unsigned char*>(pointer) + 1;
}

// One thing wrong with a weight alone.
void spoil(gemma4_weight& weight, std::mt19937& random) {
  switch (random() % 6) {
    case 0: weight.n = random() % 2 ? 0 : INT64_MAX; break;
    case 1: weight.k = random() % 2 ? -32 : weight.k + 1; break;
    case 2: weight.group_size = random() % 2 ? 0 : 48; break;
    case 3: weight.codes = moved(weight.codes, random); break;
    case 4: weight.scales = moved(weight.scales, random); break;
    default:
      weight.zero = 17;
      weight.values = random() % 2 ? 9 : GEMMA4_CENTRED;
      weight.offsets = nullptr;
  }
}

// One thing wrong with what all calls have.
template <class Arguments>
void spoil_x(Arguments& arguments, std::mt19937& random) {
  switch (random() % 5) {
    case 0: arguments.m = random() % 2 ? -1 : 17; break;
    case 1: arguments.x = moved(arguments.x, random); break;
    case 2: arguments.x_stride = random() % 2 ? INT64_MAX : arguments.x_stride + 4; break;
    case 3: arguments.pieces = random() % 2 ? -1 : INT32_MIN; break;
    default: arguments.dtype = random() % 2 ? GEMMA4_FP32 : 7; break;
  }
}

void spoil_rows(gemma4_embedding_arguments& a, std::mt19937& random) {
  switch (random() % 4) {
    case 0: a.ids = moved(a.ids, random); break;
    case 1: a.out = const_cast<void*>(moved(a.out, random)); break;
    case 2: a.columns = reinterpret_cast<const int32_t*>(static_cast<const unsigned char*>(a.ids) + 1); break;
    default: a.m = 2, a.out_stride = random() % 2 ? INT64_MAX : a.weight.k - 1; break;
  }
}

template <class Arguments>
void spoil_out(Arguments& arguments, std::mt19937& random) {
  if (random() % 2) {
    arguments.out = const_cast<void*>(moved(arguments.out, random));
  } else {
    arguments.out_stride = random() % 2 ? INT64_MAX : -1;
  }
}

// What makes a pair of two good weights that do not go together.
void spoil_pair(gemma4_weight& up, std::mt19937& random) {
  switch (random() % 5) {
    case 0: up.n -= 1; break;
    case 1: up.k -= 32; break;
    case 2: up.group_size = up.k; break;
    case 3: up.scale_dtype = GEMMA4_BF16; break;
    default: up.values = GEMMA4_CENTRED; up.offsets = nullptr; up.zero = 7; break;
  }
}

// Calls `function` with good arguments that `spoil` has changed, and with the workspace that was right before.
template <class Arguments, class Workspace, class Function, class Spoil>
gemma4_status run_spoiled(Arguments arguments, Workspace workspace_of, Function function, const Spoil& spoil) {
  size_t bytes = 0;
  if (workspace_of(&arguments, &bytes) != GEMMA4_OK) std::abort();
  Block workspace(bytes);
  spoil(arguments, bytes);
  return function(&arguments, workspace.data, bytes, nullptr);
}

// The name of the function that was called wrongly.
const char* call_wrongly(Call& call, std::mt19937& random, gemma4_status* status) {
  const auto geglu = [&](const auto& spoil) {
    *status = run_spoiled(call.geglu, gemma4_linear_geglu_workspace, gemma4_linear_geglu, spoil);
    return "gemma4_linear_geglu: ";
  };
  const auto argmax = [&](const auto& spoil) {
    *status = run_spoiled(call.argmax, gemma4_linear_argmax_workspace, gemma4_linear_argmax, spoil);
    return "gemma4_linear_argmax: ";
  };
  const auto product = [&](const auto& spoil) {
    *status = run_spoiled(call.product, gemma4_linear_workspace, gemma4_linear, spoil);
    return "gemma4_linear: ";
  };
  const auto embedding = [&](const auto& spoil) {
    auto arguments = call.embedding;
    spoil(arguments);
    *status = gemma4_embedding(&arguments, nullptr);
    return "gemma4_embedding: ";
  };
  switch (random() % 16) {
    case 0: return geglu([&](auto& a, size_t&) { spoil(a.gate, random); });
    case 1: return geglu([&](auto& a, size_t&) { spoil(a.up, random); });
    case 2: return geglu([&](auto& a, size_t&) { spoil_pair(a.up, random); });
    case 3: return geglu([&](auto& a, size_t&) { spoil_x(a, random); });
    case 4: return geglu([&](auto& a, size_t&) { spoil_out(a, random); });
    case 5: *status = gemma4_linear_geglu(nullptr, nullptr, 0, nullptr); return "gemma4_linear_geglu: ";
    case 6: return argmax([&](auto& a, size_t&) { spoil(a.weight, random); });
    case 7: return argmax([&](auto& a, size_t&) { spoil_x(a, random); });
    case 8:
      return argmax([&](auto& a, size_t&) { a.indices = static_cast<int64_t*>(const_cast<void*>(moved(a.indices, random))); });
    case 9: return argmax([&](auto&, size_t& bytes) { bytes -= 1 + random() % bytes; });
    case 10: *status = gemma4_linear_argmax(nullptr, nullptr, 0, nullptr); return "gemma4_linear_argmax: ";
    case 11: return embedding([&](auto& a) { spoil(a.weight, random); });
    case 12: return embedding([&](auto& a) { spoil_rows(a, random); });
    case 13: return embedding([&](auto& a) { random() % 2 ? a.m = -1 : a.dtype = 7; });
    case 14: *status = gemma4_embedding(nullptr, nullptr); return "gemma4_embedding: ";
    default:
      return product([&](auto& a, size_t&) {
        const bool stride = random() % 2;
        a.residual = call.residual.data + !stride;
        if (stride) a.residual_stride = random() % 2 ? a.weight.n - 1 : INT64_MAX;
      });
  }
}

int fuzz(int count) {
  std::mt19937 random(7);
  for (int i = 0; i < count; ++i) {
    const int64_t n = 2 + random() % 100, k = 32 * (2 + random() % 80), m = 1 + random() % 16;
    const Shape shape{n, k, m, int(random() % 2), random() % 2 ? GEMMA4_CENTRED : GEMMA4_OFFSETS, 0, 0};
    Call call(shape, unsigned(i));
    gemma4_status status = GEMMA4_OK;
    std::string name = call_wrongly(call, random, &status);
    if (status == GEMMA4_OK) return std::printf("call %d of %s was taken\n", i, name.c_str()), 1;
    if (std::string(gemma4_last_error()).rfind(name, 0) != 0) return std::printf("call %d: %s\n", i, gemma4_last_error()), 1;
    if (!call.is_untouched()) return std::printf("call %d: refused, but written\n", i), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  return count == 3 && std::string(arguments[1]) == "fuzz" ? fuzz(std::atoi(arguments[2])) : check_shapes();
}
