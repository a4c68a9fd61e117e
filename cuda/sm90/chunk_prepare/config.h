// Tile, threads and shared memory of the prepare stage.
#pragma once

#include "chunk/scores.cuh"
#include "chunk/wy.cuh"
#include "problem/workspace.h"

namespace jax_flashkda::chunk_prepare {

struct Config {
  static constexpr int kHeadDim = 128;  // K
  static constexpr int kStrip = 8;      // tokens of a warp: two strips are a 16-token block
  static constexpr int kStrips = static_cast<int>(kChunk) / kStrip;
  static constexpr int kThreads = 32 * kStrips;
  static constexpr int kCtasPerSm = 2;
  static constexpr int kChannels = kHeadDim / 32;  // a lane owns channels 4 lane .. 4 lane + 3

  // Factors of the scores, 16-token tiles. As a column a token carries c = k exp(reference - G), as a row x exp(G - reference).
  // The reference of the far tiles is the chunk's middle, of the near ones the middle of each half, of the diagonal ones the
  // middle of each block.
  struct Factors {
    uint8_t q_far[2][kTileBytes];   // blocks 2, 3
    uint8_t k_far[2][kTileBytes];
    uint8_t c_far[2][kTileBytes];   // blocks 0, 1
    uint8_t q_near[2][kTileBytes];  // blocks 1, 3
    uint8_t k_near[2][kTileBytes];
    uint8_t c_near[2][kTileBytes];  // blocks 0, 2
  };
  // After the products the same memory holds the matrices.
  struct Matrices {
    float A_kk[kChunk * kMatrixStride];
    float A_kk_inv[kChunk * kMatrixStride];
    uint8_t A_qk[kChunk * kTileRowBytes];  // bf16, swizzled as the state stage reads it
  };
  union Diagonal {
    struct {
      uint8_t q[kTileBytes];
      uint8_t k[kTileBytes];
      uint8_t c[kTileBytes];
    } factors;
    PairwiseScratch pairwise;
  };
  struct Shared {
    union {
      Factors factors;
      Matrices matrices;
    };
    Diagonal diagonal[4];
    float strip_decay[kStrips][kHeadDim];  // log2 decay of a whole strip
    float norms[kStrips][2 * kStrip];      // factors of q, then of k
    float beta[kChunk];
    bool spans_too_far[kStrips];           // the strip decays too far for a reference point at its end
  };
};
static_assert(sizeof(Config::Matrices) <= sizeof(Config::Factors));

}  // namespace jax_flashkda::chunk_prepare
