// Tile, threads and shared memory of the prepare stage.
#pragma once

#include "chunk/scores.cuh"
#include "chunk/wy.cuh"
#include "problem/workspace.h"

namespace jax_flashkda::chunk_prepare {

struct Config {
  static constexpr int kHeadDim = 128;                         // K
  static constexpr int kBlocks = static_cast<int>(kChunk) / kBlock;
  static constexpr int kThreads = 32 * kBlocks;                // warp w owns block w: rows 16 w .. 16 w + 15
  static constexpr int kCtasPerSm = 2;
  static constexpr int kChannels = kHeadDim / 32;              // a lane owns channels 4 lane .. 4 lane + 3

  // Factors of the scores. A block is a column (c: k exp(reference - G)) of later blocks, a row (q, k: x exp(G - reference))
  // of earlier ones. Two levels: rows of blocks 2, 3 against columns of blocks 0, 1, and inside each such pair of blocks.
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
    uint8_t A_qk[kChunk * 128];  // bf16, swizzled as the state stage reads it
  };
  struct DiagonalFactors {
    uint8_t q[kTileBytes];
    uint8_t k[kTileBytes];
    uint8_t c[kTileBytes];
  };
  struct Shared {
    union {
      Factors factors;
      Matrices matrices;
    };
    DiagonalFactors diagonal[kBlocks];  // each its warp's own; scratch of the pairwise scores
    float block_decay[kBlocks][kHeadDim];  // log2 decay of a whole block
    float norms[kBlocks][2 * kBlock];      // factors of q, then of k
    float beta[kChunk];
  };
};
static_assert(sizeof(Config::Matrices) <= sizeof(Config::Factors));

}  // namespace jax_flashkda::chunk_prepare
