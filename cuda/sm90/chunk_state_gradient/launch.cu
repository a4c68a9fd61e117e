#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_gradient/config.h"
#include "sm90/chunk_state_gradient/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_gradient::BackwardConfig;
using chunk_state_gradient::chunk_initial_gradient_kernel;
using chunk_state_gradient::chunk_state_gradient_kernel;
using chunk_state_gradient::ForwardConfig;
using chunk_state_gradient::InitialConfig;

namespace {

template <int kValueTiles>
constexpr size_t shared_bytes() {
  return std::max(sizeof(typename ForwardConfig<kValueTiles>::Shared),
                  sizeof(typename BackwardConfig<kValueTiles>::Shared));
}

template <int kValueTiles>
constexpr size_t initial_bytes() {
  return sizeof(typename InitialConfig<kValueTiles>::Shared);
}
static_assert(initial_bytes<2>() <= 227 * 1024);

template <int kValueTiles>
Status raise_limits() {
  Status status = cuda_status(cudaFuncSetAttribute(chunk_state_gradient_kernel<kValueTiles>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes<kValueTiles>())),
                              "chunk_state_gradient_kernel: cudaFuncSetAttribute");
  if (!status.ok()) return status;
  return cuda_status(cudaFuncSetAttribute(chunk_initial_gradient_kernel<kValueTiles>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(initial_bytes<kValueTiles>())),
                     "chunk_initial_gradient_kernel: cudaFuncSetAttribute");
}

// `ctas` walk backwards, and as many forwards.
template <int kValueTiles>
Status launch_both(const BackwardParams& params, const BackwardWorkspace& workspace, unsigned ctas,
                   CUstream_st* stream) {
  clear_older_error();
  chunk_state_gradient_kernel<kValueTiles><<<2 * ctas, ForwardConfig<kValueTiles>::kThreads,
                                             shared_bytes<kValueTiles>(), stream>>>(
      params, workspace, ctas);
  return launch_status("chunk_state_gradient_kernel");
}

template <int kValueTiles>
Status launch_initial(const BackwardParams& params, const BackwardWorkspace& workspace,
                      unsigned ctas, CUstream_st* stream) {
  clear_older_error();
  chunk_initial_gradient_kernel<kValueTiles><<<ctas, InitialConfig<kValueTiles>::kThreads,
                                               initial_bytes<kValueTiles>(), stream>>>(params,
                                                                                       workspace);
  return launch_status("chunk_initial_gradient_kernel");
}

using Launch = Status (*)(const BackwardParams&, const BackwardWorkspace&, unsigned, CUstream_st*);

// Two CTAs share a head while that leaves none waiting, in either direction. Both give the same
// bits.
Status launch(Launch half_heads, Launch whole_heads, int directions, const BackwardParams& params,
              const BackwardWorkspace& workspace, CUstream_st* stream) {
  const ForwardShape& shape = params.forward.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const bool half = shape.B * shape.HV * 2 * directions <= sms;
  const int64_t chains = (shape.has_segment_ids ? shape.B * shape.T : shape.B) * shape.HV;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(chains * (half ? 2 : 1), sms));
  return (half ? half_heads : whole_heads)(params, workspace, ctas, stream);
}

}  // namespace

Status initialize_chunk_state_gradient() {
  if (Status status = raise_limits<1>(); !status.ok()) return status;
  return raise_limits<2>();
}

Status launch_chunk_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                                   CUstream_st* stream) {
  return launch(launch_both<1>, launch_both<2>, /*directions=*/2, params, workspace, stream);
}

Status launch_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream) {
  return launch(launch_initial<1>, launch_initial<2>, /*directions=*/1, params, workspace, stream);
}

}  // namespace jax_flashkda::sm90
