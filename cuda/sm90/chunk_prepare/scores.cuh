// Factors to scores to the chunk's matrices:
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>           i >= j
//   A_kk[i, j] = beta_i <k_i exp(G_i - G_j), k_j>    i > j
#pragma once

#include "sm90/chunk_prepare/factors.cuh"

namespace jax_flashkda::chunk_prepare {

__device__ __forceinline__ uint32_t factor_tile(const Config::Shared& s, int block,
                                                Config::Factor factor) {
  return shared_address(s.factors[block][factor]);
}

// The blocks of scores a warp computes. Of the first eight warps each has a block of the diagonal
// and half of one beside it; the others have one of those in the lower left quarter.
struct Scores {
  float block[2][4];  // warp < 8: block (warp / 2, warp / 2); of q for even warps. Else block
                      // (2 + warp / 2 % 2, warp % 2); of q for warps 8 .. 11
  float half[4];      // warp < 8: half warp % 2 of block (1, 0) for warps 0 .. 3, of (3, 2) for
                      // 4 .. 7; of q where warp / 2 is even
};
struct BlockPlace {
  bool of_q;
  int row, column;  // in blocks
};
__device__ __forceinline__ BlockPlace block_place(int warp) {
  if (warp < 8) return {(warp & 1) == 0, warp >> 1, warp >> 1};
  return {warp < 12, 2 + ((warp >> 1) & 1), warp & 1};
}
__device__ __forceinline__ BlockPlace half_place(int warp) {
  return {((warp >> 1) & 1) == 0, 2 * (warp >> 2) + 1, 2 * (warp >> 2)};
}

__device__ __forceinline__ Scores multiply_factors(const Config::Shared& s, const Strip& strip) {
  Scores scores = {};
  const int w = strip.warp;
  const BlockPlace place = block_place(w);
  auto tile = [&](int block, Config::Factor factor) { return factor_tile(s, block, factor); };
  auto powers = [&](const BlockPlace& at) {
    return reinterpret_cast<const uint2*>(s.references.between[Config::pair(at.row, at.column)]);
  };
  const uint32_t rows = tile(place.row, place.of_q ? Config::kRowQ : Config::kRowK),
                 columns = tile(place.column, Config::kColumnK);
  if (w < 8) {
    if (!s.references.too_far[place.row]) score_block(scores.block, rows, columns, strip.lane);
    const BlockPlace half = half_place(w);
    score_scaled_half_block(scores.half, tile(half.row, half.of_q ? Config::kRowQ : Config::kRowK),
                            tile(half.column, Config::kColumnK), w & 1, powers(half), strip.lane);
  } else {
    score_scaled_block(scores.block, rows, columns, powers(place), strip.lane);
  }
  return scores;
}

// The blocks of the diagonal whose decay no single point of reference can carry, pair by pair. Rare,
// and slow; all threads of the CTA.
template <DType kGateType>
__device__ __forceinline__ void pairwise_diagonal(float (&acc)[2][4], Config::Shared& s,
                                               const ForwardParams& p, const Item& item) {
  const Strip strip(item.length);
  DecayRows g;
  cumulate_decay<kGateType>(g, s, p, item, strip);
  const float4 offset =
      *reinterpret_cast<const float4*>(&s.references.strip_offset[strip.warp][strip.channel]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // all have read what is there, before it is overwritten
    if (s.references.too_far[strip.block()]) {
      PairwiseScratch& scratch = *reinterpret_cast<PairwiseScratch*>(s.factors[strip.block()]);
#pragma unroll
      for (int r = 0; r < Config::kStrip; ++r) {
        float q[4], k[4];
        unpack(q, staged_row(s.q, strip, r));
        unpack(k, staged_row(s.k, strip, r));
        const float a = s.q_norm[strip.row(r)], b = s.k_norm[strip.row(r)];
        if ((strip.lane >> 4) != half) continue;
        const int to = pairwise_at(strip.row(r) % kBlock, 4 * (strip.lane & 15));
        *reinterpret_cast<float4*>(scratch.q + to) =
            make_float4(a * q[0], a * q[1], a * q[2], a * q[3]);
        *reinterpret_cast<float4*>(scratch.k + to) =
            make_float4(b * k[0], b * k[1], b * k[2], b * k[3]);
        *reinterpret_cast<float4*>(scratch.log2_decay_cumsum + to) = make_float4(
            offset.x + g[r][0], offset.y + g[r][1], offset.z + g[r][2], offset.w + g[r][3]);
      }
    }
    __syncthreads();  // the blocks' rows are there, before they are read
    const BlockPlace place = block_place(strip.warp);
    if (strip.warp < 8 && s.references.too_far[place.row]) {
      const PairwiseScratch& scratch =
          *reinterpret_cast<const PairwiseScratch*>(s.factors[place.row]);
      add_pairwise_scores(acc, scratch, place.of_q ? scratch.q : scratch.k, strip.lane);
    }
  }
}

// Eight columns of a block to the matrix it belongs to: zero above the diagonal (select: factors
// may be infinite there).
template <bool kDiagonal>
__device__ __forceinline__ void store_columns(Config::Shared& s, const BlockPlace& at, int eighth,
                                              const float (&c)[4], int lane) {
  const int row = lane >> 2, column = 8 * eighth + 2 * (lane & 3);  // in the block
  const int i = kBlock * at.row + row, j = kBlock * at.column + column;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x = c[2 * h], y = c[2 * h + 1];
    if (at.of_q) {
      if (kDiagonal) x = row + 8 * h >= column ? x : 0.0f, y = row + 8 * h > column ? y : 0.0f;
      *reinterpret_cast<uint32_t*>(s.matrices.A_qk + swizzle128(i, j >> 3) + 2 * (j & 7) +
                                   8 * h * kTileRowBytes) = pack_bf16(x, y);
    } else {
      const float beta = s.beta[i + 8 * h];
      x *= beta, y *= beta;
      if (kDiagonal) x = row + 8 * h > column ? x : 0.0f, y = row + 8 * h > column + 1 ? y : 0.0f;
      *reinterpret_cast<float2*>(s.matrices.A_kk + matrix_at(i + 8 * h, j)) = make_float2(x, y);
    }
  }
}

