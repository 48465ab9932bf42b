#include "bindings.h"

namespace gemma4::bindings {
namespace {

gemma4_sandwich_norm_arguments sandwich_norm_arguments(int64_t m, int64_t n, float eps, int32_t dtype, uintptr_t x, int64_t x_stride,
                                                       uintptr_t residual, int64_t residual_stride, uintptr_t hidden,
                                                       int64_t hidden_stride, uintptr_t normed, int64_t normed_stride,
                                                       uintptr_t post_weight, int32_t post_weight_dtype, uintptr_t pre_weight,
                                                       int32_t pre_weight_dtype, uintptr_t layer_scalar, int32_t layer_scalar_dtype) {
  gemma4_sandwich_norm_arguments a{};
  a.m = m;
  a.n = n;
  a.x_stride = x_stride;
  a.residual_stride = residual_stride;
  a.hidden_stride = hidden_stride;
  a.normed_stride = normed_stride;
  a.x = pointer(x);
  a.residual = pointer(residual);
  a.hidden = writable(hidden);
  a.normed = writable(normed);
  a.post_weight = pointer(post_weight);
  a.pre_weight = pointer(pre_weight);
  a.layer_scalar = pointer(layer_scalar);
  a.eps = eps;
  a.dtype = dtype;
  a.post_weight_dtype = post_weight_dtype;
  a.pre_weight_dtype = pre_weight_dtype;
  a.layer_scalar_dtype = layer_scalar_dtype;
  return a;
}

}  // namespace

void define_norms(py::module_& module) {
  py::class_<gemma4_sandwich_norm_arguments>(module, "SandwichNormArguments", py::module_local())
      .def(py::init(&sandwich_norm_arguments), py::kw_only(), py::arg("m"), py::arg("n"), py::arg("eps"), py::arg("dtype"),
           py::arg("x"), py::arg("x_stride"), py::arg("residual"), py::arg("residual_stride"), py::arg("hidden"),
           py::arg("hidden_stride"), py::arg("normed"), py::arg("normed_stride"), py::arg("post_weight"),
           py::arg("post_weight_dtype"), py::arg("pre_weight"), py::arg("pre_weight_dtype"), py::arg("layer_scalar"),
           py::arg("layer_scalar_dtype"));
  define_call(module, "sandwich_norm", &gemma4_sandwich_norm);
}

}  // namespace gemma4::bindings
