// gemma4_linear on the emulator, called through the C interface, for builds that no Python can load: the sanitizers'.
//
//   linear_check           calls of many shapes, each against the product with the exact weights in double
//   linear_check fuzz N    N calls with arguments out of order: a status and a message, and nothing written
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "blocks.h"

namespace {

using checks::Block, checks::bytes_of, checks::from_half, checks::get, checks::put, checks::to_half;

struct Shape {
  int64_t n, k, group, m;
  int dtype, scale_dtype;
  int values;
  bool bias;
  int64_t x_padding, out_padding;  // elements between rows
  int scale_kind = GEMMA4_SCALES_PLAIN;
  int bits = 4;

  bool in_two() const { return scale_kind == GEMMA4_SCALES_SIX_BIT || scale_kind == GEMMA4_SCALES_INT8; }
  bool in_bytes() const { return scale_kind == GEMMA4_SCALES_E8M0 || scale_kind == GEMMA4_SCALES_NESTED; }
  int64_t groups() const { return n * (k / group); }
  int64_t scale_columns() const { return in_two() ? 256 : group; }
  int64_t scales() const { return n * (k / scale_columns()); }
  int64_t high_bits() const { return bits == 5 ? 1 : bits == 6 ? 2 : 0; }
  int64_t group_scale_bytes() const { return !in_two() ? 0 : scale_kind == GEMMA4_SCALES_INT8 ? groups() : scales() * 12; }
  int zero() const { return bits == 8 ? 0 : 1 << (bits - 1); }
};

struct Call {
  Shape shape;
  Block codes, high, scales, zeros, offsets, group_scales, table, scale_table, scale_scales, scale_offset, x, out, bias;
  gemma4_linear_arguments arguments{};

