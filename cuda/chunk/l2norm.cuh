// Optional normalisation of q and k: x / sqrt(sum x^2 + 1e-6) over the channels of a token and
// head, in fp32.
#pragma once

#include "core/ptx.cuh"

namespace jax_flashkda {

__device__ __forceinline__ float sum_of_squares(uint2 x) {
  float sum = bf16_low(x.x) * bf16_low(x.x);
  sum = fmaf(bf16_high(x.x), bf16_high(x.x), sum);
  sum = fmaf(bf16_low(x.y), bf16_low(x.y), sum);
  return fmaf(bf16_high(x.y), bf16_high(x.y), sum);
}

__device__ __forceinline__ float l2norm_factor(float squares) { return rsqrtf(squares + 1e-6f); }

}  // namespace jax_flashkda
