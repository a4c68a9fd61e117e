#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_prepare/config.h"
#include "sm90/chunk_prepare/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_prepare::chunk_prepare_kernel;
using chunk_prepare::Config;

Status initialize_chunk_prepare() {
  return cuda_status(cudaFuncSetAttribute(chunk_prepare_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Config::Shared)),
                     "chunk_prepare_kernel: cudaFuncSetAttribute");
}

Status launch_chunk_prepare(const ForwardParams& params, const ForwardWorkspace& workspace, CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t most_chunks = shape.has_segment_ids ? shape.B * shape.T : shape.B * ((shape.T + kChunk - 1) / kChunk);
  const int64_t ctas = std::min<int64_t>(int64_t{sms} * Config::kCtasPerSm, most_chunks * shape.HV);
  clear_older_error();
  chunk_prepare_kernel<<<static_cast<unsigned>(ctas), Config::kThreads, sizeof(Config::Shared), stream>>>(params, workspace);
  return launch_status("chunk_prepare_kernel");
}

}  // namespace jax_flashkda::sm90
