#include "core/check.h"
#include "sm90/launch.h"
#include "sm90/short_conv/backward.cuh"
#include "sm90/short_conv/config.h"
#include "sm90/short_conv/kernel.cuh"
#include "sm90/short_conv/step.cuh"

namespace jax_flashkda::sm90 {

using namespace short_conv;

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Config>
unsigned grid_of(const ShortConvShape& s, int64_t walk) {
  return static_cast<unsigned>(s.B * short_conv_tiles(s, walk) * divide_up(s.C, Config::kChannels));
}

template <class Config>
Status launch(const ShortConvParams& params, CUstream_st* stream) {
  const int64_t walk = short_conv_walk(params.shape);
  short_conv_kernel<Config><<<grid_of<Config>(params.shape, walk), Config::kThreads, 0, stream>>>(
      params, static_cast<int>(walk));
  return launch_status("short_conv_kernel");
}

template <class Config>
Status launch(const ShortConvBackwardParams& params, CUstream_st* stream) {
  const ShortConvShape& s = params.forward.shape;
  const int64_t walk = short_conv_walk(s);
  short_conv_backward_kernel<Config>
      <<<grid_of<Config>(s, walk), Config::kThreads, 0, stream>>>(params, static_cast<int>(walk));
  return launch_status("short_conv_backward_kernel");
}

// Slots that no segment uses have no gradient.
Status clear_state_gradients(const ShortConvBackwardParams& params, CUstream_st* stream) {
  const ShortConvShape& s = params.forward.shape;
  return cuda_status(
      cudaMemsetAsync(params.d_initial_state, 0,
                      static_cast<size_t>(s.B * s.N * kShortConvHistory * s.C) * sizeof(float),
                      stream),
      "short_conv_backward: cudaMemsetAsync");
}

Status launch_reduce(const ShortConvBackwardParams& params, CUstream_st* stream) {
  const ShortConvShape& s = params.forward.shape;
  const int64_t sums = kShortConvWidth + (params.d_bias != nullptr ? 1 : 0);
  const int64_t ctas = s.B * sums * divide_up(s.C, ReduceConfig::kChannels);
  launch_early(short_conv_reduce_kernel<ReduceConfig>, static_cast<unsigned>(ctas),
               ReduceConfig::kThreads, 0, stream, params, short_conv_tiles(s, short_conv_walk(s)));
  return launch_status("short_conv_reduce_kernel");
}

template <class Config>
Status launch_step(const ShortConvStepParams& params, CUstream_st* stream) {
  const int64_t groups = divide_up(params.shape.C, Config::kThreads * Config::kVector);
  const auto ctas = static_cast<unsigned>(divide_up(params.shape.N, Config::kSequences) * groups);
  clear_older_error();
  short_conv_step_kernel<Config><<<ctas, Config::kThreads, 0, stream>>>(params);
  return launch_status("short_conv_step_kernel");
}

}  // namespace

Status launch_short_conv(const ShortConvParams& params, CUstream_st* stream) {
  clear_older_error();
  return params.dtype == DType::kBF16 ? launch<ForwardBf16>(params, stream)
                                      : launch<ForwardF32>(params, stream);
}

Status launch_short_conv_backward(const ShortConvBackwardParams& params, CUstream_st* stream) {
  const ShortConvParams& forward = params.forward;
  clear_older_error();
  const bool may_leave_slots = forward.segment_ids != nullptr || forward.shape.T == 0;
  if (params.d_initial_state != nullptr && may_leave_slots) {
    if (Status status = clear_state_gradients(params, stream); !status.ok()) return status;
  }
  if (forward.shape.T > 0) {
    const Status status = forward.dtype == DType::kBF16 ? launch<BackwardBf16>(params, stream)
                                                        : launch<BackwardF32>(params, stream);
    if (!status.ok()) return status;
  }
  return launch_reduce(params, stream);
}

Status launch_short_conv_step(const ShortConvStepParams& params, CUstream_st* stream) {
  constexpr int64_t kOneWave = 132 * 1024;  // threads that run together
  const ShortConvStepShape& s = params.shape;
  const bool one_wave = s.N * s.C <= kOneWave * StepConfig<1, 1>::kVector;
  if (s.T > 1) return launch_step<StepConfig<kMostStepTokens, 1>>(params, stream);
  if (one_wave || params.parameters_per_sequence)
    return launch_step<StepConfig<1, 1>>(params, stream);
  return launch_step<StepConfig<1, 4>>(params, stream);
}

}  // namespace jax_flashkda::sm90