  Call(const Shape& s, unsigned seed)
      : shape(s),
        codes(s.n * s.k / (s.bits == 8 ? 1 : 2)),
        high(s.n * s.k * s.high_bits() / 8),
        scales(s.scales() * (s.in_bytes() ? 1 : bytes_of(s.scale_dtype))),
        zeros(s.groups()),
        offsets(s.scales() * bytes_of(s.scale_dtype)),
        group_scales(s.group_scale_bytes()),
        table(64),
        scale_table(1024),
        scale_scales((s.groups() + 255) / 256 * 4),
        scale_offset(4),
        x(2 * ((s.m - 1) * (s.k + s.x_padding) + s.k)),
        out(2 * ((s.m - 1) * (s.n + s.out_padding) + s.n)),
        bias(s.n * 4) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < codes.size; ++i) codes.data[i] = uint8_t(random());
    for (size_t i = 0; i < high.size; ++i) high.data[i] = uint8_t(random());
    for (size_t i = 0; i < group_scales.size; ++i) group_scales.data[i] = uint8_t(random());
    for (int i = 0; i < 256; ++i) put(scale_table, i, normal(random), GEMMA4_FP32);
    for (size_t i = 0; i < scale_scales.size / 4; ++i) put(scale_scales, i, normal(random), GEMMA4_FP32);
    put(scale_offset, 0, 0.5f, GEMMA4_FP32);
    for (int i = 0; i < 16; ++i) put(table, i, from_half(to_half(normal(random), s.dtype), s.dtype), GEMMA4_FP32);
    for (size_t i = 0; i < zeros.size; ++i) zeros.data[i] = uint8_t(random() % 17);
    for (int64_t i = 0; i < s.scales(); ++i) {
      if (s.in_bytes()) {
        scales.data[i] = s.scale_kind == GEMMA4_SCALES_E8M0 ? uint8_t(124 + random() % 8) : uint8_t(random());
      } else {
        put(scales, i, 0.05f * normal(random), s.scale_dtype);
      }
      put(offsets, i, 0.2f * normal(random), s.scale_dtype);
    }
    for (int64_t i = 0; i < int64_t(x.size) / 2; ++i) put(x, i, normal(random), s.dtype);
    for (int64_t i = 0; i < s.n; ++i) put(bias, i, normal(random), GEMMA4_FP32);
    std::memset(out.data, 0xFF, out.size);
    gemma4_weight& w = arguments.weight;
    w.n = s.n;
    w.k = s.k;
    w.group_size = s.group;
    w.codes = codes.data;
    w.high = s.high_bits() ? high.data : nullptr;
    w.scales = scales.data;
    w.zeros = s.values == GEMMA4_ZEROS ? zeros.data : nullptr;
    w.offsets = s.values == GEMMA4_OFFSETS ? offsets.data : nullptr;
    w.group_scales = s.in_two() ? group_scales.data : nullptr;
    w.table = s.values == GEMMA4_TABLE ? floats(table) : nullptr;
    const bool nested = s.scale_kind == GEMMA4_SCALES_NESTED;
    w.scale_table = nested ? floats(scale_table) : nullptr;
    w.scale_scales = nested ? floats(scale_scales) : nullptr;
    w.scale_offset = nested ? floats(scale_offset) : nullptr;
    w.scale_kind = s.scale_kind;
    w.scale_dtype = s.scale_dtype;
    w.values = s.values;
    w.bits = s.bits;
    w.zero = s.values == GEMMA4_CENTRED ? s.zero() : 0;
    arguments.m = s.m;
    arguments.x_stride = s.k + s.x_padding;
    arguments.out_stride = s.n + s.out_padding;
    arguments.x = x.data;
    arguments.out = out.data;
    arguments.bias = s.bias ? bias.data : nullptr;
    arguments.dtype = s.dtype;
    arguments.bias_dtype = GEMMA4_FP32;
  }

  static const float* floats(const Block& block) { return reinterpret_cast<const float*>(block.data); }

  gemma4_status run() {
    size_t bytes = 0;
    if (auto status = gemma4_linear_workspace(&arguments, &bytes)) return status;
    Block workspace(bytes);
    std::memset(workspace.data, 0xFF, bytes);
    return gemma4_linear(&arguments, workspace.data, bytes, nullptr);
  }

  // Of a plane of so many bits a column.
  int field(const Block& plane, int bits, int64_t row, int64_t column) const {
    uint32_t word;
    const int of_word = 32 / bits, i = int(column % of_word);
    std::memcpy(&word, plane.data + (row * shape.k + column) / of_word * 4, 4);
    return int(word >> (16 * (i % 2) + bits * (i / 2)) & ((1u << bits) - 1));
  }

  int code(int64_t row, int64_t column) const {
    if (shape.bits == 8) return int8_t(codes.data[row * shape.k + column]);
    const int low = field(codes, 4, row, column);
    return shape.high_bits() ? low + 16 * field(high, int(shape.high_bits()), row, column) : low;
  }

  // Code of a six-bit scale (0) or offset (1).
  int six_bits(int64_t row, int64_t column, int which) const {
    uint32_t words[3];
    std::memcpy(words, group_scales.data + (row * (shape.k / 256) + column / 256) * 12, 12);
    const int j = column / 32 % 8;
    return int(words[which] >> 4 * j & 15) + 16 * int(words[2] >> (16 * which + 2 * j) & 3);
  }

  double group_scale(int64_t row, int64_t column) const {
    const int64_t group = (row * shape.k + column) / shape.group, place = (row * shape.k + column) / shape.scale_columns();
    switch (shape.scale_kind) {
      case GEMMA4_SCALES_E8M0: return std::ldexp(1.0, scales.data[group] - 128);
      case GEMMA4_SCALES_NESTED:
        return double(get(scale_table, scales.data[group], GEMMA4_FP32)) * get(scale_scales, group / 256, GEMMA4_FP32) +
               get(scale_offset, 0, GEMMA4_FP32);
      case GEMMA4_SCALES_SIX_BIT: return double(get(scales, place, shape.scale_dtype)) * six_bits(row, column, 0);
      case GEMMA4_SCALES_INT8: return double(get(scales, place, shape.scale_dtype)) * int8_t(group_scales.data[group]);
      default: return get(scales, place, shape.scale_dtype);
    }
  }

  double group_offset(int64_t row, int64_t column) const {
    const double stored = get(offsets, (row * shape.k + column) / shape.scale_columns(), shape.scale_dtype);
    return shape.scale_kind == GEMMA4_SCALES_SIX_BIT ? -stored * six_bits(row, column, 1) : stored;
  }

  // Largest error over what is allowed: fp32 sums of exact products, in any order, and one rounding.
  double worst() const {
    const double last_place = shape.dtype == GEMMA4_BF16 ? 1.0 / 256 : 1.0 / 2048;
    double worst = 0;
    for (int64_t row = 0; row < shape.m; ++row) {
      for (int64_t output = 0; output < shape.n; ++output) {
        double sum = shape.bias ? get(bias, output, GEMMA4_FP32) : 0, size = std::fabs(sum);
        for (int64_t column = 0; column < shape.k; ++column) {
          const int64_t group = output * (shape.k / shape.group) + column / shape.group;
          const int zero = shape.values == GEMMA4_CENTRED ? shape.zero() : shape.values == GEMMA4_ZEROS ? zeros.data[group] : 0;
          const double offset = shape.values == GEMMA4_OFFSETS ? group_offset(output, column) : 0;
          const double value =
              shape.values == GEMMA4_TABLE ? get(table, code(output, column), GEMMA4_FP32) : code(output, column) - zero;
          const double scaled = group_scale(output, column) * value;
          const double factor = get(x, row * (shape.k + shape.x_padding) + column, shape.dtype);
          sum += (scaled + offset) * factor;
          size += (std::fabs(scaled) + std::fabs(offset)) * std::fabs(factor);
        }
        const double got = get(out, row * (shape.n + shape.out_padding) + output, shape.dtype);
        const double error = std::fabs(got - sum) / (last_place * std::fabs(sum) + 1e-6 * size + 1e-7);
        worst = std::isnan(got) ? INFINITY : std::max(worst, error);
      }
    }
    return worst;
  }

  // What lies between the rows of out is nobody's to write.
  bool padding_is_untouched() const {
    for (int64_t row = 0; row + 1 < shape.m; ++row) {
      for (int64_t i = 0; i < shape.out_padding; ++i) {
        const unsigned char* place = out.data + 2 * (row * (shape.n + shape.out_padding) + shape.n + i);
        if (place[0] != 0xFF || place[1] != 0xFF) return false;
      }
    }
    return true;
  }

  bool out_is_untouched() const {
    return std::all_of(out.data, out.data + out.size, [](unsigned char byte) { return byte == 0xFF; });
  }
};

