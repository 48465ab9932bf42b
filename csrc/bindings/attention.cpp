#include "bindings.h"

namespace gemma4::bindings {
namespace {

const int32_t* numbers(uintptr_t address) { return static_cast<const int32_t*>(pointer(address)); }

gemma4_requests requests(int64_t batch, int64_t rows, int64_t capacity, int64_t total_rows, int64_t total_keys, int64_t entries,
                         int64_t page_size, int64_t table_stride, uintptr_t cu_q, uintptr_t cu_k, uintptr_t lengths,
                         uintptr_t first, uintptr_t entry, uintptr_t block_table) {
  return {batch, rows, capacity, total_rows, total_keys, entries, page_size, table_stride, numbers(cu_q), numbers(cu_k),
          numbers(lengths), numbers(first), numbers(entry), numbers(block_table)};
}

gemma4_rows rows(uintptr_t data, int64_t batch_stride, int64_t row_stride, int64_t head_stride) {
  return {pointer(data), batch_stride, row_stride, head_stride};
}

gemma4_attention attention(const gemma4_requests& requests, const gemma4_rows& q, const gemma4_rows& v, uintptr_t out,
                           int64_t out_batch_stride, int64_t out_row_stride, int64_t out_head_stride, uintptr_t lse,
                           int64_t lse_batch_stride, int64_t lse_head_stride, int64_t query_heads, int64_t kv_heads,
                           int64_t head_dim, float scale, int32_t dtype) {
  return {requests, q, v, writable(out), out_batch_stride, out_row_stride, out_head_stride, static_cast<float*>(writable(lse)),
          lse_batch_stride, lse_head_stride, query_heads, kv_heads, head_dim, scale, dtype};
}

gemma4_flash_decode_arguments flash_decode(const gemma4_attention& attention, const gemma4_rows& k, int64_t left, int64_t right,
                                           float softcap) {
  return {attention, k, left, right, softcap};
}

gemma4_k_eq_v_decode_arguments k_eq_v_decode(const gemma4_attention& attention, uintptr_t k_norm_weight, int32_t weight_dtype,
                                             uintptr_t inv_freq, bool inv_freq_is_double, int32_t codes,
                                             const gemma4_rows& values_scale) {
  return {attention, pointer(k_norm_weight), pointer(inv_freq), weight_dtype, inv_freq_is_double, codes, values_scale};
}

}  // namespace

void define_attention(py::module_& module) {
  // Local, because the two modules may be loaded side by side.
  py::class_<gemma4_requests>(module, "Requests", py::module_local())
      .def(py::init(&requests), py::kw_only(), py::arg("batch"), py::arg("rows"), py::arg("capacity"), py::arg("total_rows"),
           py::arg("total_keys"), py::arg("entries"), py::arg("page_size"), py::arg("table_stride"), py::arg("cu_q"),
           py::arg("cu_k"), py::arg("lengths"), py::arg("first"), py::arg("entry"), py::arg("block_table"));
  py::class_<gemma4_rows>(module, "Rows", py::module_local())
      .def(py::init(&rows), py::arg("data"), py::arg("batch_stride"), py::arg("row_stride"), py::arg("head_stride"));
  py::class_<gemma4_attention>(module, "Attention", py::module_local())
      .def(py::init(&attention), py::kw_only(), py::arg("requests"), py::arg("q"), py::arg("v"), py::arg("out"),
           py::arg("out_batch_stride"), py::arg("out_row_stride"), py::arg("out_head_stride"), py::arg("lse"),
           py::arg("lse_batch_stride"), py::arg("lse_head_stride"), py::arg("query_heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("scale"), py::arg("dtype"));
  py::class_<gemma4_flash_decode_arguments>(module, "FlashDecodeArguments", py::module_local())
      .def(py::init(&flash_decode), py::kw_only(), py::arg("attention"), py::arg("k"), py::arg("left"), py::arg("right"),
           py::arg("softcap"));
  define_call(module, "flash_decode", &gemma4_flash_decode_workspace, &gemma4_flash_decode);
  py::class_<gemma4_k_eq_v_decode_arguments>(module, "KEqVDecodeArguments", py::module_local())
      .def(py::init(&k_eq_v_decode), py::kw_only(), py::arg("attention"), py::arg("k_norm_weight"), py::arg("weight_dtype"),
           py::arg("inv_freq"), py::arg("inv_freq_is_double"), py::arg("codes"), py::arg("values_scale"));
  define_call(module, "k_eq_v_decode", &gemma4_k_eq_v_decode_workspace, &gemma4_k_eq_v_decode);
}

}  // namespace gemma4::bindings
