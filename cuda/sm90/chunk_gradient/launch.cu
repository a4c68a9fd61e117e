#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_gradient/config.h"
#include "sm90/chunk_gradient/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_gradient::chunk_gradient_kernel;
using chunk_gradient::Config;

namespace {

using Kernel = void (*)(BackwardParams, BackwardWorkspace, int);

Kernel kernel_for(DType gate_type) {
  return gate_type == DType::kBF16 ? chunk_gradient_kernel<DType::kBF16>
                                   : chunk_gradient_kernel<DType::kF32>;
}

size_t shared_bytes(DType gate_type) {  // the kernel aligns it itself
  return 1024 + (gate_type == DType::kBF16 ? sizeof(chunk_gradient::Shared<DType::kBF16>)
                                           : sizeof(chunk_gradient::Shared<DType::kF32>));
}

// CTAs of a reduction over `items` elements.
unsigned reduce_ctas(int64_t items, int sms) {
  const int64_t wanted = (items + Config::kReduceThreads - 1) / Config::kReduceThreads;
  return static_cast<unsigned>(std::min(wanted, int64_t{sms} * Config::kReduceCtasPerSm));
}

}  // namespace

Status initialize_chunk_gradient() {
  for (DType gate_type : {DType::kBF16, DType::kF32}) {
    Status status = cuda_status(
        cudaFuncSetAttribute(kernel_for(gate_type), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes(gate_type))),
        "chunk_gradient_kernel: cudaFuncSetAttribute");
    if (!status.ok()) return status;
  }
  return {};
}

Status launch_chunk_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream) {
  const ForwardParams& forward = params.forward;
  const int64_t parts = gradient_ctas_per_head(forward.shape);
  clear_older_error();
  kernel_for(forward.g_dtype)<<<static_cast<unsigned>(parts * forward.shape.HV), Config::kThreads,
                                shared_bytes(forward.g_dtype), stream>>>(params, workspace,
                                                                         static_cast<int>(parts));
  return launch_status("chunk_gradient_kernel");
}

Status launch_gradient_reduce(const BackwardParams& params, const BackwardWorkspace& workspace,
                              CUstream_st* stream) {
  const ForwardShape& shape = params.forward.shape;
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t sums = shape.B * shape.HV * gradient_partial_floats(shape);
  clear_older_error();
  if (sums > 0 && (params.dA_log != nullptr || params.d_dt_bias != nullptr)) {
    chunk_gradient::
        sum_partials_kernel<<<reduce_ctas(sums, sms), Config::kReduceThreads, 0, stream>>>(
            params, workspace, static_cast<int>(gradient_ctas_per_head(shape)));
    if (Status status = launch_status("sum_partials_kernel"); !status.ok()) return status;
  }
  const int64_t quads = shape.B * shape.T * shape.H * shape.K / 2;  // of dq and dk
  if (quads > 0 && shape.HV != shape.H) {
    chunk_gradient::
        sum_head_groups_kernel<<<reduce_ctas(quads, sms), Config::kReduceThreads, 0, stream>>>(
            params, workspace);
    if (Status status = launch_status("sum_head_groups_kernel"); !status.ok()) return status;
  }
  return {};
}

}  // namespace jax_flashkda::sm90
