// The short convolution of the next 1 to 8 tokens of N sequences, and the inputs to go on from, in
// place: state <- the last W - 1 of (state, x).
//
// Grid: a CTA for every kThreads * kVector channels of a sequence. All that a thread needs is
// loaded at once, so a step takes one latency of memory: reads x [N, T, C], the kernel and the state
// [slots, W - 1, C], writes y and the state. The 12.6 MB of N = 64, T = 1, C = 3 * 32 * 128 in bf16
// would be 2.9 us at 4.3 TB/s; what is in L2 comes faster, and a launch costs about as much.
//
// A sequence without a slot writes zeros to y and nothing else. Two sequences with one slot both
// read and write it, in bounds and in no order.
#pragma once

#include "sm90/short_conv/convolution.cuh"

namespace jax_flashkda::short_conv {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    short_conv_step_kernel(const __grid_constant__ ShortConvStepParams p) {
  constexpr int kVector = Config::kVector, kTokens = static_cast<int>(kMostStepTokens);
  const int64_t C = p.shape.C;
  const int T = static_cast<int>(p.shape.T);
  const uint32_t groups =
      static_cast<uint32_t>((C + Config::kThreads * kVector - 1) / (Config::kThreads * kVector));
  const int64_t n = blockIdx.x / groups;
  const int64_t channel = (int64_t{blockIdx.x % groups} * Config::kThreads + threadIdx.x) * kVector;
  if (channel >= C) return;
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[n] : n;
  const bool exists = slot >= 0 && slot < p.shape.slots;
  const int64_t first = n * T * C + channel;
  const int64_t state = slot * kHistory * C + channel;
  const int64_t parameters = p.parameters_per_sequence ? n : 0;

  RawElements<kVector> tokens[kTokens], kernel[kWidth], bias, before[kHistory];
#pragma unroll
  for (int w = 0; w < kWidth; ++w)
    kernel[w].load(p.kernel, p.kernel_dtype, (parameters * kWidth + w) * C + channel);
  if (p.bias != nullptr) bias.load(p.bias, p.kernel_dtype, parameters * C + channel);
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    if (t < T) tokens[t].load(p.x, p.dtype, first + t * C);
#pragma unroll
  for (int w = 0; w < kHistory; ++w)
    if (exists) before[w].load(p.state, p.state_dtype, state + w * C);

  Window<kVector> window;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) kernel[w].convert(p.kernel_dtype, window.kernel[w]);
  bias.convert(p.kernel_dtype, window.bias);
#pragma unroll
  for (int w = 0; w < kHistory; ++w) before[w].convert(p.state_dtype, window.before[w]);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= T) break;
    float x[kVector], y[kVector];
    tokens[t].convert(p.dtype, x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float z = window.value(j, x[j]);
      y[j] = !exists ? 0.0f : p.silu ? z * sigmoid(z) : z;
    }
    window.push(x);
    store_elements(p.y, p.dtype, first + t * C, y);
  }
  if (!exists) return;
#pragma unroll
  for (int w = 0; w < kHistory; ++w)
    store_elements(p.state, p.state_dtype, state + w * C, window.before[w]);
}

}  // namespace jax_flashkda::short_conv
