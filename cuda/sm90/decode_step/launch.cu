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
  decode_step_kernel<Config><<<static_cast<unsigned>(ctas), Config::kThreads, 0, stream>>>(params);
  return launch_status("decode_step_kernel");
}

// Divisions measured by tests/native/step_time. All of them give the same bits.
template <int kDim>
Status launch(const StepParams& params, CUstream_st* stream) {
  using Bf16 = __nv_bfloat16;
  constexpr bool kLarge = kDim == 128;
  if (params.state_dtype == DType::kF32)
    return launch<Config<float, float, kDim, 16, 4>>(params, stream);
  if (params.shape.T == 1)
    return launch<Config<Bf16, Bf16, kDim, kLarge ? 16 : 8, kLarge ? 3 : 4>>(params, stream);
  return launch<Config<Bf16, float, kDim, 8, 4>>(params, stream);
}

}  // namespace

Status launch_decode_step(const StepParams& params, CUstream_st* stream) {
  return params.shape.K == 64 ? launch<64>(params, stream) : launch<128>(params, stream);
}

}  // namespace jax_flashkda::sm90
