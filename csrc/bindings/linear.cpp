#include "bindings.h"

namespace gemma4::bindings {
namespace {

gemma4_linear_arguments linear_arguments(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t m, int32_t dtype,
                                         uintptr_t bias, int32_t bias_dtype, int64_t n, int64_t k, int64_t group_size,
                                         uintptr_t codes, uintptr_t scales, int32_t scale_dtype, uintptr_t zeros,
                                         uintptr_t offsets, uintptr_t group_scales, uintptr_t table, int32_t values,
                                         int32_t scale_kind, int32_t zero, int32_t pieces) {
  gemma4_linear_arguments a{};
  gemma4_weight& w = a.weight;
  w.n = n;
  w.k = k;
  w.group_size = group_size;
  w.codes = pointer(codes);
  w.scales = pointer(scales);
  w.zeros = pointer(zeros);
  w.offsets = pointer(offsets);
  w.group_scales = pointer(group_scales);
  w.table = static_cast<const float*>(pointer(table));
  w.scale_dtype = scale_dtype;
  w.values = values;
  w.scale_kind = scale_kind;
  w.zero = zero;
  a.m = m;
  a.x_stride = x_stride;
  a.out_stride = out_stride;
  a.x = pointer(x);
  a.out = writable(out);
  a.bias = pointer(bias);
  a.dtype = dtype;
  a.bias_dtype = bias_dtype;
  a.pieces = pieces;
  return a;
}

}  // namespace

void define_linear(py::module_& module) {
  // Local, because the two modules may be loaded side by side.
  py::class_<gemma4_linear_arguments>(module, "LinearArguments", py::module_local())
      .def(py::init(&linear_arguments), py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("out"), py::arg("out_stride"),
           py::arg("m"), py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("n"), py::arg("k"),
           py::arg("group_size"), py::arg("codes"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zeros"),
           py::arg("offsets"), py::arg("group_scales"), py::arg("table"), py::arg("values"), py::arg("scale_kind"), py::arg("zero"),
           py::arg("pieces"));
  define_call(module, "linear", &gemma4_linear_workspace, &gemma4_linear);
}

}  // namespace gemma4::bindings
