#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_prepare/config.h"
#include "sm90/chunk_prepare/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_prepare::chunk_prepare_kernel;
using chunk_prepare::Config;

namespace {

using Kernel = void (*)(ForwardParams, ForwardWorkspace);

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

Status launch_chunk_prepare(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t most_chunks =
      shape.has_segment_ids ? shape.B * shape.T : shape.B * ((shape.T + kChunk - 1) / kChunk);
  const int64_t ctas = std::min<int64_t>(int64_t{sms} * Config::kCtasPerSm, most_chunks * shape.HV);
  clear_older_error();
  kernel_for(params.g_dtype)<<<static_cast<unsigned>(ctas), Config::kThreads,
                               sizeof(Config::Shared), stream>>>(params, workspace);
  return launch_status("chunk_prepare_kernel");
}

}  // namespace jax_flashkda::sm90
