// Optional normalisation of q and k: x / sqrt(sum x^2 + 1e-6) over the channels of a token and head, in fp32.
#pragma once

#include "core/ptx.cuh"

namespace jax_flashkda {

// Sums 32 values over the 32 lanes at once: lane l returns the sum of value l. Each step hands half of the remaining
// values to the partner lane, so it takes 31 shuffles instead of 160; the order of additions is fixed.
__device__ __forceinline__ float sum_over_lanes(float (&values)[32], int lane) {
#pragma unroll
  for (int half = 16; half >= 1; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? values[i] : values[i + half];
      const float keep = upper ? values[i + half] : values[i];
      values[i] = keep + __shfl_xor_sync(0xffffffffu, give, half);
    }
  }
  return values[0];
}

__device__ __forceinline__ float sum_of_squares(uint2 x) {
  float sum = bf16_low(x.x) * bf16_low(x.x);
  sum = fmaf(bf16_high(x.x), bf16_high(x.x), sum);
  sum = fmaf(bf16_low(x.y), bf16_low(x.y), sum);
  return fmaf(bf16_high(x.y), bf16_high(x.y), sum);
}

__device__ __forceinline__ float l2norm_factor(float squares) { return rsqrtf(squares + 1e-6f); }

}  // namespace jax_flashkda
