// How a CTA of the decode step holds its part of a state, and its shared memory.
#pragma once

#include "problem/params.h"

namespace jax_flashkda::decode_step {

// kLanes lanes of a warp share a row, 16 bytes each: 8 make 128 bytes, 32 half a KB. Parts are
// loaded kStages - 1 ahead of the one that is worked on.
template <class State_, int kK_, int kV_, int kLanes_, int kStages_>
struct Config {
  using State = State_;
  static constexpr int kK = kK_, kV = kV_, kLanes = kLanes_, kStages = kStages_;
  static constexpr int kWarps = 4;  // that hold the state; one more prepares the tokens
  static constexpr int kHolders = 32 * kWarps, kThreads = kHolders + 32;
  static constexpr int kVector = 16 / sizeof(State);  // columns of a lane
  static constexpr int kColumns = kLanes * kVector;   // of a part
  static constexpr int kParts = kV / kColumns;        // of a state
  static constexpr int kRowsOfWarp = kK / kWarps;
  // A sum over a warp's rows is that of four interleaved groups of rows, whoever holds them: the
  // bits do not depend on kLanes.
  static constexpr int kGroups = 4;
  static constexpr int kGroupsOfLane = kGroups * kLanes / 32;
  static constexpr int kRowsOfGroup = kRowsOfWarp / kGroups;
  static_assert(kV % kColumns == 0 && kColumns % 32 == 0 && kGroupsOfLane >= 1);

  struct Row {  // of a token: what channel c brings to row c of the state
    float k, q, decay, unused;
  };
  struct Token {
    Row rows[kK];
    float v[kColumns];
    float beta, kq, unused[2];  // kq: the product of k and q
  };
  struct Partial {  // S^T k and S^T q over the rows of each warp
    float read[kWarps][kColumns], out[kWarps][kColumns];
  };
  static constexpr int kStageBytes = kK * kColumns * sizeof(State);

  // Stages; the tokens of two parts; the sums of one token, or with several tokens of two.
  static constexpr int shared_bytes(int tokens) {
    return kStages * kStageBytes + 2 * tokens * static_cast<int>(sizeof(Token)) +
           (tokens > 1 ? 2 : 1) * static_cast<int>(sizeof(Partial));
  }
};

}  // namespace jax_flashkda::decode_step
