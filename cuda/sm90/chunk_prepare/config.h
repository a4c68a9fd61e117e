// Tile, threads and shared memory of the prepare stage.
#pragma once

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
  static constexpr int kBlocks = static_cast<int>(kChunk) / kBlock;
  static constexpr int kHalves = 2;                 // of the channels
  static constexpr int kChannels = 64;              // of a half
  static constexpr int kWarps = kBlocks * kHalves;  // a warp owns 64 channels of a block
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasPerSm = 2;
  static constexpr int kStagingThreads = 128;  // the last ones bring the inputs
  static constexpr int kFirstStaging = kThreads - kStagingThreads;
  // Of the two warps that have no blocks before their own:
  static constexpr int kWalker = 0;   // the warp that looks for the next item
  static constexpr int kWriter = 32;  // the thread that starts copies to memory, and waits for them
  static constexpr int kEighths = kChannels / 8;  // columns of an accumulator
  static constexpr int kSteps = kChannels / 16;   // of a product over a warp's channels
  static constexpr int kRowBytes = 2 * kHeadDim;  // of a token in bf16
  static constexpr int kHalfBytes = 2 * kChannels * static_cast<int>(kChunk);
  static constexpr int kBlockPairs = kBlocks * (kBlocks + 1) / 2;  // on and below the diagonal

  using Halves = uint8_t[kHalves][kHalfBytes];  // rows of 64 channels of bf16, by swizzle128

  // Points of reference are whole numbers (of the log2 decay), so that a factor moves from one to
  // another by an exact power of two. A block refers to its middle, where rows in its upper half
  // and columns in its lower half have exponents <= 0 and the others grow by half a block's decay;
  // in a channel where that is too much, rows refer to the block's start and columns to its end.
  struct References {
    float row_offset[kBlocks][kHeadDim];     // block's start - row reference
    float column_offset[kBlocks][kHeadDim];  // column reference - row reference
    float half_rest[kBlocks][kHeadDim];      // exp of half of G_C - column reference
    // Powers of two in bf16, in the order of channel_place(): the decay up to a block's row
    // reference, and that between the column reference of a block and the row reference of a later
    // one.
    alignas(16) uint16_t before[kBlocks][kHeadDim];
    alignas(16) uint16_t between[kBlocks * (kBlocks - 1) / 2][kHeadDim];
    int32_t too_far[kBlocks][kHalves];  // a channel of these decays too far for the block's middle
  };
  static constexpr __host__ __device__ int pair(int later, int earlier) {
    return later * (later - 1) / 2 + earlier;
  }

  struct Walk {            // over the CTA's items
    uint32_t step;         // items to the next
    uint32_t step_tracks;  // .. of which the tracks in the group
    uint32_t step_chunks;  // .. and the chunks
    uint32_t chunks;       // of a track
    uint32_t first;        // track of the group
    uint32_t size;         // tracks of the group
    uint32_t track;        // in the group
    uint32_t index;        // of the chunk in the track
  };

  // What the scores become, and what lends its memory before.
  struct Matrices {
    float A_kk[kChunk * kMatrixStride];
    union {
      float A_kk_inv[kChunk * kMatrixStride];
      float4 partial[kBlockPairs][2][2][32];  // scores of one half of the channels, for the warp
                                              // that has the other: of q and k, eights of columns
    };
  };

  struct Shared {
    // As they come, then in the same places what the state stage reads: q and k decayed, k restored.
    alignas(1024) Halves q, k, g;
    union {
      Halves columns;  // k exp(column reference - G)
      struct {
        uint8_t A_qk[kChunk * kTileRowBytes], A_kk_inv[kChunk * kTileRowBytes];
      } images;
    };
    union {
      float2 block_decay[kBlocks][kHeadDim];       // of a block's first half and of all of it
      float pairwise[kWarps][kBlock * kChannels];  // G of a warp's channels
      Matrices matrices;
    };
    References references;
    alignas(16) float norms[kChunk][2];  // what q and k of a token are multiplied by
    alignas(16) float beta[kChunk];
    alignas(16) float dt_bias[kHeadDim];
    float A_log;
    Item item, next_item;
    Item written;  // the last one, until it has left; of length 0: there is none
    Walk walk;
  };
};
static_assert(Config::kCtasPerSm * (sizeof(Config::Shared) + 1024) <= 228 * 1024);

}  // namespace jax_flashkda::chunk_prepare
