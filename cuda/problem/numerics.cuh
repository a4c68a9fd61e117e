// One rule each for the numbers every stage must agree on.
#pragma once

#include "core/ptx.cuh"
#include "problem/params.h"

namespace jax_flashkda {

inline constexpr float kLog2E = 1.4426950408889634f;

// A token's log decay is clamped here first: exp(-110) is zero in fp32, so nothing is lost, and
// -inf becomes a plain reset (inf - inf in a difference of sums would not).
inline constexpr float kLog2DecayMin = -110.0f * kLog2E;

// Largest decay, in powers of two, between a reference point and a row it serves: the row's factor
// grows by as much, and 2^100 times any sensible key stays finite. A bounded gate (8 tokens of -5)
// never exceeds it.
inline constexpr float kLog2DecayHalfSpan = 100.0f;

// A NaN stays one: it must show in its own segment.
__device__ __forceinline__ float clamp_log2_decay(float log2_decay) {
  return log2_decay < kLog2DecayMin ? kLog2DecayMin : log2_decay;
}

__device__ __forceinline__ float beta_value(float beta, bool is_logits, bool allow_neg_eigval) {
  if (!is_logits) return beta;
  const float sigmoid = 1.0f / (1.0f + __expf(-beta));
  return allow_neg_eigval ? 2.0f * sigmoid : sigmoid;
}

// The backward divides by beta. What it takes for zero instead changes nothing above rounding. A NaN
// stays one.
inline constexpr float kSmallestBeta = 0x1p-60f;
__device__ __forceinline__ float nonzero_beta(float beta) {
  return fabsf(beta) < kSmallestBeta ? copysignf(kSmallestBeta, beta) : beta;
}

// beta of a token and value head, from the raw word that holds it.
__device__ __forceinline__ uint32_t load_beta_word(const ForwardParams& p, int64_t at) {
  return p.beta_dtype == DType::kBF16 ? load_early(static_cast<const uint16_t*>(p.beta) + at)
                                      : load_early(static_cast<const uint32_t*>(p.beta) + at);
}
__device__ __forceinline__ float beta_from_word(const ForwardParams& p, uint32_t word) {
  const float raw = __uint_as_float(p.beta_dtype == DType::kBF16 ? word << 16 : word);
  const float beta = beta_value(raw, p.beta_is_logits, p.allow_neg_eigval);
  return p.nonzero_beta ? nonzero_beta(beta) : beta;
}

// 16-byte piece `piece` of row `row` in a tile whose 128-byte rows are swizzled as the tensor cores
// expect: the pieces of eight consecutive rows fall into different banks.
__host__ __device__ __forceinline__ constexpr int swizzle128(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

}  // namespace jax_flashkda
