#include <algorithm>

#include "core/device.h"
#include "sm90/launch.h"
#include "sm90/short_segments/config.h"
#include "sm90/short_segments/kernel.cuh"

namespace jax_flashkda::sm90 {

using short_segments::Config;
using short_segments::short_segments_kernel;

Status initialize_short_segments() {
  for (const auto kernel :
       {short_segments_kernel<DType::kBF16>, short_segments_kernel<DType::kF32>}) {
    Status status =
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sizeof(Config::Shared)),
                    "short_segments_kernel: cudaFuncSetAttribute");
    if (!status.ok()) return status;
  }
  return {};
}

Status launch_short_segments(const ForwardParams& params, const ForwardWorkspace& workspace,
                             CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t runs = shape.has_segment_ids ? shape.B * shape.T : shape.B;
  const int64_t ctas = std::min(int64_t{sms} * Config::kCtasPerSm,
                                (runs * shape.HV + Config::kWarps - 1) / Config::kWarps);
  const auto kernel = params.g_dtype == DType::kBF16 ? short_segments_kernel<DType::kBF16>
                                                     : short_segments_kernel<DType::kF32>;
  clear_older_error();
  if (shape.has_segment_ids) {
    launch_early(kernel, static_cast<unsigned>(ctas), Config::kThreads, sizeof(Config::Shared),
                 stream, params, workspace);
  } else {
    kernel<<<static_cast<unsigned>(ctas), Config::kThreads, sizeof(Config::Shared), stream>>>(
        params, workspace);
  }
  return launch_status("short_segments_kernel");
}

}  // namespace jax_flashkda::sm90
