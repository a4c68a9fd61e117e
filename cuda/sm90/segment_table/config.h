// Threads of the table kernels.
#pragma once

namespace jax_flashkda::segment_table {

struct Config {
  static constexpr int kThreads = 1024;  // of the one CTA that reads a row
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kCopyThreads = 256;  // unused states
  static constexpr int kCopyCtasPerSm = 4;

  struct Shared {
    int warp_results[kWarps];
    int base;  // where the row's entries go
  };
};

}  // namespace jax_flashkda::segment_table
