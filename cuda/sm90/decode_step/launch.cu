#include <cuda_bf16.h>

#include "core/check.h"
#include "sm90/decode_step/config.h"
#include "sm90/decode_step/kernel.cuh"
#include "sm90/decode_step/one_token.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using decode_step::Config;
using decode_step::decode_one_token_kernel;
using decode_step::decode_step_kernel;

namespace {

template <class Config>
Status launch(void (*kernel)(StepParams), const char* name, const StepParams& params,
              CUstream_st* stream) {
  const int64_t ctas = params.shape.N * params.shape.HV * Config::kParts;
  clear_older_error();
  kernel<<<static_cast<unsigned>(ctas), Config::kThreads, 0, stream>>>(params);
  return launch_status(name);
}

template <class Config>
Status launch(const StepParams& params, CUstream_st* stream) {
  return launch<Config>(decode_step_kernel<Config>, "decode_step_kernel", params, stream);
}

template <class Config>
Status launch_one_token(const StepParams& params, CUstream_st* stream) {
  return launch<Config>(decode_one_token_kernel<Config>, "decode_one_token_kernel", params, stream);
}

// Divisions measured by tests/native/step_time. All of them give the same bits.
template <int kDim>
Status launch(const StepParams& params, CUstream_st* stream) {
  using Bf16 = __nv_bfloat16;
  if (params.state_dtype == DType::kF32) return launch<Config<float, kDim, 16, 4>>(params, stream);
  if (params.shape.T == 1)
    return launch_one_token<Config<Bf16, kDim, kDim / 8, 4, 1, uint32_t>>(params, stream);
  return launch<Config<Bf16, kDim, 8, 4>>(params, stream);
}

}  // namespace

Status launch_decode_step(const StepParams& params, CUstream_st* stream) {
  return params.shape.K == 64 ? launch<64>(params, stream) : launch<128>(params, stream);
}

}  // namespace jax_flashkda::sm90
