// How the threads of the short convolution share tokens and channels.
#pragma once

#include <cuda_bf16.h>

#include "problem/short_conv.h"

namespace jax_flashkda::short_conv {

inline constexpr int kWidth = static_cast<int>(kShortConvWidth);
inline constexpr int kHistory = static_cast<int>(kShortConvHistory);

// A thread owns kVector consecutive channels, a warp 32 threads' and a stretch of tokens, a CTA the
// stretches of its warps, one behind the other. Loads of kBatch tokens are under way together.
template <class Element_, int kVector_, int kBatch_, int kCtasPerSm_>
struct Config {
  using Element = Element_;
  static constexpr int kVector = kVector_, kBatch = kBatch_, kCtasPerSm = kCtasPerSm_;
  static constexpr int kWarps = static_cast<int>(kShortConvWarps), kThreads = 32 * kWarps;
  static constexpr int kChannels = 32 * kVector;  // of a CTA
  static constexpr int kSums = static_cast<int>(kShortConvSums);
};

// The forward moves 16 bytes a thread. The backward carries three times as many numbers from token
// to token and moves 8 of bf16, 256 a warp, so that enough warps fit on an SM.
using ForwardBf16 = Config<__nv_bfloat16, 8, 4, 4>;
using ForwardF32 = Config<float, 4, 8, 4>;
using BackwardBf16 = Config<__nv_bfloat16, 4, 4, 4>;
using BackwardF32 = Config<float, 4, 4, 3>;

struct ReduceConfig {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kVector = 4, kChannels = 32 * kVector;  // of a CTA
};

// A thread of the step has up to kTokens tokens of kSequences sequences.
template <int kTokens_, int kSequences_>
struct StepConfig {
  static constexpr int kThreads = 128, kVector = 4;
  static constexpr int kTokens = kTokens_, kSequences = kSequences_;
};

}  // namespace jax_flashkda::short_conv
