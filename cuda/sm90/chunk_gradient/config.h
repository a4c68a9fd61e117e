// Tile, threads and shared memory of the gradient stage.
#pragma once

#include <vector_types.h>

#include <cstddef>

#include "problem/params.h"
#include "problem/workspace.h"

namespace jax_flashkda::chunk_gradient {

struct Config {
  static constexpr int kHeadDim = 128;  // K and V
  // A warp owns 16 channels of 32 tokens, the chunk's lower or upper half: two warps share them.
  static constexpr int kChannelWarps = kHeadDim / 16;
  static constexpr int kWarps = 2 * kChannelWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kGroups = 4;                  // of 8 tokens in a half: columns of a product
  static constexpr int kBlocks = 2;                  // of 16 tokens in a half
  static constexpr int kRowBytes = 2 * kHeadDim;     // a token's row, bf16
  static constexpr int kRowPieces = kRowBytes / 16;  // 16-byte pieces of it
  static constexpr int kHalfTile = static_cast<int>(kChunk) * 128;  // 64 tokens of 64 bf16 columns
  static constexpr int kPartialFloats = kHeadDim + 1;  // gradient_partial_floats: d_dt_bias, dA_log
  static constexpr int kFewTokens = 4;  // of a chunk whose d_beta is found anew: few_tokens.cuh
  static constexpr int kReduceThreads = 256;
  static constexpr int kReduceCtasPerSm = 8;
};

// A chunk of the CTA's head with its place in its segment.
struct Item {
  int32_t row = 0, start = 0;
  int32_t length = 0;  // 0: there is none
  int32_t segment = -1;
  bool first = true, last = true;
  bool at_caller_state = false;  // starts from initial_state or ends in d_final_state

  __device__ bool exists() const { return length > 0; }
  __device__ int64_t token(const ForwardShape& shape) const {
    return int64_t{row} * shape.T + start;
  }
};

// What the two warps of the same channels tell each other, and what a warp keeps for itself.
struct Exchange {
  float boundary_product[2][Config::kHeadDim];  // <S, dS'> over half the columns of V
  float caller_product[2][Config::kHeadDim];    // likewise, not rounded: Item::at_caller_state
  float log2_decay[2][Config::kHeadDim];        // of each half
  float restored[2][Config::kHeadDim];          // sum of k_j exp(G_C - G_j) dk_r_j in each half
  float d_G[2][Config::kHeadDim];               // sum of dG in each half
  // Reference points of each block of the chunk, as rows and as columns.
  float row_reference[2 * Config::kBlocks][Config::kHeadDim];
  float column_reference[2 * Config::kBlocks][Config::kHeadDim];
};

// In the place of the operands of the products over V, once those are through.
struct Scratch {
  // Factors of the chunk's blocks: a lane's operand registers.
  uint4 q_row[2 * Config::kBlocks][Config::kChannelWarps][32];
  uint4 k_row[2 * Config::kBlocks][Config::kChannelWarps][32];
  uint4 k_column[2 * Config::kBlocks][Config::kChannelWarps][32];
  // Of a lane's two tokens of a group and one channel: G - row reference, and 2^ it.
  float4 decays[Config::kWarps][Config::kGroups][2][32];
};

// What find_few_beta_gradients needs of a chunk's only tokens. Keys are not normalised.
struct FewTokens {
  static constexpr int kMost = Config::kFewTokens;
  // Sums over channels, of tokens i >= j: <q_i exp(G_i - G_j), k_j>, likewise of k_i, and <q_i, q_i>.
  enum Sum { kQK, kKK, kQQ, kSums };

  float decay[kMost][Config::kHeadDim];  // log2
  float sums[kSums][kMost][kMost];       // kQQ: of a token with itself alone
  float decayed_key[Config::kHeadDim], restored_key[Config::kHeadDim];  // of one token
  float2 parts[4][Config::kHeadDim];  // of its products with S and dS', over 32 channels
  float2 rows[kMost][Config::kHeadDim];  // those products, then R and dU
  float beta[kMost];
  float d_beta[kMost][4];  // over 32 columns of V
};

// The two warps of the same channels meet at barriers kPairBarrier + channel warp.
inline constexpr int kPairBarrier = 1;

template <DType kGateType>
struct Shared {
  // What the products over V read: all swizzled by swizzle128.
  struct Values {
    uint8_t state[kBoundaryBytes];           // S at the chunk's start
    uint8_t state_gradient[kBoundaryBytes];  // dS' at its end
    uint8_t d_o[2][Config::kHalfTile];       // columns of V 0 .. 63, 64 .. 127
    uint8_t d_r[2][Config::kHalfTile];
    uint8_t u[2][Config::kHalfTile];
  };
  union {
    alignas(1024) Values values;
    Scratch scratch;
  };
  // Gradients of the scores, strictly lower: row i, columns j in 64 bf16.
  alignas(1024) uint8_t d_A_qk[Config::kHalfTile];
  alignas(1024) uint8_t d_L[Config::kHalfTile];
  // Raw inputs, then in their place the gradients; a warp alone touches its 16 channels.
  alignas(128) uint8_t q[kChunk * Config::kRowBytes];
  alignas(128) uint8_t k[kChunk * Config::kRowBytes];
  alignas(128) uint8_t g[kChunk * Config::kHeadDim * (kGateType == DType::kBF16 ? 2 : 4)];
  alignas(16) float norms[2][kChunk];  // factor of each token of q, of k
  Exchange exchange;
  FewTokens few;
  // <qn, dqn>, <kn, dkn> over a warp's channels; over all in the first place.
  float dots[Config::kChannelWarps][2][kChunk];
  Item items[2];                    // this one and the next, in turns
  float dt_bias[Config::kHeadDim];  // of the item's row and the CTA's head
  float amplitude;                  // exp(A_log)
  alignas(16) float d_A_qk_diagonal[kChunk];
  float d_r_times_u[kChunk];     // <dR_i, U_i>
  uint32_t without_beta[2];      // a bit for each token of each half that writes nothing
  float A_sums[Config::kWarps];  // of d log decay / d A_log, over a warp's channels
  uint64_t boundaries_full;      // both boundary images have arrived
};
// Addresses count from d_A_qk to d_L, and from q to k to g.
using Layout = Shared<DType::kF32>;
static_assert(offsetof(Layout, d_L) - offsetof(Layout, d_A_qk) == Config::kHalfTile);
static_assert(offsetof(Layout, k) - offsetof(Layout, q) == kChunk * Config::kRowBytes);
static_assert(offsetof(Layout, g) - offsetof(Layout, k) == kChunk * Config::kRowBytes);
static_assert(sizeof(Scratch) <= sizeof(Layout::Values));

}  // namespace jax_flashkda::chunk_gradient
