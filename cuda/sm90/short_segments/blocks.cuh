// Segments of 2 to 32 tokens, a warp each: scores to the chunk's matrices to the output,
//   U = (I + A_kk)^-1 Diag(beta) V    O = scale A_qk U
// The last two products are transposed: V's columns are rows of the accumulators, so U is an
// operand of the next product where it is, and so is A_qk.
#pragma once

#include "sm90/short_segments/factors.cuh"

namespace jax_flashkda::short_segments {

// Of an operand with one row a token i and the tokens j as its columns, transposed: for the eights
// of i the eights of j.
using Operand = uint32_t[2][2];

struct Matrices {
  Operand own, earlier;  // by the block's own tokens, and by the first block's
};

__device__ __forceinline__ void pack_scores(Operand& packed, const BlockScores& sums) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < 2; ++n) packed[h][n] = pack_bf16(sums[n][2 * h], sums[n][2 * h + 1]);
}

// Norms and beta of a lane's tokens (rows), and the norms of k of an accumulator's columns.
struct Tokens {
  float q_norm[2], k_norm[2], beta[2], column_norm[2][2];
};

__device__ __forceinline__ void finish_norms(Tokens& tokens, const Squares& squares,
                                             const ForwardParams& p, const Place& at) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float q = squares.q[r], k = squares.k[r];
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      q += __shfl_xor_sync(0xffffffffu, q, distance);
      k += __shfl_xor_sync(0xffffffffu, k, distance);
    }
    tokens.q_norm[r] = p.qk_l2norm ? l2norm_factor(q) : 1.0f;
    tokens.k_norm[r] = p.qk_l2norm ? l2norm_factor(k) : 1.0f;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      tokens.column_norm[n][e] =
          __shfl_sync(0xffffffffu, tokens.k_norm[n], 4 * (2 * at.quarter() + e));
}

// Scores to A_qk, packed, and A_kk, to its place in the warp's matrix; kOwn: of a block with
// itself.
template <bool kOwn>
__device__ __forceinline__ void finish_scores(Operand& A_qk, float* A_kk, Scores& scores,
                                              const Tokens& rows, const float (&column_norm)[2][2],
                                              const Place& at) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float of_k[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 2 * r + e, below = kOwn ? at.below_diagonal(n, i) : 1;
        const float q = scores.q[n][i] * rows.q_norm[r] * column_norm[n][e];
        const float k = scores.k[n][i] * rows.k_norm[r] * column_norm[n][e];
        // Select: factors may be infinite above the diagonal.
        scores.q[n][i] = below >= 0 ? q : 0.0f;
        of_k[e] = below >= 1 ? rows.beta[r] * k : 0.0f;
      }
      *reinterpret_cast<float2*>(A_kk + (at.row() + 8 * r) * Config::kStride + 8 * n +
                                 2 * at.quarter()) = make_float2(of_k[0], of_k[1]);
    }
  pack_scores(A_qk, scores.q);
}

// The warp's matrix to its inverse, in place: blocks on the diagonal by substitution, that below as
// -X22 A21 X11.
template <int kBlocks>
__device__ __forceinline__ void invert(float* matrix, const Place& at) {
  constexpr int kStride = Config::kStride, kNext = kBlock * (kStride + 1);
  const int block = at.lane / kBlock, column = at.lane % kBlock;
  float* own = matrix + block * kNext;
  __syncwarp();  // A_kk, before it is read
  float x[kBlock];
  if (block < kBlocks) solve_column<kStride>(x, own, column);
  __syncwarp();  // it has been read: the inverse takes its place
  if (block < kBlocks) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) own[i * kStride + column] = x[i];
  }
  __syncwarp();  // the inverses, before they are read
  if constexpr (kBlocks == 2) {
    float* below = matrix + kBlock * kStride;
    float tile[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) product<2, kStride>(tile[n], below, matrix + 8 * n, at.lane);
    __syncwarp();  // A21 has been read: A21 X11 takes its place
#pragma unroll
    for (int n = 0; n < 2; ++n) store_block<kStride>(below + 8 * n, tile[n], 1.0f, at.lane);
    __syncwarp();  // .. and is there
#pragma unroll
    for (int n = 0; n < 2; ++n)
      product<2, kStride>(tile[n], matrix + kNext, below + 8 * n, at.lane);
    __syncwarp();  // .. and has been read
#pragma unroll
    for (int n = 0; n < 2; ++n) store_block<kStride>(below + 8 * n, tile[n], -1.0f, at.lane);
    __syncwarp();  // the inverse is complete
  }
}

