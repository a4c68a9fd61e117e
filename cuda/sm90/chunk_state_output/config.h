// Tile, roles and shared memory of the state stage.
#pragma once

#include "problem/workspace.h"

namespace jax_flashkda::chunk_state_output {

// What the loaders tell the consumers about the chunk in a stage.
struct ChunkHeader {
  int64_t token;  // row * T + first token
  int64_t state;  // (row * N + slot) * HV + head, or -1: no initial state, final state dropped
  int32_t head;
  int32_t value_column;  // first of the CTA's columns of V
  int32_t length;        // 1 .. kChunk; 0: there is no more work
  bool first;            // of its segment
  bool last;
};

enum Barrier : uint32_t {
  kConsumerBarrier = 1
};  // one for each consumer warpgroup, from here on; 0 is __syncthreads

// kValueTiles warpgroups, each with 64 columns of V.
template <int kValueTiles_>
struct Config {
  static constexpr int kValueTiles = kValueTiles_;
  static constexpr int kHeadDim = 128;                      // K and V
  static constexpr int kColumns = 64;                       // of V, of one warpgroup
  static constexpr int kStages = kValueTiles > 1 ? 2 : 3;   // as many as fit
  static constexpr int kThreads = 128 * (kValueTiles + 1);  // warpgroup 0 loads, the others compute
  static constexpr int kLoaderRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr bool kMoveRegisters =
      kValueTiles > 1;                      // with one consumer everybody can have enough
  static constexpr int kValueThreads = 96;  // of the loading warpgroup: all but its first warp

  struct alignas(1024) Stage {
    uint8_t operands[kOperandTiles]
                    [8192];  // the workspace's tiles: [token] rows of 128 bytes, swizzled
    uint8_t v[kValueTiles]
             [8192];  // [token] rows of a warpgroup's 64 columns, swizzled; then the rows of o
    float chunk_decay[kHeadDim];
    ChunkHeader header;
  };

  struct Shared {
    Stage stages[kStages];
    uint64_t full[kStages];   // the loaders fill a stage, the consumers wait
    uint64_t empty[kStages];  // the consumers empty it, the loaders wait
  };
};

}  // namespace jax_flashkda::chunk_state_output
