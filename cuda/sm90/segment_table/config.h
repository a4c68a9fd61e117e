// Threads of the table kernels.
#pragma once

#include "problem/segment_table.h"

namespace jax_flashkda::segment_table {

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kPositions = 8;  // of a thread
  template <int32_t kShort>
  using Shape = segment_table::Shape<kThreads, kPositions, kShort>;
  static constexpr int kCopyThreads = 256;  // unused states
  static constexpr int kCopyCtasPerSm = 4;
};

}  // namespace jax_flashkda::segment_table