int check_shapes() {
  const Shape shapes[] = {
      {70, 160, 32, 1, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, false, 0, 0},
      {65, 288, 32, 5, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, true, 8, 3},
      {1, 32, 32, 16, GEMMA4_FP16, GEMMA4_FP16, GEMMA4_CENTRED, false, 0, 0},
      {64, 768, 64, 8, GEMMA4_BF16, GEMMA4_BF16, GEMMA4_CENTRED, false, 16, 0},
      {40, 2080, 32, 9, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, true, 0, 1},
      {33, 2304, 96, 16, GEMMA4_FP16, GEMMA4_FP32, GEMMA4_CENTRED, true, 24, 5},
      {66, 1024, 128, 3, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_ZEROS, false, 0, 0},
      {130, 416, 416, 11, GEMMA4_FP16, GEMMA4_BF16, GEMMA4_ZEROS, true, 0, 2},
      {17, 4512, 32, 13, GEMMA4_BF16, GEMMA4_FP32, GEMMA4_ZEROS, false, 0, 0},
      {70, 288, 32, 4, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_OFFSETS, true, 8, 1},
      {65, 2368, 64, 12, GEMMA4_FP16, GEMMA4_BF16, GEMMA4_OFFSETS, false, 0, 0},
      {70, 2560, 32, 9, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_OFFSETS, true, 0, 0, GEMMA4_SCALES_SIX_BIT},
      {70, 416, 32, 3, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_TABLE, true, 0, 0},
      {33, 2432, 64, 14, GEMMA4_FP16, GEMMA4_FP32, GEMMA4_TABLE, false, 0, 3},
      {33, 512, 32, 4, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_TABLE, false, 0, 0, GEMMA4_SCALES_INT8},
      {40, 288, 32, 9, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_TABLE, false, 0, 0, GEMMA4_SCALES_E8M0},
      {67, 1344, 64, 2, GEMMA4_BF16, GEMMA4_FP32, GEMMA4_TABLE, false, 0, 0, GEMMA4_SCALES_NESTED},
      {70, 416, 32, 3, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, false, 0, 0, GEMMA4_SCALES_PLAIN, 5},
      {17, 2304, 32, 10, GEMMA4_FP16, GEMMA4_FP16, GEMMA4_OFFSETS, true, 8, 1, GEMMA4_SCALES_PLAIN, 5},
      {40, 512, 32, 9, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_OFFSETS, false, 0, 0, GEMMA4_SCALES_SIX_BIT, 5},
      {70, 512, 16, 1, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, true, 0, 0, GEMMA4_SCALES_INT8, 6},
      {33, 2304, 16, 12, GEMMA4_FP16, GEMMA4_FP16, GEMMA4_CENTRED, false, 8, 3, GEMMA4_SCALES_INT8, 6},
      {70, 416, 32, 5, GEMMA4_BF16, GEMMA4_FP16, GEMMA4_CENTRED, false, 0, 0, GEMMA4_SCALES_PLAIN, 8},
      {33, 1184, 32, 16, GEMMA4_FP16, GEMMA4_FP16, GEMMA4_CENTRED, true, 24, 2, GEMMA4_SCALES_PLAIN, 8},
  };
  unsigned seed = 0;
  for (const Shape& shape : shapes) {
    Call call(shape, ++seed);
    call.arguments.pieces = seed % 4;  // of few stages there may be fewer
    const auto status = call.run();
    const double worst = status == GEMMA4_OK ? call.worst() : INFINITY;
    std::printf("%d bits n %ld k %ld group %ld m %ld: %s, %.3f of what is allowed\n", shape.bits, long(shape.n), long(shape.k),
                long(shape.group), long(shape.m), status == GEMMA4_OK ? "ran" : gemma4_last_error(), worst);
    if (worst > 1 || !call.padding_is_untouched()) return 1;
  }
  return 0;
}

