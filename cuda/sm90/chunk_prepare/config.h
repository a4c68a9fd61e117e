// Tile, threads and shared memory of the prepare stage.
#pragma once

#include "chunk/scores.cuh"
#include "chunk/wy.cuh"
#include "problem/workspace.h"

namespace jax_flashkda::chunk_prepare {

// A chunk and value head to prepare: which rows of the operands it is.
struct alignas(16) Item {
  int64_t qk_row;       // of q and k, as [B T H]: of its first token
  int64_t value_row;    // of g, beta, v and o, as [B T HV]
  int64_t operand_row;  // of the workspace's operands
  int64_t decay_row;    // of the workspace's chunk decays, or -1: nobody will ask for it
  int32_t gate_row;     // of A_log and dt_bias, as [B HV]
  int32_t length;       // 1 .. kChunk tokens; 0: there is no more work
};

struct Config {
  static constexpr int kHeadDim = 128;  // K
  static constexpr int kStrip = 4;      // tokens of a warp: four strips are a 16-token block
  static constexpr int kStrips = static_cast<int>(kChunk) / kStrip;
  static constexpr int kBlocks = static_cast<int>(kChunk) / kBlock;
  static constexpr int kStripsOfBlock = kBlock / kStrip;
  static constexpr int kThreads = 32 * kStrips;
  static constexpr int kCtasPerSm = 2;
  static constexpr int kChannels = kHeadDim / 32;  // a lane owns channels 4 lane .. 4 lane + 3
  static constexpr int kRowBytes = 2 * kHeadDim;   // of a token in bf16

  // Factors of the scores, in 16-token tiles, each relative to its block's point of reference: as
  // a row a token carries x exp(G - row reference), as a column k exp(column reference - G).
  enum Factor { kRowQ, kRowK, kColumnK, kFactors };

  // After the products the same memory holds the matrices.
  struct Matrices {
    float A_kk[kChunk * kMatrixStride];
    float A_kk_inv[kChunk * kMatrixStride];
    uint8_t A_qk[kChunk * kTileRowBytes];  // bf16, swizzled as the state stage reads it
  };

  // Points of reference are whole numbers (of the log2 decay), so that a factor moves from one to
  // another by an exact power of two. A block refers to its middle, where rows in its upper half
  // and columns in its lower half have exponents <= 0 and the others grow by half a block's decay;
  // in a channel where that is too much, rows refer to the block's start and columns to its end.
  struct References {
    float strip_offset[kStrips][kHeadDim];   // strip's start - row reference; at first the decay of
                                             // the whole strip
    float end_offset[kBlocks][kHeadDim];     // G_C - row reference
    int16_t column_offset[kBlocks][kHeadDim];  // column reference - row reference
    // Powers of two in bf16: the decay up to a block's row reference, and the decay between the
    // column reference of a block and the row reference of a later one.
    alignas(16) uint16_t before[kBlocks][kHeadDim];
    alignas(16) uint16_t between[kBlocks * (kBlocks - 1) / 2][kHeadDim];
    int32_t too_far[kBlocks];  // a channel of the block decays too far for its middle
  };
  static constexpr __host__ __device__ int pair(int later, int earlier) {
    return later * (later - 1) / 2 + earlier;
  }

  struct Walk {  // over the CTA's items
    uint32_t step;    // items to the next
    uint32_t chunks;  // of a track
    uint32_t first;   // track of the group
    uint32_t track;   // in the group
    uint32_t index;   // of the chunk in the track
  };

  struct Shared {
    union {
      uint8_t factors[kBlocks][kFactors][kTileBytes];
      Matrices matrices;
    };
    uint8_t q[kBlocks][kTileBytes], k[kBlocks][kTileBytes], g[kBlocks][kTileBytes];  // as they come
    References references;
    alignas(16) float norms[kChunk][2];  // what q and k of a token are multiplied by
    alignas(16) float beta[kChunk];
    alignas(16) float dt_bias[kHeadDim];
    float A_log;
    Item item, next_item;
    int64_t written_row;  // operand row of the last item, where the state stage waits for it; or -1
    Walk walk;
  };
};
static_assert(sizeof(PairwiseScratch) <= Config::kFactors * kTileBytes);  // takes a block's place
static_assert(Config::kCtasPerSm * (sizeof(Config::Shared) + 1024) <= 228 * 1024);

}  // namespace jax_flashkda::chunk_prepare