__device__ __forceinline__ void load_inverse(Operand& packed, const float* block, const Place& at) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(
          block + (at.row() + 8 * h) * Config::kStride + 8 * n + 2 * at.quarter());
      packed[h][n] = pack_bf16(x.x, x.y);
    }
}

// Rows of v to shared memory in the background, zeros for tokens that are missing. A lane has a
// piece of every other row.
__device__ __forceinline__ int value_place(int row, int piece) {
  return row * Config::kRowBytes + ((piece ^ (row & 7)) << 4);
}
__device__ __forceinline__ void stage_values(Config::Warp& s, const ForwardParams& p,
                                             const Item& item, int block, const Place& at) {
  const int piece = at.lane % 16;
  const uint4* rows = static_cast<const uint4*>(p.v) + item.value_row * 16 + piece;
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    const int row = 2 * i + at.lane / 16, token = kBlock * block + row;
    const bool exists = token < item.length;
    async_load_16(s.values[block] + value_place(row, piece),
                  rows + (exists ? token * p.shape.HV * 16 : 0), exists);
  }
}
__device__ __forceinline__ void store_values(const Config::Warp& s, const ForwardParams& p,
                                             const Item& item, const Place& at) {
  const int piece = at.lane % 16;
  uint4* rows = static_cast<uint4*>(p.o) + item.value_row * 16 + piece;
#pragma unroll 2
  for (int token = at.lane / 16; token < item.length; token += 2)
    rows[token * p.shape.HV * 16] = *reinterpret_cast<const uint4*>(
        s.values[token / kBlock] + value_place(token % kBlock, piece));
}

// The rows of an item's first block to L2: a lane has half of a token's.
template <DType kGateType>
__device__ __forceinline__ void prefetch(const ForwardParams& p, const Item& item,
                                         const Place& at) {
  const int token = min(at.lane / 2, item.length - 1), line = at.lane % 2;
  const auto ask = [&](const void* tensor, int64_t row, int64_t heads, int lines) {
    const uint8_t* from =
        static_cast<const uint8_t*>(tensor) + ((row + token * heads) * lines + line) * 128;
    for (int i = 0; i < lines; i += 2) prefetch_to_l2(from + 128 * i);
  };
  ask(p.g, item.value_row, p.shape.HV, kGateType == DType::kBF16 ? 2 : 4);
  ask(p.q, item.qk_row, p.shape.H, 2);
  ask(p.k, item.qk_row, p.shape.H, 2);
  ask(p.v, item.value_row, p.shape.HV, 2);
}

// acc (+)= x times an operand, transposed: an accumulator for each eight of the operand's rows.
// Nothing of a block's own lies above its diagonal.
__device__ __forceinline__ void multiply_first(float (&acc)[2][4], const StepFactor& x,
                                               const Operand& y) {
#pragma unroll
  for (int h = 0; h < 2; ++h) mma_bf16_first(acc[h], x, y[h][0], y[h][1]);
}
__device__ __forceinline__ void multiply_more(float (&acc)[2][4], const StepFactor& x,
                                              const Operand& y) {
#pragma unroll
  for (int h = 0; h < 2; ++h) mma_bf16(acc[h], x, y[h][0], y[h][1]);
}
// .. and back to an operand: tokens are its columns.
__device__ __forceinline__ void pack_transposed(StepFactor& packed, const float (&acc)[2][4],
                                                float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      packed[2 * h + r] = pack_bf16(scale * acc[h][2 * r], scale * acc[h][2 * r + 1]);
}

// V to O, 16 columns at a time, in V's place.
template <int kBlocks>
__device__ __forceinline__ void multiply_values(Config::Warp& s, const Matrices (&inverse)[kBlocks],
                                                const Matrices (&A_qk)[kBlocks],
                                                const float (&beta)[kBlocks][2], float scale,
                                                const Place& at) {
  float betas[kBlocks][2][2];  // of an operand's columns: eights of tokens
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        betas[b][h][e] = __shfl_sync(0xffffffffu, beta[b][h], 4 * (2 * at.quarter() + e));
  const int row = 8 * (at.lane >> 4) + (at.lane & 7);
#pragma unroll 2
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    const int place = value_place(row, 2 * step + ((at.lane >> 3) & 1));
    StepFactor r[kBlocks], u[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      load_matrices_transposed(r[b], shared_address(s.values[b] + place));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&of_tokens)[2] = betas[b][i / 2];
        r[b][i] = pack_bf16(of_tokens[0] * bf16_low(r[b][i]), of_tokens[1] * bf16_high(r[b][i]));
      }
      float sums[2][4];
      multiply_first(sums, r[b], inverse[b].own);
      if (b > 0) multiply_more(sums, r[0], inverse[b].earlier);
      pack_transposed(u[b], sums, 1.0f);
      multiply_first(sums, u[b], A_qk[b].own);
      if (b > 0) multiply_more(sums, u[0], A_qk[b].earlier);
      StepFactor o;
      pack_transposed(o, sums, scale);
      store_matrices_transposed(shared_address(s.values[b] + place), o);
    }
  }
}

