// Tiles, stages and threads of the kernels that cut a row into pieces.
#pragma once

#include "sm90/state_scan.cuh"

namespace jax_flashkda::chunk_state_pieces {

// What is found of a piece, and kept as a [K, V] matrix each.
enum Map : int32_t {
  kOffset = 0,  // B: the state behind the piece from none ahead of it
  kFactor = 1,  // M: the same from the identity, without values
  kMaps = 2,
};

struct MapConfig
    : state_scan::Config<2,
                         state_scan::kKDecayedTiles | state_scan::kKRestoredTiles |
                             state_scan::kAkkInvTile,
                         /*kStages=*/3, /*kReverse=*/false> {
  static constexpr bool kOnlyRowEnds = true;
};

struct CombineConfig {
  static constexpr int kColumns = 8;  // of V, of a CTA: columns of the state move independently
  static constexpr int kThreads = 256;
  static constexpr int kFactorStride = 132;  // floats between rows of M: other banks
  struct Shared {
    alignas(16) float factor[2][128 * kFactorStride];  // M of a piece and of the next, in turns
    alignas(16) float state[128][kColumns];
  };
};

// Where the maps of pieces go: state i of either is `stride` states behind the one before.
struct MapPlaces {
  float* offset;
  float* factor;
  int64_t stride;
};

// The place of a piece's maps in the workspace: B, then M.
inline __host__ __device__ int64_t map_place(const ForwardShape& shape, const StatePieces& pieces,
                                             int64_t row, int64_t piece, int64_t head) {
  return ((row * (pieces.count - 1) + piece) * shape.HV + head) * kMaps;
}

}  // namespace jax_flashkda::chunk_state_pieces
