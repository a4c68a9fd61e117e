#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_pieces/config.h"
#include "sm90/chunk_state_pieces/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_pieces::chunk_state_maps_kernel;
using chunk_state_pieces::CombineConfig;
using chunk_state_pieces::MapConfig;
using chunk_state_pieces::state_combine_kernel;

namespace {

constexpr size_t kMapBytes = sizeof(MapConfig::Shared);

}  // namespace

Status initialize_chunk_state_pieces() {
  Status status = cuda_status(
      cudaFuncSetAttribute(chunk_state_maps_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kMapBytes)),
      "chunk_state_maps_kernel: cudaFuncSetAttribute");
  if (!status.ok()) return status;
  return cuda_status(
      cudaFuncSetAttribute(state_combine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(CombineConfig::Shared))),
      "state_combine_kernel: cudaFuncSetAttribute");
}

Status launch_chunk_state_pieces(const ForwardParams& params, const ForwardWorkspace& workspace,
                                 CUstream_st* stream) {
  const int64_t chains = params.shape.B * params.shape.HV;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t items = chains * (workspace.pieces.count - 1);
  clear_older_error();
  launch_early(chunk_state_maps_kernel, static_cast<unsigned>(std::min<int64_t>(items, sms)),
               MapConfig::kThreads, kMapBytes, stream, params, workspace);
  if (Status status = launch_status("chunk_state_maps_kernel"); !status.ok()) return status;
  launch_early(state_combine_kernel,
               static_cast<unsigned>(chains * (128 / CombineConfig::kColumns)),
               CombineConfig::kThreads, sizeof(CombineConfig::Shared), stream, params, workspace);
  return launch_status("state_combine_kernel");
}

}  // namespace jax_flashkda::sm90
