// Tiles and stages of the state stage.
#pragma once

#include "sm90/state_scan.cuh"

namespace jax_flashkda::chunk_state_output {

template <int kValueTiles>
using Config = state_scan::Config<kValueTiles, state_scan::kAllTiles, kValueTiles == 1 ? 3 : 2,
                                  /*kReverse=*/false>;

}  // namespace jax_flashkda::chunk_state_output
