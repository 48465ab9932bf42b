#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

namespace gemma4::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

gemma4_rows heads(uintptr_t data, const Strides& strides) { return {pointer(data), strides[0], strides[1], strides[2]}; }
gemma4_prologue_cache cache(uintptr_t data, const Strides& strides) { return {writable(data), strides[0], strides[1], strides[2]}; }

gemma4_prologue_arguments prologue_arguments(
    int64_t batch, int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int32_t dtype, float eps, uintptr_t q,
    const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v, const Strides& v_strides, uintptr_t q_weight,
    int32_t q_weight_dtype, uintptr_t k_weight, int32_t k_weight_dtype, uintptr_t cos, const std::array<int64_t, 2>& cos_strides,
    uintptr_t sin, const std::array<int64_t, 2>& sin_strides, uintptr_t out, uintptr_t k_cache, const Strides& k_cache_strides,
    uintptr_t v_cache, const Strides& v_cache_strides, int64_t entries, int64_t entry_rows, uintptr_t lengths,
    bool lengths_are_64_bit, uintptr_t block_table, bool block_table_is_64_bit, int64_t table_stride, int64_t table_columns,
    int32_t codes, uintptr_t v_scale, const Strides& v_scale_strides) {
  gemma4_prologue_arguments a{};
  a.batch = batch;
  a.rows = rows;
  a.q_heads = q_heads;
  a.kv_heads = kv_heads;
  a.head_dim = head_dim;
  a.q = heads(q, q_strides);
  a.k = heads(k, k_strides);
  a.v = heads(v, v_strides);
  a.q_weight = pointer(q_weight);
  a.k_weight = pointer(k_weight);
  a.cos = pointer(cos);
  a.sin = pointer(sin);
  a.cos_batch_stride = cos_strides[0];
  a.cos_row_stride = cos_strides[1];
  a.sin_batch_stride = sin_strides[0];
  a.sin_row_stride = sin_strides[1];
  a.out = writable(out);
  a.k_cache = cache(k_cache, k_cache_strides);
  a.v_cache = cache(v_cache, v_cache_strides);
  a.entries = entries;
  a.entry_rows = entry_rows;
  a.lengths = pointer(lengths);
  a.block_table = pointer(block_table);
  a.table_stride = table_stride;
  a.table_columns = table_columns;
  a.lengths_are_64_bit = lengths_are_64_bit;
  a.block_table_is_64_bit = block_table_is_64_bit;
  a.dtype = dtype;
  a.q_weight_dtype = q_weight_dtype;
  a.k_weight_dtype = k_weight_dtype;
  a.eps = eps;
  a.codes = codes;
  a.v_scale = cache(v_scale, v_scale_strides);
  return a;
}

}  // namespace

void define_prologue(py::module_& module) {
  py::class_<gemma4_prologue_arguments>(module, "PrologueArguments", py::module_local())
      .def(py::init(&prologue_arguments), py::kw_only(), py::arg("batch"), py::arg("rows"), py::arg("q_heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("dtype"), py::arg("eps"), py::arg("q"), py::arg("q_strides"), py::arg("k"),
           py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("q_weight"), py::arg("q_weight_dtype"),
           py::arg("k_weight"), py::arg("k_weight_dtype"), py::arg("cos"), py::arg("cos_strides"), py::arg("sin"),
           py::arg("sin_strides"), py::arg("out"), py::arg("k_cache"), py::arg("k_cache_strides"), py::arg("v_cache"),
           py::arg("v_cache_strides"), py::arg("entries"), py::arg("entry_rows"), py::arg("lengths"), py::arg("lengths_are_64_bit"),
           py::arg("block_table"), py::arg("block_table_is_64_bit"), py::arg("table_stride"), py::arg("table_columns"),
           py::arg("codes"), py::arg("v_scale"), py::arg("v_scale_strides"));
  define_call(module, "qkv_prologue", &gemma4_qkv_prologue);
  define_call(module, "k_eq_v_prologue", &gemma4_k_eq_v_prologue);
}

}  // namespace gemma4::bindings
