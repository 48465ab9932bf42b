// The C interface for Python: pointers come as integers, taken from tensors in Python, so a build does not depend on torch.
// A failed call raises: ValueError for what the caller did wrong, else RuntimeError.
#pragma once

#include <pybind11/pybind11.h>

#include "../include/gemma4_kernels.h"

namespace gemma4::bindings {

namespace py = pybind11;

inline void raise_if(gemma4_status status) {
  if (status == GEMMA4_OK) return;
  if (status == GEMMA4_CUDA_ERROR) throw std::runtime_error(gemma4_last_error());
  throw py::value_error(gemma4_last_error());
}

inline const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
inline void* writable(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A function of the C interface that asks for the bytes of a workspace, and one that runs, for Python: arguments, then workspace,
// workspace_bytes and stream by name. The other threads of Python go on while it runs.
template <class Arguments>
void define_call(py::module_& module, const char* name, gemma4_status (*workspace)(const Arguments*, size_t*),
                 gemma4_status (*run)(const Arguments*, void*, size_t, gemma4_stream)) {
  module.def((std::string(name) + "_workspace").c_str(), [workspace](const Arguments& arguments) {
    size_t bytes = 0;
    raise_if(workspace(&arguments, &bytes));
    return bytes;
  });
  module.def(
      name,
      [run](const Arguments& arguments, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
        gemma4_status status;
        {
          py::gil_scoped_release released;
          status = run(&arguments, writable(workspace), workspace_bytes, writable(stream));
        }
        raise_if(status);
      },
      py::arg("arguments"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"));
}

// The same for a function that needs no workspace: arguments and stream.
template <class Arguments>
void define_call(py::module_& module, const char* name, gemma4_status (*run)(const Arguments*, gemma4_stream)) {
  module.def(
      name,
      [run](const Arguments& arguments, uintptr_t stream) {
        gemma4_status status;
        {
          py::gil_scoped_release released;
          status = run(&arguments, writable(stream));
        }
        raise_if(status);
      },
      py::arg("arguments"), py::arg("stream"));
}

// Each defines what Python sees of one part of the header.
void define_linear(py::module_& module);
void define_attention(py::module_& module);
void define_norms(py::module_& module);
void define_prologue(py::module_& module);
void define_verification(py::module_& module);

}  // namespace gemma4::bindings
