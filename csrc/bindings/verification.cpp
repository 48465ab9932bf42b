#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"

namespace gemma4::bindings {
namespace {

// The arguments, and the ends of text that they point to.
struct VerifyArguments : gemma4_verify_arguments {
  std::vector<int64_t> all_ends;
};

template <class Element>
Element* typed(uintptr_t address) {
  return static_cast<Element*>(writable(address));
}

VerifyArguments verify_arguments(int64_t batch, int64_t drafts_count, int64_t vocabulary, uintptr_t logits, int64_t stride_batch,
                                 int64_t stride_row, uintptr_t draft_logits, int64_t draft_stride_batch, int64_t draft_stride_row,
                                 uintptr_t draft_tokens, uintptr_t num_drafts, uintptr_t max_new_tokens, uintptr_t temperature,
                                 uintptr_t top_k, uintptr_t cut, uintptr_t min_p, uintptr_t softcap, uintptr_t seeds,
                                 uintptr_t positions, std::vector<int64_t> ends, uintptr_t tokens, uintptr_t num_accepted,
                                 uintptr_t next_token, uintptr_t num_emitted, uintptr_t hidden_row, uintptr_t finished,
                                 uintptr_t refused, int32_t dtype, int32_t method, int32_t stream) {
  VerifyArguments a{};
  a.batch = batch;
  a.drafts_count = drafts_count;
  a.vocabulary = vocabulary;
  a.logits = pointer(logits);
  a.stride_batch = stride_batch;
  a.stride_row = stride_row;
  a.draft_logits = pointer(draft_logits);
  a.draft_stride_batch = draft_stride_batch;
  a.draft_stride_row = draft_stride_row;
  a.draft_tokens = typed<const int64_t>(draft_tokens);
  a.num_drafts = typed<const int64_t>(num_drafts);
  a.max_new_tokens = typed<const int64_t>(max_new_tokens);
  a.temperature = typed<const float>(temperature);
  a.top_k = typed<const int64_t>(top_k);
  a.cut = typed<const float>(cut);
  a.min_p = typed<const float>(min_p);
  a.softcap = typed<const float>(softcap);
  a.seeds = typed<const int64_t>(seeds);
  a.positions = typed<const int64_t>(positions);
  a.tokens = typed<int64_t>(tokens);
  a.num_accepted = typed<int64_t>(num_accepted);
  a.next_token = typed<int64_t>(next_token);
  a.num_emitted = typed<int64_t>(num_emitted);
  a.hidden_row = typed<int64_t>(hidden_row);
  a.finished = typed<uint8_t>(finished);
  a.refused = typed<uint8_t>(refused);
  a.dtype = dtype;
  a.method = method;
  a.stream = stream;
  a.all_ends = std::move(ends);
  a.ends_count = int32_t(a.all_ends.size());
  return a;
}

gemma4_status workspace(const VerifyArguments* arguments, size_t* bytes) { return gemma4_verify_workspace(arguments, bytes); }

gemma4_status run(const VerifyArguments* arguments, void* workspace, size_t bytes, gemma4_stream stream) {
  gemma4_verify_arguments a = *arguments;
  a.ends = arguments->all_ends.data();  // where they lie now: Python may have moved them
  return gemma4_verify(&a, workspace, bytes, stream);
}

}  // namespace

void define_verification(py::module_& module) {
  // Local, because the two modules may be loaded side by side.
  py::class_<VerifyArguments>(module, "VerifyArguments", py::module_local())
      .def(py::init(&verify_arguments), py::kw_only(), py::arg("batch"), py::arg("drafts_count"), py::arg("vocabulary"),
           py::arg("logits"), py::arg("stride_batch"), py::arg("stride_row"), py::arg("draft_logits"),
           py::arg("draft_stride_batch"), py::arg("draft_stride_row"), py::arg("draft_tokens"), py::arg("num_drafts"),
           py::arg("max_new_tokens"), py::arg("temperature"), py::arg("top_k"), py::arg("cut"), py::arg("min_p"),
           py::arg("softcap"), py::arg("seeds"), py::arg("positions"), py::arg("ends"), py::arg("tokens"),
           py::arg("num_accepted"), py::arg("next_token"), py::arg("num_emitted"), py::arg("hidden_row"), py::arg("finished"),
           py::arg("refused"), py::arg("dtype"), py::arg("method"), py::arg("stream"));
  define_call(module, "verify", &workspace, &run);
}

}  // namespace gemma4::bindings
