// gemma4_kernels._C and gemma4_kernels._C_emulated: the C interface for Python. Pointers come as integers, taken from tensors in
// Python, so a build does not depend on torch. A failed call raises: ValueError for what the caller did wrong, else RuntimeError.
#include <pybind11/pybind11.h>

#include "include/gemma4_kernels.h"

namespace py = pybind11;

namespace {

void raise_if(gemma4_status status) {
  if (status == GEMMA4_OK) return;
  if (status == GEMMA4_CUDA_ERROR) throw std::runtime_error(gemma4_last_error());
  throw py::value_error(gemma4_last_error());
}

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

gemma4_linear_arguments linear_arguments(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t m, int32_t dtype,
                                         uintptr_t bias, int32_t bias_dtype, int64_t n, int64_t k, int64_t group_size,
                                         uintptr_t codes, uintptr_t scales, int32_t scale_dtype, uintptr_t zeros,
                                         uintptr_t offsets, uintptr_t group_scales, uintptr_t table, int32_t values,
                                         int32_t scale_kind, int32_t zero) {
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
  a.out = reinterpret_cast<void*>(out);
  a.bias = pointer(bias);
  a.dtype = dtype;
  a.bias_dtype = bias_dtype;
  return a;
}

}  // namespace

PYBIND11_MODULE(GEMMA4_MODULE, module) {
  // Local, because the two modules may be loaded side by side.
  py::class_<gemma4_linear_arguments>(module, "LinearArguments", py::module_local())
      .def(py::init(&linear_arguments), py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("out"), py::arg("out_stride"),
           py::arg("m"), py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("n"), py::arg("k"),
           py::arg("group_size"), py::arg("codes"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zeros"),
           py::arg("offsets"), py::arg("group_scales"), py::arg("table"), py::arg("values"), py::arg("scale_kind"), py::arg("zero"));
  module.def("linear_workspace", [](const gemma4_linear_arguments& arguments) {
    size_t bytes = 0;
    raise_if(gemma4_linear_workspace(&arguments, &bytes));
    return bytes;
  });
  module.def(
      "linear",
      [](const gemma4_linear_arguments& arguments, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
        py::gil_scoped_release released;
        const auto status = gemma4_linear(&arguments, reinterpret_cast<void*>(workspace), workspace_bytes,
                                          reinterpret_cast<gemma4_stream>(stream));
        py::gil_scoped_acquire held;
        raise_if(status);
      },
      py::arg("arguments"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"));
  module.def("abi_version", &gemma4_abi_version);
  module.def("architectures", &gemma4_architectures);
  module.def("driver_problem", []() -> py::object {
    return gemma4_check_driver() == GEMMA4_OK ? py::object(py::none()) : py::str(gemma4_last_error());
  });
}
