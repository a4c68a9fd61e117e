// Raw gate -> log2 decay of a token and channel.
//   softplus: -exp(A_log) softplus(g + dt_bias)
//   bounded:  lower_bound sigmoid(exp(A_log) (g + dt_bias))
#pragma once

#include "problem/numerics.cuh"

namespace jax_flashkda {

// Per channel and head (a is exp(A_log)), folded so that the hot loop is one multiply-add ahead of
// the special functions.
struct GateCoefficients {
  float slope;
  float offset;
  float amplitude;
};

__device__ __forceinline__ GateCoefficients gate_coefficients(Gate gate, float a, float dt_bias,
                                                              float gate_lower_bound) {
  if (gate == Gate::kSoftplus) return {kLog2E, dt_bias * kLog2E, -a};
  if (gate == Gate::kBounded)
    return {-a * kLog2E, -a * kLog2E * dt_bias, gate_lower_bound * kLog2E};
  return {kLog2E, 0.0f, 0.0f};
}

// log2(1 + 2^x). Near zero the sum 1 + 2^x would keep only a few digits of 2^x, and slow gates live
// there.
__device__ __forceinline__ float softplus_base2(float x) {
  const float u = exp2_fast(-fabsf(x));
  const float series = u * fmaf(u, fmaf(u, 1.0f / 3.0f, -0.5f), 1.0f) * kLog2E;
  const float tail = u < 0.015625f ? series : log2_fast(1.0f + u);
  return fmaxf(x, 0.0f) + tail + (x - x);  // x - x: fmaxf would swallow a NaN
}

template <Gate kGate>
__device__ __forceinline__ float log2_decay(float g, const GateCoefficients& c) {
  const float x = fmaf(g, c.slope, c.offset);
  if constexpr (kGate == Gate::kSoftplus) return clamp_log2_decay(c.amplitude * softplus_base2(x));
  if constexpr (kGate == Gate::kBounded) return c.amplitude * reciprocal_fast(1.0f + exp2_fast(x));
  return clamp_log2_decay(x);
}

// Derivatives of the natural log decay.
struct GateGradient {
  float raw;    // with respect to the raw gate, and so to dt_bias
  float A_log;  // zero without one
};

// A clamped token has none. `raw_bias` is raw gate + dt_bias, a is exp(A_log).
template <Gate kGate>
__device__ __forceinline__ GateGradient gate_gradient(float g, const GateCoefficients& c, float a,
                                                      float raw_bias) {
  const float x = fmaf(g, c.slope, c.offset);
  if constexpr (kGate == Gate::kSoftplus) {
    const float log2_decay = c.amplitude * softplus_base2(x), u = exp2_fast(-fabsf(x)),
                r = reciprocal_fast(1.0f + u);
    const bool clamped = log2_decay < kLog2DecayMin;
    return {clamped ? 0.0f : -a * (x < 0.0f ? u * r : r),
            clamped ? 0.0f : log2_decay * (1.0f / kLog2E)};
  }
  if constexpr (kGate == Gate::kBounded) {
    // sigmoid and 1 - sigmoid: the smaller of the two never as a difference.
    const float u = exp2_fast(-fabsf(x)), r = reciprocal_fast(1.0f + u);
    const float raw = c.amplitude * (1.0f / kLog2E) * a * (u * r * r);
    return {raw, raw * raw_bias};
  }
  return {x < kLog2DecayMin ? 0.0f : 1.0f, 0.0f};
}

}  // namespace jax_flashkda
