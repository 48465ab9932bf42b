#include "bindings.h"

namespace gemma4::bindings {
namespace {

gemma4_weight weight(int64_t n, int64_t k, int64_t group_size, uintptr_t codes, uintptr_t high, uintptr_t scales,
                     int32_t scale_dtype, uintptr_t zeros, uintptr_t offsets, uintptr_t group_scales, uintptr_t table,
                     uintptr_t scale_table, uintptr_t scale_scales, uintptr_t scale_offset, int32_t bits, int32_t values,
                     int32_t scale_kind, int32_t zero) {
  gemma4_weight w{};
  w.n = n;
  w.k = k;
  w.group_size = group_size;
  w.codes = pointer(codes);
  w.high = pointer(high);
  w.scales = pointer(scales);
  w.zeros = pointer(zeros);
  w.offsets = pointer(offsets);
  w.group_scales = pointer(group_scales);
  w.table = static_cast<const float*>(pointer(table));
  w.scale_table = static_cast<const float*>(pointer(scale_table));
  w.scale_scales = static_cast<const float*>(pointer(scale_scales));
  w.scale_offset = static_cast<const float*>(pointer(scale_offset));
  w.scale_dtype = scale_dtype;
  w.bits = bits;
  w.values = values;
  w.scale_kind = scale_kind;
  w.zero = zero;
  return w;
}

// What all of the calls have besides their weights.
template <class Arguments>
Arguments arguments_of(uintptr_t x, int64_t x_stride, int64_t m, int32_t dtype, int32_t pieces) {
  Arguments a{};
  a.x = pointer(x);
  a.x_stride = x_stride;
  a.m = m;
  a.dtype = dtype;
  a.pieces = pieces;
  return a;
}

gemma4_linear_arguments linear_arguments(const gemma4_weight& weight, uintptr_t x, int64_t x_stride, int64_t m, int32_t dtype,
                                         int32_t pieces, uintptr_t out, int64_t out_stride, uintptr_t bias, int32_t bias_dtype,
                                         uintptr_t residual, int64_t residual_stride) {
  auto a = arguments_of<gemma4_linear_arguments>(x, x_stride, m, dtype, pieces);
  a.weight = weight;
  a.out = writable(out);
  a.out_stride = out_stride;
  a.bias = pointer(bias);
  a.bias_dtype = bias_dtype;
  a.residual = pointer(residual);
  a.residual_stride = residual_stride;
  return a;
}

gemma4_linear_geglu_arguments geglu_arguments(const gemma4_weight& gate, const gemma4_weight& up, uintptr_t x, int64_t x_stride,
                                              int64_t m, int32_t dtype, int32_t pieces, uintptr_t out, int64_t out_stride) {
  auto a = arguments_of<gemma4_linear_geglu_arguments>(x, x_stride, m, dtype, pieces);
  a.gate = gate;
  a.up = up;
  a.out = writable(out);
  a.out_stride = out_stride;
  return a;
}

gemma4_linear_argmax_arguments argmax_arguments(const gemma4_weight& weight, uintptr_t x, int64_t x_stride, int64_t m,
                                                int32_t dtype, int32_t pieces, uintptr_t indices) {
  auto a = arguments_of<gemma4_linear_argmax_arguments>(x, x_stride, m, dtype, pieces);
  a.weight = weight;
  a.indices = static_cast<int64_t*>(writable(indices));
  return a;
}

gemma4_embedding_arguments embedding_arguments(const gemma4_weight& weight, uintptr_t ids, bool ids_are_64_bit, int64_t m,
                                               uintptr_t columns, uintptr_t out, int64_t out_stride, int32_t dtype) {
  gemma4_embedding_arguments a{};
  a.weight = weight;
  a.ids = pointer(ids);
  a.ids_are_64_bit = ids_are_64_bit;
  a.m = m;
  a.columns = static_cast<const int32_t*>(pointer(columns));
  a.out = writable(out);
  a.out_stride = out_stride;
  a.dtype = dtype;
  return a;
}

}  // namespace

void define_linear(py::module_& module) {
  // Local, because the two modules may be loaded side by side.
  py::class_<gemma4_weight>(module, "Weight", py::module_local())
      .def(py::init(&weight), py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group_size"), py::arg("codes"),
           py::arg("high"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zeros"), py::arg("offsets"),
           py::arg("group_scales"), py::arg("table"), py::arg("scale_table"), py::arg("scale_scales"), py::arg("scale_offset"),
           py::arg("bits"), py::arg("values"), py::arg("scale_kind"), py::arg("zero"));
  py::class_<gemma4_linear_arguments>(module, "LinearArguments", py::module_local())
      .def(py::init(&linear_arguments), py::kw_only(), py::arg("weight"), py::arg("x"), py::arg("x_stride"), py::arg("m"),
           py::arg("dtype"), py::arg("pieces"), py::arg("out"), py::arg("out_stride"), py::arg("bias"), py::arg("bias_dtype"),
           py::arg("residual"), py::arg("residual_stride"));
  py::class_<gemma4_linear_geglu_arguments>(module, "LinearGegluArguments", py::module_local())
      .def(py::init(&geglu_arguments), py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("x"), py::arg("x_stride"),
           py::arg("m"), py::arg("dtype"), py::arg("pieces"), py::arg("out"), py::arg("out_stride"));
  py::class_<gemma4_linear_argmax_arguments>(module, "LinearArgmaxArguments", py::module_local())
      .def(py::init(&argmax_arguments), py::kw_only(), py::arg("weight"), py::arg("x"), py::arg("x_stride"), py::arg("m"),
           py::arg("dtype"), py::arg("pieces"), py::arg("indices"));
  py::class_<gemma4_embedding_arguments>(module, "EmbeddingArguments", py::module_local())
      .def(py::init(&embedding_arguments), py::kw_only(), py::arg("weight"), py::arg("ids"), py::arg("ids_are_64_bit"),
           py::arg("m"), py::arg("columns"), py::arg("out"), py::arg("out_stride"), py::arg("dtype"));
  define_call(module, "linear", &gemma4_linear_workspace, &gemma4_linear);
  define_call(module, "linear_geglu", &gemma4_linear_geglu_workspace, &gemma4_linear_geglu);
  define_call(module, "linear_argmax", &gemma4_linear_argmax_workspace, &gemma4_linear_argmax);
  define_call(module, "embedding", &gemma4_embedding);
}

}  // namespace gemma4::bindings