__device__ __forceinline__ void store_scores(Config::Shared& s, const Scores& scores,
                                             const Strip& strip) {
  const BlockPlace place = block_place(strip.warp);
#pragma unroll
  for (int eighth = 0; eighth < 2; ++eighth) {
    if (strip.warp < 8) {
      store_columns<true>(s, place, eighth, scores.block[eighth], strip.lane);
    } else {
      store_columns<false>(s, place, eighth, scores.block[eighth], strip.lane);
    }
  }
  if (strip.warp < 8)
    store_columns<false>(s, half_place(strip.warp), strip.warp & 1, scores.half, strip.lane);
}

// Above the diagonal blocks nothing is computed, and zeros are read.
__device__ __forceinline__ void clear_upper_blocks(Config::Matrices& m, const Strip& strip) {
  const int which = strip.warp - 8;  // warps without half a block to store
  if (which < 0 || which >= 6) return;
  const int row = which < 3 ? 0 : which < 5 ? 1 : 2, column = which < 3 ? which + 1 : which < 5 ? which - 1 : 3;
  const int i = kBlock * row + (strip.lane >> 1), piece = 2 * column + (strip.lane & 1);
  *reinterpret_cast<uint4*>(m.A_qk + swizzle128(i, piece)) = make_uint4(0, 0, 0, 0);
  float4* X = reinterpret_cast<float4*>(m.A_kk_inv + matrix_at(i, 8 * piece));
  X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// A_qk and (I + A_kk)^-1 Diag(beta) to memory, the tokens that exist.
__device__ __forceinline__ void write_matrices(const Config::Shared& s, uint8_t* operands,
                                               int length) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  uint8_t* A_qk = operands + kTileAqk * length * kTileRowBytes;
  const int at = thread_index(), row = at >> 3, piece = at & 7;
  static_assert(Config::kThreads == kChunk * 8);
  if (row >= length) return;
  const float4* X =
      reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
  const float4* beta = reinterpret_cast<const float4*>(s.beta + 8 * piece);
  const bool swap = piece & 4;  // half of the lanes read the second four columns first: other banks
  const float4 xa = X[swap], xb = X[!swap], ba = beta[swap], bb = beta[!swap];
  const float4 x0 = swap ? xb : xa, x1 = swap ? xa : xb, b0 = swap ? bb : ba, b1 = swap ? ba : bb;
  *reinterpret_cast<uint4*>(A_kk_inv + swizzle128(row, piece)) =
      make_uint4(pack_bf16(x0.x * b0.x, x0.y * b0.y), pack_bf16(x0.z * b0.z, x0.w * b0.w),
                 pack_bf16(x1.x * b1.x, x1.y * b1.y), pack_bf16(x1.z * b1.z, x1.w * b1.w));
  *reinterpret_cast<uint4*>(A_qk + 16 * at) =
      *reinterpret_cast<const uint4*>(s.matrices.A_qk + 16 * at);
}

}  // namespace jax_flashkda::chunk_prepare
