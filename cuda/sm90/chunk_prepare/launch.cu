#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_prepare/config.h"
#include "sm90/chunk_prepare/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_prepare::chunk_prepare_kernel;
using chunk_prepare::Config;

namespace {

using Kernel = void (*)(ForwardParams, ForwardWorkspace, uint32_t);

Kernel kernel_for(DType gate_type) {
  return gate_type == DType::kBF16 ? chunk_prepare_kernel<DType::kBF16>
                                   : chunk_prepare_kernel<DType::kF32>;
}

}  // namespace

Status initialize_chunk_prepare() {
  for (DType gate_type : {DType::kBF16, DType::kF32}) {
    Status status = cuda_status(
        cudaFuncSetAttribute(kernel_for(gate_type), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             sizeof(Config::Shared)),
        "chunk_prepare_kernel: cudaFuncSetAttribute");
    if (!status.ok()) return status;
  }
  return {};
}

Status clear_progress(const ForwardParams& params, const ForwardWorkspace& workspace,
                      CUstream_st* stream) {
  return cuda_status(cudaMemsetAsync(static_cast<uint8_t*>(params.workspace) + workspace.progress,
                                     0, static_cast<size_t>(workspace.progress_bytes), stream),
                     "chunk_prepare: cudaMemsetAsync");
}

Status launch_chunk_prepare(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t most_chunks =
      shape.has_segment_ids ? shape.B * shape.T : shape.B * ((shape.T + kChunk - 1) / kChunk);
  const int64_t places = int64_t{sms} * Config::kCtasPerSm, items = most_chunks * shape.HV;
  int64_t ctas = std::min(places, items), workers = ctas;
  if (workspace.overlap.processors > 0) {  // a CTA in every place, of which some leave theirs
    ctas = places;
    workers = std::max<int64_t>(1, places - workspace.overlap.processors * Config::kCtasPerSm);
  }
  const Kernel kernel = kernel_for(params.g_dtype);
  const auto grid = static_cast<unsigned>(ctas);
  const auto share = static_cast<uint32_t>(workers);
  clear_older_error();
  if (shape.has_segment_ids) {
    launch_early(kernel, grid, Config::kThreads, sizeof(Config::Shared), stream, params, workspace,
                 share);
  } else {
    kernel<<<grid, Config::kThreads, sizeof(Config::Shared), stream>>>(params, workspace, share);
  }
  return launch_status("chunk_prepare_kernel");
}

}  // namespace jax_flashkda::sm90
