// How a CTA of the decode step holds its part of a state.
#pragma once

#include "problem/params.h"

namespace jax_flashkda::decode_step {

// kLanes lanes of a warp share a row, 16 bytes each: 8 make 128 bytes, 32 half a KB. kCtasPerSm CTAs
// share an SM; what their registers hold is what is under way from memory, and what they take of
// shared memory is not there for it.
template <class State_, int kDim, int kLanes_, int kCtasPerSm_, int kTokens_ = kMostStepTokens,
          class Index_ = int64_t>
struct Config {
  using State = State_;
  using Index = Index_;
  static constexpr int kK = kDim, kV = kDim, kLanes = kLanes_, kCtasPerSm = kCtasPerSm_;
  static constexpr int kTokens = kTokens_;  // at most
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kVector = 16 / sizeof(State);  // columns of a lane
  static constexpr int kColumns = kLanes * kVector;   // of a CTA
  static constexpr int kParts = kV / kColumns;        // CTAs of a state
  static constexpr int kRowsOfWarp = kK / kWarps;
  // A sum over a warp's rows is that of four interleaved groups of rows, whoever holds them: the
  // bits do not depend on kLanes.
  static constexpr int kGroups = 4;
  static constexpr int kGroupsOfLane = kGroups * kLanes / 32;
  static constexpr int kRowsOfGroup = kRowsOfWarp / kGroups;
  static_assert(kV % kColumns == 0 && kColumns % 32 == 0 && kGroupsOfLane >= 1);

  struct alignas(16) Row {  // of a token: what channel c brings to row c of the state
    float k, decay, q, unused;
  };

  struct alignas(16) Shared {
    Row rows[kTokens][kK];
    float v[kTokens][kColumns];
    float partial[kTokens == 1 ? 1 : 2][2][kWarps][kColumns];  // [token's parity][S^T k, S^T q]
    float beta[kTokens], kq[kTokens];                          // kq: the product of k and q
  };
};

}  // namespace jax_flashkda::decode_step
