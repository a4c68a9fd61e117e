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

  // Factors of the scores, in 16-token tiles. As a column a token carries c = k exp(reference - G),
  // as a row x exp(G - reference). The reference of the far tiles is the chunk's middle, of the
  // near ones the middle of each half, of the diagonal ones the middle of each block. A block is a
  // far row (q, k) if it lies in the upper half, else a far column; near likewise in its half.
  enum Factor { kFarK, kNearK, kDiagonalQ, kDiagonalK, kDiagonalC, kFarQ, kNearQ };
  static constexpr int kFactorTiles = 25;
  // First tile of a block: block 3 has all seven, 1 all but far q, 2 all but near q, 0 neither, so
  // it goes last.
  static constexpr __host__ __device__ int first_tile(int block) {
    return block == 3 ? 0 : block == 1 ? 7 : block == 2 ? 14 : 20;
  }

  // After the products the same memory holds the matrices.
  struct Matrices {
    float A_kk[kChunk * kMatrixStride];
    float A_kk_inv[kChunk * kMatrixStride];
    uint8_t A_qk[kChunk * kTileRowBytes];  // bf16, swizzled as the state stage reads it
  };
  struct Shared {
    union {
      uint8_t factors[kFactorTiles][kTileBytes];
      Matrices matrices;
    };
    alignas(16) float strip_decay[kStrips][kHeadDim];  // log2 decay of a whole strip
    struct alignas(16) Scalars {
      float beta[kChunk];
      float dt_bias[kHeadDim];
      float amplitude;            // exp(A_log)
    } scalars[2];                 // of this chunk and the next, in turns
    bool spans_too_far[kStrips];  // the strip decays too far for a reference point at its end
  };
};
static_assert(sizeof(PairwiseScratch) <=
              3 * kTileBytes);  // it takes the place of a block's diagonal factors

}  // namespace jax_flashkda::chunk_prepare
