// gemma4_kernels._C and gemma4_kernels._C_emulated.
#include "bindings.h"

PYBIND11_MODULE(GEMMA4_MODULE, module) {
  namespace py = pybind11;
  gemma4::bindings::define_linear(module);
  gemma4::bindings::define_attention(module);
  gemma4::bindings::define_norms(module);
  gemma4::bindings::define_prologue(module);
  gemma4::bindings::define_verification(module);
  module.def("abi_version", &gemma4_abi_version);
  module.def("architectures", &gemma4_architectures);
  module.def("launches", &gemma4_launches);
  module.def("driver_problem", []() -> py::object {
    return gemma4_check_driver() == GEMMA4_OK ? py::object(py::none()) : py::str(gemma4_last_error());
  });
}