template <DType kGateType, int kIndex, int kBlocks>
__device__ __forceinline__ void find_matrices(Matrices& A_qk, Tokens (&tokens)[kBlocks],
                                              Config::Warp& s, const ForwardParams& p,
                                              const Item& item, const Place& at) {
  uint32_t beta[2];
  bool exists[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = kBlock * kIndex + at.row() + 8 * r;
    exists[r] = token < item.length;
    beta[r] = load_beta_word(p, item.value_row + (exists[r] ? token : 0) * p.shape.HV);
  }
  Scores own = {}, earlier = {};
  Squares squares = {};
  score_block<kGateType, kIndex, kBlocks>(own, earlier, squares, s.columns, p, item, at);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    tokens[kIndex].beta[r] = exists[r] ? beta_from_word(p, beta[r]) : 0.0f;
  finish_norms(tokens[kIndex], squares, p, at);
  float* rows = s.matrix + kIndex * kBlock * Config::kStride;
  finish_scores<true>(A_qk.own, rows + kIndex * kBlock, own, tokens[kIndex],
                      tokens[kIndex].column_norm, at);
  if constexpr (kIndex > 0)
    finish_scores<false>(A_qk.earlier, rows, earlier, tokens[kIndex], tokens[0].column_norm, at);
}

template <DType kGateType, int kBlocks>
__device__ __forceinline__ void attend(Config::Warp& s, const ForwardParams& p, const Item& item) {
  const Place at = {lane_index()};
  stage_values(s, p, item, 0, at);
  Matrices A_qk[kBlocks] = {}, inverse[kBlocks] = {};
  Tokens tokens[kBlocks];
  find_matrices<kGateType, 0>(A_qk[0], tokens, s, p, item, at);
  if constexpr (kBlocks == 2) {
    find_matrices<kGateType, 1>(A_qk[1], tokens, s, p, item, at);
    __syncwarp();  // the column factors have been read: v takes their place
    stage_values(s, p, item, 1, at);
  }
  if (at.lane == 0) {
    advance(s.walk, p);
    s.next_item = item_at(s.walk, p);
  }
  invert<kBlocks>(s.matrix, at);  // meanwhile the next item is everybody's
  if (s.next_item.length > 0) prefetch<kGateType>(p, s.next_item, at);
  float beta[kBlocks][2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    load_inverse(inverse[b].own, s.matrix + b * kBlock * (Config::kStride + 1), at);
    beta[b][0] = tokens[b].beta[0];
    beta[b][1] = tokens[b].beta[1];
  }
  if constexpr (kBlocks == 2)
    load_inverse(inverse[1].earlier, s.matrix + kBlock * Config::kStride, at);
  wait_for_async_loads();
  __syncwarp();  // v is there, and the inverse has been read
  multiply_values<kBlocks>(s, inverse, A_qk, beta, p.scale, at);
  __syncwarp();  // o, before its rows are read
  store_values(s, p, item, at);
}

template <DType kGateType, int kBlocks>
__device__ __forceinline__ void walk_blocks(Config::Shared& shared, const ForwardParams& p,
                                            const ForwardWorkspace& w) {
  Config::Warp& s = shared.warps[thread_index() / 32];
  if (lane_index() == 0) {
    s.walk = start_walk(p, w, kBlocks == 1 ? kOneBlock : kTwoBlocks, warp_number(), warps());
    s.item = {};
    if (s.walk.count > 0) s.item = item_at(s.walk, p);
  }
  __syncwarp();  // the first item, before the other lanes read it
  while (s.item.length > 0) {
    attend<kGateType, kBlocks>(s, p, s.item);
    __syncwarp();  // the item and o have been read: the next item and v take their places
    if (lane_index() == 0) s.item = s.next_item;
    __syncwarp();  // the item, before the other lanes read it
  }
  __syncwarp();  // all lanes have read that there is none, before another walk writes its first
}

}  // namespace jax_flashkda::short_segments