// One field of a good call made wrong; each only once, because a pointer that is moved twice may be right again.
void spoil(gemma4_linear_arguments& a, unsigned& spoiled, std::mt19937& random) {
  const int64_t one = 1, sizes[] = {INT64_MIN, -1, 0, 1, 7, 31, 32, 33, 64, 96, one << 20, one << 31, one << 40, INT64_MAX};
  const int64_t size = sizes[random() % std::size(sizes)];
  auto moved = [&](const void* pointer) -> const void* {
    const int by[] = {1, 2, 4, 8};
    return random() % 2 ? nullptr : static_cast<const unsigned char*>(pointer) + by[random() % 4];
  };
  const int kinds[] = {-1, 7, 9, INT32_MAX, INT32_MIN};  // of no enum, and no number of bits
  const int kind = kinds[random() % std::size(kinds)];
  const unsigned field = random() % 23;
  if (spoiled >> field & 1) return;
  spoiled |= 1u << field;
  const bool nested = a.weight.scale_table != nullptr;
  switch (field) {
    case 0: a.weight.n = size > 0 && size < 1000 ? -size : size; break;
    case 1: a.weight.k = size > 0 && size < 1000 ? size * 32 + 1 : size; break;
    case 2: a.weight.group_size = size > 0 && size < 1000 ? -size : size; break;
    case 3: a.weight.codes = moved(a.weight.codes); break;
    case 4: a.weight.scales = nested || random() % 2 ? nullptr : static_cast<const unsigned char*>(a.weight.scales) + 1; break;
    case 5: a.weight.zeros = a.weight.values == GEMMA4_ZEROS ? nullptr : a.weight.codes; break;
    case 6: a.weight.scale_dtype = kind; break;
    case 7: a.weight.values = kind; break;
    case 8:
      a.weight.values = GEMMA4_CENTRED;
      a.weight.zeros = a.weight.offsets = nullptr;
      a.weight.zero = random() % 2 ? 257 : -1;
      break;
    case 9: a.m = size >= 0 && size <= 16 ? 17 : size; break;
    case 10: a.x_stride = size > 0 && size <= int64_t(1) << 40 ? size * 8 + 1 : size; break;
    case 11: a.out_stride = size >= a.weight.n ? INT64_MAX : size; break;
    case 12: a.x = moved(a.x); break;
    case 13: a.out = random() % 2 ? nullptr : static_cast<unsigned char*>(a.out) + 1; break;
    case 14: a.weight.offsets = a.weight.values == GEMMA4_OFFSETS ? nullptr : a.weight.codes; break;
    case 17: a.weight.table = a.weight.values == GEMMA4_TABLE ? nullptr : static_cast<const float*>(a.weight.codes); break;
    case 15: a.weight.group_scales = a.weight.codes; a.weight.scale_kind = GEMMA4_SCALES_PLAIN; break;
    case 16: a.weight.group_scales = nullptr; a.weight.scale_kind = random() % 2 ? kind : GEMMA4_SCALES_SIX_BIT; break;
    case 18: a.weight.bits = random() % 2 ? kind : 3; break;
    case 19: a.weight.high = a.weight.high != nullptr ? moved(a.weight.high) : a.weight.codes; break;
    case 20: {
      const float** tensors[] = {&a.weight.scale_table, &a.weight.scale_scales, &a.weight.scale_offset};
      const float*& tensor = *tensors[random() % 3];
      const void* wrong = !nested ? a.weight.codes : random() % 2 ? nullptr : reinterpret_cast<const unsigned char*>(tensor) + 2;
      tensor = static_cast<const float*>(wrong);
      break;
    }
    case 21: a.pieces = random() % 2 ? -1 : INT32_MIN; break;
    default: a.dtype = random() % 2 ? kind : GEMMA4_FP32; break;
  }
}

