#include <cuda_bf16.h>

#include "core/check.h"
#include "sm90/decode_step/config.h"
#include "sm90/decode_step/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using decode_step::Config;
using decode_step::decode_step_kernel;

namespace {

template <class Config>
Status launch(const StepParams& params, CUstream_st* stream) {
  const int64_t ctas = params.shape.N * params.shape.HV * Config::kParts;
  clear_older_error();
  decode_step_kernel<Config>
      <<<static_cast<unsigned>(ctas), Config::kThreads, 0, stream>>>(params);
  return launch_status("decode_step_kernel");
}

template <int kDim>
Status launch(const StepParams& params, CUstream_st* stream) {
  if (params.state_dtype == DType::kBF16)
    return launch<Config<__nv_bfloat16, kDim, kDim, kDim / 8>>(params, stream);
  return launch<Config<float, kDim, kDim, 16>>(params, stream);
}

}  // namespace

Status launch_decode_step(const StepParams& params, CUstream_st* stream) {
  return params.shape.K == 64 ? launch<64>(params, stream) : launch<128>(params, stream);
}

}  // namespace jax_flashkda::sm90
