// Tile, threads and shared memory of the gradient stage.
#pragma once

#include "problem/params.h"
#include "problem/workspace.h"

namespace jax_flashkda::chunk_gradient {

struct Config {
  static constexpr int kHeadDim = 128;  // K and V
  static constexpr int kWarps = 8;      // a warp owns 16 channels of all 64 tokens
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kGroups = static_cast<int>(kChunk) / 8;  // of 8 tokens: columns of a product
  static constexpr int kBlocks = static_cast<int>(kChunk) / 16;
  static constexpr int kRowBytes = 2 * kHeadDim;                    // a token's row, bf16
  static constexpr int kRowPieces = kRowBytes / 16;                 // 16-byte pieces of it
  static constexpr int kHalfTile = static_cast<int>(kChunk) * 128;  // 64 tokens of 64 bf16 columns
  static constexpr int kPartialFloats = kHeadDim + 1;  // gradient_partial_floats: d_dt_bias, dA_log
  static constexpr int kReduceThreads = 256;
  static constexpr int kReduceCtasPerSm = 8;
};

template <DType kGateType>
struct Shared {
  // What the tensor cores read: all swizzled by swizzle128.
  alignas(1024) uint8_t state[kBoundaryBytes];           // S at the chunk's start
  alignas(1024) uint8_t state_gradient[kBoundaryBytes];  // dS' at its end
  alignas(1024) uint8_t d_o[2][Config::kHalfTile];       // columns of V 0 .. 63, 64 .. 127
  alignas(1024) uint8_t d_r[2][Config::kHalfTile];
  alignas(1024) uint8_t u[2][Config::kHalfTile];
  // Gradients of the scores, strictly lower: row i, columns j in 64 bf16.
  alignas(1024) uint8_t d_A_qk[Config::kHalfTile];
  alignas(1024) uint8_t d_L[Config::kHalfTile];
  // Raw inputs, then in their place the gradients; a warp alone touches its 16 channels.
  alignas(128) uint8_t q[kChunk * Config::kRowBytes];
  alignas(128) uint8_t k[kChunk * Config::kRowBytes];
  alignas(128) uint8_t g[kChunk * Config::kHeadDim * (kGateType == DType::kBF16 ? 2 : 4)];
  alignas(16) float norms[2][kChunk];          // factor of each token of q, of k
  float dot_parts[Config::kWarps][2][kChunk];  // <qn, dqn>, <kn, dkn> over a warp's channels
  float dots[2][kChunk];
  float d_A_qk_diagonal[kChunk];
  float d_r_times_u[kChunk];     // <dR_i, U_i>
  float A_sums[Config::kWarps];  // of d log decay / d A_log, over a warp's channels
  uint64_t boundaries_full;      // both boundary images have arrived
};

}  // namespace jax_flashkda::chunk_gradient
