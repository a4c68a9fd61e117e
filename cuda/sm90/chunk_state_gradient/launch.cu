#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_gradient/config.h"
#include "sm90/chunk_state_gradient/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_gradient::BackwardConfig;
using chunk_state_gradient::chunk_state_gradient_kernel;
using chunk_state_gradient::ForwardConfig;

namespace {

template <int kValueTiles>
constexpr size_t shared_bytes() {
  return std::max(sizeof(typename ForwardConfig<kValueTiles>::Shared),
                  sizeof(typename BackwardConfig<kValueTiles>::Shared));
}

template <int kValueTiles>
Status raise_limit() {
  return cuda_status(cudaFuncSetAttribute(chunk_state_gradient_kernel<kValueTiles>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes<kValueTiles>())),
                     "chunk_state_gradient_kernel: cudaFuncSetAttribute");
}

// The walks backwards, and forwards too if `directions` is 2.
template <int kValueTiles>
Status launch(const BackwardParams& params, const BackwardWorkspace& workspace, int64_t chains,
              int sms, unsigned directions, CUstream_st* stream) {
  const unsigned ctas = static_cast<unsigned>(std::min<int64_t>(chains * (2 / kValueTiles), sms));
  clear_older_error();
  chunk_state_gradient_kernel<kValueTiles>
      <<<directions * ctas, ForwardConfig<kValueTiles>::kThreads, shared_bytes<kValueTiles>(),
         stream>>>(params, workspace, ctas);
  return launch_status("chunk_state_gradient_kernel");
}

// Two CTAs share a head while that leaves none waiting, in either direction. Both give the same
// bits.
Status launch_directions(const BackwardParams& params, const BackwardWorkspace& workspace,
                         unsigned directions, CUstream_st* stream) {
  const ForwardShape& shape = params.forward.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t chains = (shape.has_segment_ids ? shape.B * shape.T : shape.B) * shape.HV;
  if (shape.B * shape.HV * 2 * directions <= sms)
    return launch<1>(params, workspace, chains, sms, directions, stream);
  return launch<2>(params, workspace, chains, sms, directions, stream);
}

}  // namespace

Status initialize_chunk_state_gradient() {
  if (Status status = raise_limit<1>(); !status.ok()) return status;
  return raise_limit<2>();
}

Status launch_chunk_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                                   CUstream_st* stream) {
  return launch_directions(params, workspace, /*directions=*/2, stream);
}

Status launch_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream) {
  return launch_directions(params, workspace, /*directions=*/1, stream);
}

}  // namespace jax_flashkda::sm90
