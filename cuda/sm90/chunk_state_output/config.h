// Tiles and stages of the state stage.
#pragma once

#include "sm90/state_scan.cuh"

namespace jax_flashkda::chunk_state_output {

// kChunkStates_: the state after every whole chunk is wanted.
template <int kValueTiles, bool kChunkStates_>
struct Config : state_scan::Config<kValueTiles, state_scan::kAllTiles, /*kStages=*/3,
                                   /*kReverse=*/false, /*kRowStages=*/kValueTiles == 1 ? 3 : 2> {
  static constexpr bool kChunkStates = kChunkStates_;
  // What the loaders need to wait for chunk_prepare without spills.
  static constexpr int kLoaderRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
};
static_assert(sizeof(Config<2, true>::Shared) <= 227 * 1024);

}  // namespace jax_flashkda::chunk_state_output
