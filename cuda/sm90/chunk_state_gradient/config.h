// Tiles, stages and shared memory of the two scans of the backward.
#pragma once

#include "sm90/state_scan.cuh"

namespace jax_flashkda::chunk_state_gradient {

// What a consumer warpgroup's columns of a boundary image are staged in: 64 rows of either half.
using BoundaryStage = uint8_t[2][8192];

template <int kValueTiles, uint32_t kTileSet, int kStages, bool kReverse>
struct Config : state_scan::Config<kValueTiles, kTileSet, kStages, kReverse> {
  using Base = state_scan::Config<kValueTiles, kTileSet, kStages, kReverse>;
  static constexpr bool kKeepsChunks = true;
  struct Shared : Base::Shared {
    alignas(1024) BoundaryStage boundary[kValueTiles];
  };
};

template <int kValueTiles>
using ForwardConfig =
    Config<kValueTiles,
           state_scan::kKDecayedTiles | state_scan::kKRestoredTiles | state_scan::kAkkInvTile,
           /*kStages=*/3, /*kReverse=*/false>;
template <int kValueTiles>
using BackwardConfig = Config<kValueTiles, state_scan::kAllTiles, /*kStages=*/2, /*kReverse=*/true>;
// Backwards for d_initial_state of the segments that begin rows alone: nothing of a chunk is kept, and
// a third stage fits.
template <int kValueTiles>
struct InitialConfig : state_scan::Config<kValueTiles, state_scan::kAllTiles, /*kStages=*/3,
                                          /*kReverse=*/true, /*kRowStages=*/2> {
  static constexpr bool kKeepsChunks = false;
  static constexpr bool kOnlyRowStarts = true;
};

}  // namespace jax_flashkda::chunk_state_gradient
