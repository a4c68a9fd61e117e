// Threads and shared memory of the stage for segments that no state meets.
#pragma once

#include "chunk/wy.cuh"
#include "problem/workspace.h"

namespace jax_flashkda::short_segments {

struct Config {
  static constexpr int kHeadDim = 128;  // K and V
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kHalves = 2;     // of the channels
  static constexpr int kChannels = 64;  // of a half
  static constexpr int kSteps = 4;      // of a product over them
  static constexpr int kMostBlocks = static_cast<int>(kShortTokens) / kBlock;
  static constexpr int kStride = 36;  // floats between rows of the matrix
  static constexpr int kWarps = 4;    // of a CTA: each works for itself
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasPerSm = 3;
  static constexpr int kSingleTokens = 4;  // a half warp's segments of one token under way
  static constexpr float kNormSpan = 60.0f;

  using Values = uint8_t[kBlock * kRowBytes];  // rows of a block, by Place::address

  struct Warp {
    alignas(16) Values values[kMostBlocks];  // of v, then of o
    uint4 columns[kHalves][kSteps][32];      // k exp(G_end - G) of the first of two blocks
    float matrix[kShortTokens * kStride];    // A_kk, then (I + A_kk)^-1
  };
  struct Shared {
    Warp warps[kWarps];
  };
};
static_assert(kShortTokens == 2 * kBlock);
static_assert(Config::kCtasPerSm * (sizeof(Config::Shared) + 1024) <= 228 * 1024);

}  // namespace jax_flashkda::short_segments
