// Threads and shared memory of the stage for segments that no state meets.
#pragma once

#include "chunk/wy.cuh"
#include "problem/workspace.h"

namespace jax_flashkda::short_segments {

// A run and value head.
struct Item {
  int64_t qk_row;     // of q and k, as [B T H]: of its first token
  int64_t value_row;  // of g, beta, v and o, as [B T HV]
  int32_t gate_row;   // of A_log and dt_bias, as [B HV]
  int32_t length;     // 1 .. kShortTokens; 0: there is none
};

// Over the items of a worker, who has every so many: heads are neighbours.
struct Walk {
  const SegmentEntry* entries;  // of the segment table; null: rows are runs
  uint32_t count;               // of runs
  uint32_t run, head;
  uint32_t step_runs, step_heads;
};

struct Config {
  static constexpr int kHeadDim = 128;  // K and V
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kQuarters = 4;  // of the channels
  static constexpr int kMostBlocks = static_cast<int>(kShortTokens) / kBlock;
  static constexpr int kStride = 36;  // floats between rows of the matrix
  static constexpr int kWarps = 4;    // of a CTA: each works for itself
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasPerSm = 3;
  static constexpr int kSingleTokens = 4;  // a half warp's segments of one token under way
  // kLog2DecayHalfSpan for q and k whose norms come later: 2^64 times as much is finite, and so are
  // sums of squares up to there. No bounded gate exceeds it in 8 tokens either.
  static constexpr float kNormSpan = 60.0f;

  using Values = uint8_t[kBlock * kRowBytes];  // rows of a block, by value_place
  using Columns = uint4[kQuarters][2][32];     // of a block's lanes, by 16 channels

  struct Warp {
    union alignas(16) {
      Values values[kMostBlocks];  // of v, then of o
      struct {
        Values first_values;
        Columns columns;  // k exp(G_15 - G) of the first block, until the second has met it
      };
    };
    float matrix[kShortTokens * kStride];  // A_kk, then (I + A_kk)^-1
    Walk walk;
    Item item, next_item;
  };
  struct Shared {
    Warp warps[kWarps];
  };
};
static_assert(kShortTokens == 2 * kBlock);
static_assert(Config::kCtasPerSm * (sizeof(Config::Shared) + 1024) <= 228 * 1024);

}  // namespace jax_flashkda::short_segments
