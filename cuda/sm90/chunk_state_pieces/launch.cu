#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_pieces/config.h"
#include "sm90/chunk_state_pieces/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_pieces::chunk_state_maps_kernel;
using chunk_state_pieces::CombineConfig;
using chunk_state_pieces::kFactor;
using chunk_state_pieces::kMaps;
using chunk_state_pieces::kOffset;
using chunk_state_pieces::MapConfig;
using chunk_state_pieces::MapPlaces;
using chunk_state_pieces::state_combine_kernel;

namespace {

constexpr size_t kMapBytes = sizeof(MapConfig::Shared);

// The maps of all pieces but the last.
Status launch_maps(const ForwardParams& params, const ForwardWorkspace& workspace,
                   const MapPlaces& maps, CUstream_st* stream) {
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t items = params.shape.B * params.shape.HV * (workspace.pieces.count - 1);
  clear_older_error();
  launch_early(chunk_state_maps_kernel, static_cast<unsigned>(std::min<int64_t>(items, sms)),
               MapConfig::kThreads, kMapBytes, stream, params, workspace, maps);
  return launch_status("chunk_state_maps_kernel");
}

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
  float* maps =
      reinterpret_cast<float*>(static_cast<uint8_t*>(params.workspace) + workspace.piece_maps);
  const MapPlaces places = {maps + kOffset * kStateFloats, maps + kFactor * kStateFloats, kMaps};
  if (Status status = launch_maps(params, workspace, places, stream); !status.ok()) return status;
  const int64_t chains = params.shape.B * params.shape.HV;
  launch_early(state_combine_kernel,
               static_cast<unsigned>(chains * (128 / CombineConfig::kColumns)),
               CombineConfig::kThreads, sizeof(CombineConfig::Shared), stream, params, workspace);
  return launch_status("state_combine_kernel");
}

Status launch_state_maps(const StateMapsParams& params, const ForwardWorkspace& workspace,
                         CUstream_st* stream) {
  ForwardWorkspace one_piece = workspace;
  one_piece.pieces = {2, params.forward.shape.T};  // and an empty one behind it
  const MapPlaces places = {params.offset, params.factor, 1};
  return launch_maps(params.forward, one_piece, places, stream);
}

}  // namespace jax_flashkda::sm90
