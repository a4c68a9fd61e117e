// The Python module jax_flashkda._flashkda: what Python has to know of the compiled code, and its
// FFI handlers. Loading it creates no CUDA context and needs no driver.

#include <nanobind/nanobind.h>

#include "dispatch/dispatch.h"
#include "ffi/handlers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace jax_flashkda {
namespace {

// {target: {stage: capsule}}, as jax.ffi.register_ffi_target takes them.
nb::dict to_dict(const std::vector<Handler>& handlers) {
  nb::dict targets;
  for (const Handler& handler : handlers) {
    if (!targets.contains(handler.target)) targets[handler.target] = nb::dict();
    targets[handler.target][handler.stage] = nb::capsule(handler.function);
  }
  return targets;
}

const char* numpy_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kBF16: return "bfloat16";
    case DType::kF16: return "float16";
  }
  throw nb::value_error("a compiled variant has a dtype without a name");
}

nb::list numpy_names(const std::vector<DType>& dtypes) {
  nb::list names;
  for (DType dtype : dtypes) names.append(numpy_name(dtype));
  return names;
}

nb::dict to_dict(const Variant& variant) {
  nb::dict row;
  row["arch"] = variant.arch;
  row["K"] = variant.K;
  row["V"] = variant.V;
  row["qkv_dtype"] = numpy_name(variant.qkv_dtype);
  row["g_dtypes"] = numpy_names(variant.g_dtypes);
  row["beta_dtypes"] = numpy_names(variant.beta_dtypes);
  return row;
}

nb::dict to_dict(const StepVariant& variant) {
  nb::dict row;
  row["arch"] = variant.arch;
  row["K"] = variant.K;
  row["V"] = variant.V;
  row["token_dtypes"] = numpy_names(variant.token_dtypes);
  row["state_dtypes"] = numpy_names(variant.state_dtypes);
  return row;
}

nb::dict to_dict(const ShortConvVariant& variant) {
  nb::dict row;
  row["arch"] = variant.arch;
  row["width"] = variant.width;
  row["channel_multiple"] = variant.channel_multiple;
  row["dtypes"] = numpy_names(variant.dtypes);
  row["step_dtypes"] = numpy_names(variant.step_dtypes);
  return row;
}

template <auto kVariants>
nb::list as_dicts() {
  nb::list rows;
  for (const auto& variant : kVariants()) rows.append(to_dict(variant));
  return rows;
}

using WorkspaceBytes = int64_t (*)(const ForwardShape&);

template <WorkspaceBytes kBytes>
int64_t workspace_bytes(int64_t B, int64_t T, int64_t H, int64_t HV, int64_t K, int64_t V,
                        int64_t N, bool has_segment_ids) {
  return kBytes({B, T, H, HV, K, V, N, has_segment_ids});
}

}  // namespace
}  // namespace jax_flashkda

NB_MODULE(_flashkda, module) {
  using namespace jax_flashkda;
  module.def("registrations", [] { return to_dict(handlers()); },
             "FFI handlers for the platform CUDA: {target: {stage: capsule}}.");
  module.def("checking_registrations", [] { return to_dict(checking_handlers()); },
             "Handlers that check as those do and launch nothing, on any platform.");
  module.def("variants", &as_dicts<variants>, "The compiled kernels, a dict each.");
  module.def("step_variants", &as_dicts<step_variants>, "The compiled decode steps, a dict each.");
  module.def("short_conv_variants", &as_dicts<short_conv_variants>,
             "The compiled short convolutions, a dict each.");
  module.def("forward_workspace_bytes", &workspace_bytes<forward_workspace_bytes>, "B"_a, "T"_a,
             "H"_a, "HV"_a, "K"_a, "V"_a, "N"_a, "has_segment_ids"_a,
             "Bytes of the workspace result of jax_flashkda.forward.");
  module.def("backward_workspace_bytes", &workspace_bytes<backward_workspace_bytes>, "B"_a, "T"_a,
             "H"_a, "HV"_a, "K"_a, "V"_a, "N"_a, "has_segment_ids"_a,
             "Bytes of the workspace result of jax_flashkda.backward.");
  module.def("prepared_forward_workspace_bytes",
             &workspace_bytes<prepared_forward_workspace_bytes>, "B"_a, "T"_a, "H"_a, "HV"_a,
             "K"_a, "V"_a, "N"_a, "has_segment_ids"_a,
             "Bytes of that of jax_flashkda.prepared_forward, state_maps and state_gradient.");
  module.def("prepared_backward_workspace_bytes",
             &workspace_bytes<prepared_backward_workspace_bytes>, "B"_a, "T"_a, "H"_a, "HV"_a,
             "K"_a, "V"_a, "N"_a, "has_segment_ids"_a,
             "Bytes of that of jax_flashkda.prepared_backward.");
  module.def(
      "short_conv_workspace_bytes",
      [](int64_t B, int64_t T, int64_t C) { return short_conv_workspace_bytes({B, T, C, 1}); },
      "B"_a, "T"_a, "C"_a, "Bytes of the workspace result of jax_flashkda.short_conv_backward.");
}
