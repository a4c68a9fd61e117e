// Optional normalisation of q and k: x / sqrt(sum x^2 + 1e-6) over the channels of a token and
// head, in fp32.
#pragma once

#include "core/ptx.cuh"

namespace jax_flashkda {

// Hands half of the remaining values to the partner lane and takes the partner's share of the other
// half.
template <int kHalf, int kCount>
__device__ __forceinline__ void fold_lanes(float (&values)[kCount], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = values[i + kHalf];
    values[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kHalf);
  }
}

// Sums 16 values over the 32 lanes at once: lane l returns the sum of value l % 16, after 16
// shuffles instead of 80. The order of additions is fixed.
__device__ __forceinline__ float sum_over_lanes(float (&values)[16], int lane) {
  fold_lanes<8>(values, lane);
  fold_lanes<4>(values, lane);
  fold_lanes<2>(values, lane);
  fold_lanes<1>(values, lane);
  return values[0] + __shfl_xor_sync(0xffffffffu, values[0], 16);
}

__device__ __forceinline__ float sum_of_squares(uint2 x) {
  float sum = bf16_low(x.x) * bf16_low(x.x);
  sum = fmaf(bf16_high(x.x), bf16_high(x.x), sum);
  sum = fmaf(bf16_low(x.y), bf16_low(x.y), sum);
  return fmaf(bf16_high(x.y), bf16_high(x.y), sum);
}

__device__ __forceinline__ float l2norm_factor(float squares) { return rsqrtf(squares + 1e-6f); }

}  // namespace jax_flashkda
