#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_gradient/config.h"
#include "sm90/chunk_state_gradient/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_gradient::BackwardConfig;
using chunk_state_gradient::ForwardConfig;

namespace {

using Kernel = void (*)(BackwardParams, BackwardWorkspace);

// One scan with a number of warpgroups for each head.
struct Scan {
  Kernel kernel;
  const char* name;
  int value_tiles;
  int threads;
  size_t shared_bytes;
};

template <class Config>
Scan scan_with(Kernel kernel, const char* name) {
  return {kernel, name, Config::kValueTiles, Config::kThreads,
          sizeof(typename Config::Shared) + 1024};  // the kernel aligns it itself
}

template <int kValueTiles>
Scan forward_scan() {
  using Config = ForwardConfig<kValueTiles>;
  return scan_with<Config>(chunk_state_gradient::chunk_state_forward_kernel<Config>,
                           "chunk_state_forward_kernel");
}

template <int kValueTiles>
Scan backward_scan() {
  using Config = BackwardConfig<kValueTiles>;
  return scan_with<Config>(chunk_state_gradient::chunk_state_backward_kernel<Config>,
                           "chunk_state_backward_kernel");
}

// Two CTAs share a head while that leaves none waiting. Both give the same bits.
Status launch(const Scan& whole_head, const Scan& half_head, const BackwardParams& params,
              const BackwardWorkspace& workspace, CUstream_st* stream) {
  const ForwardShape& shape = params.forward.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const Scan& scan = shape.B * shape.HV * 2 <= sms ? half_head : whole_head;
  const int64_t chains = (shape.has_segment_ids ? shape.B * shape.T : shape.B) * shape.HV;
  const unsigned ctas =
      static_cast<unsigned>(std::min<int64_t>(chains * (2 / scan.value_tiles), sms));
  clear_older_error();
  scan.kernel<<<ctas, scan.threads, scan.shared_bytes, stream>>>(params, workspace);
  return launch_status(scan.name);
}

}  // namespace

Status initialize_chunk_state_gradient() {
  for (const Scan& scan :
       {forward_scan<1>(), forward_scan<2>(), backward_scan<1>(), backward_scan<2>()}) {
    Status status =
        cuda_status(cudaFuncSetAttribute(scan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(scan.shared_bytes)),
                    scan.name);
    if (!status.ok()) return status;
  }
  return {};
}

Status launch_chunk_state_forward(const BackwardParams& params, const BackwardWorkspace& workspace,
                                  CUstream_st* stream) {
  return launch(forward_scan<2>(), forward_scan<1>(), params, workspace, stream);
}

Status launch_chunk_state_backward(const BackwardParams& params, const BackwardWorkspace& workspace,
                                   CUstream_st* stream) {
  return launch(backward_scan<2>(), backward_scan<1>(), params, workspace, stream);
}

}  // namespace jax_flashkda::sm90