// A good call of any kind.
Shape drawn(std::mt19937& random) {
  Shape shape = {int64_t(64 + random() % 8), int64_t(32 * (1 + random() % 80)), 32, int64_t(1 + random() % 16), int(random() % 2),
                 int(random() % 3), int(random() % 3), bool(random() % 2), 0, 0};
  const int bits[] = {5, 5, 6, 8, 4};
  const int values[] = {GEMMA4_CENTRED, GEMMA4_OFFSETS, GEMMA4_CENTRED, GEMMA4_CENTRED, GEMMA4_TABLE};
  const unsigned kind = random() % 8;
  if (kind >= std::size(bits)) return shape;
  shape.scale_dtype = GEMMA4_FP16;
  shape.bits = bits[kind];
  shape.values = values[kind];
  if (shape.bits == 4) shape.scale_kind = GEMMA4_SCALES_NESTED;
  if (shape.bits == 6) {
    shape.k = (shape.k + 255) / 256 * 256;
    shape.group = 16;
    shape.scale_kind = GEMMA4_SCALES_INT8;
  }
  return shape;
}

int fuzz(int count) {
  std::mt19937 random(7);
  for (int i = 0; i < count; ++i) {
    Call call(drawn(random), unsigned(i));
    size_t wanted = 0;
    if (gemma4_linear_workspace(&call.arguments, &wanted) != GEMMA4_OK) return std::printf("%s\n", gemma4_last_error()), 1;
    gemma4_status status;
    if (random() % 8 == 0 && wanted != 0) {
      Block workspace(wanted);
      const bool null = random() % 2;
      status = gemma4_linear(&call.arguments, null ? nullptr : workspace.data, null ? wanted : random() % wanted, nullptr);
      if (status != GEMMA4_WORKSPACE_TOO_SMALL) return std::printf("a small workspace gave status %d\n", status), 1;
    } else if (random() % 64 == 0) {
      status = gemma4_linear(nullptr, nullptr, 0, nullptr);
    } else {
      const int faults = 1 + int(random() % 3);
      const gemma4_linear_arguments before = call.arguments;
      unsigned spoiled = 0;
      for (int fault = 0; fault < faults; ++fault) spoil(call.arguments, spoiled, random);
      Block workspace(wanted);
      status = gemma4_linear(&call.arguments, workspace.data, wanted, nullptr);
      if (status == GEMMA4_OK && std::memcmp(&before, &call.arguments, sizeof before) != 0) {
        return std::printf("call %d: spoiled arguments were taken\n", i), 1;
      }
    }
    if (status != GEMMA4_OK && std::string(gemma4_last_error()).rfind("gemma4_linear: ", 0) != 0) return 1;
    if (status != GEMMA4_OK && !call.out_is_untouched()) return std::printf("call %d: refused, but written\n", i), 1;
  }
  std::printf("%d calls refused in words\n", count);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  return count == 3 && std::string(arguments[1]) == "fuzz" ? fuzz(std::atoi(arguments[2])) : check_shapes();
}
