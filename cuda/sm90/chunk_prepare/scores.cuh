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
  float half[1][4];   // warp < 8: half warp % 2 of block (1, 0) for warps 0 .. 3, of (3, 2) for
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
    if (!s.references.too_far[place.row]) 
      score_block<false>(scores.block, rows, columns, nullptr, strip.lane);
    const BlockPlace half = half_place(w);
    score_scaled_half_block(scores.half[0], tile(half.row, half.of_q ? Config::kRowQ : Config::kRowK),
                            tile(half.column, Config::kColumnK), w & 1, powers(half), strip.lane);
  } else {
    score_block<true>(scores.block, rows, columns, powers(place), strip.lane);
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
        const float a = s.norms[strip.row(r)][0], b = s.norms[strip.row(r)][1];
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

// Columns of a block to the matrix it belongs to: zero above the diagonal (select: factors may be
// infinite there). kFirst .. kFirst + kCount - 1: which eighths of them acc has.
template <bool kDiagonal, int kCount>
__device__ __forceinline__ void store_columns(Config::Shared& s, const BlockPlace& place,
                                              int first_eighth, const float (&acc)[kCount][4],
                                              int lane) {
  const int row = lane >> 2, column = 2 * (lane & 3) + 8 * first_eighth;  // in the block
  const int i = kBlock * place.row + row, j = kBlock * place.column + column;
  if (place.of_q) {
    const uint32_t at = shared_address(s.matrices.A_qk) + swizzle128(i, j >> 3) + 4 * (lane & 3);
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int above = row + 8 * h - column - 8 * n;  // the diagonal, if negative
        const float x = !kDiagonal || above >= 0 ? acc[n][2 * h] : 0.0f,
                    y = !kDiagonal || above >= 1 ? acc[n][2 * h + 1] : 0.0f;
        const uint32_t to = (at ^ (n << 4)) + 8 * h * kTileRowBytes;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack_bf16(x, y)) : "memory");
      }
  } else {
    float* at = s.matrices.A_kk + matrix_at(i, j);
    const float beta[2] = {s.beta[i], s.beta[i + 8]};
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int above = row + 8 * h - column - 8 * n;
        const float x = !kDiagonal || above >= 1 ? beta[h] * acc[n][2 * h] : 0.0f,
                    y = !kDiagonal || above >= 2 ? beta[h] * acc[n][2 * h + 1] : 0.0f;
        *reinterpret_cast<float2*>(at + matrix_at(8 * h, 8 * n)) = make_float2(x, y);
      }
  }
}

__device__ __forceinline__ void store_scores(Config::Shared& s, const Scores& scores,
                                             const Strip& strip) {
  const BlockPlace place = block_place(strip.warp);
  if (strip.warp >= 8) return store_columns<false>(s, place, 0, scores.block, strip.lane);
  store_columns<true>(s, place, 0, scores.block, strip.lane);
  store_columns<false>(s, half_place(strip.warp), strip.warp & 1, scores.half, strip.lane);
}

// What the merges read above the diagonal blocks, where nothing is computed: (0, 1) and (2, 3).
__device__ __forceinline__ void clear_upper_blocks(Config::Matrices& m, const Strip& strip) {
  const int which = strip.warp - 8;  // warps without half a block to store
  if (which < 0 || which >= 2) return;
  float4* X = reinterpret_cast<float4*>(
      m.A_kk_inv + matrix_at(32 * which + (strip.lane >> 1), 32 * which + 16 + 8 * (strip.lane & 1)));
  X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// A_qk and (I + A_kk)^-1 to memory, the tokens that exist, but for the inverse's lower
// left quarter. Zero above the diagonal blocks. Eight warps: thread 0 .. 255.
__device__ __forceinline__ void write_matrices(const Config::Shared& s, uint8_t* operands,
                                               int length, int thread) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  uint8_t* A_qk = operands + kTileAqk * length * kTileRowBytes;
  const int piece = thread & 7;
  const bool swap = piece & 4;  // half of the lanes read the second four columns first: other banks
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (thread >> 3) + 32 * half;
    if (row >= length) continue;
    const bool above = piece >> 1 > row / kBlock;
    const int to = swizzle128(row, piece);
    uint4 scores = make_uint4(0, 0, 0, 0), inverse = scores;
    if (!above) scores = *reinterpret_cast<const uint4*>(s.matrices.A_qk + to);
    *reinterpret_cast<uint4*>(A_qk + to) = scores;
    if (half == 1 && piece < 4) continue;  // the lower left quarter
    if (!above) {
      const float4* X =
          reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
      const float4 xa = X[swap], xb = X[!swap];
      const uint2 a = make_uint2(pack_bf16(xa.x, xa.y), pack_bf16(xa.z, xa.w)),
                  b = make_uint2(pack_bf16(xb.x, xb.y), pack_bf16(xb.z, xb.w));
      inverse = swap ? make_uint4(b.x, b.y, a.x, a.y) : make_uint4(a.x, a.y, b.x, b.y);
    }
    *reinterpret_cast<uint4*>(A_kk_inv + to) = inverse;
  }
}

// A tile of merge_to_64 to memory.
__device__ __forceinline__ void write_tile(const Config::Shared& s, const float (&tile)[4],
                                           uint8_t* operands, int length, int warp, int lane) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  const int row = 32 + 16 * (warp >> 2) + (lane >> 2), piece = warp & 3, column = 2 * (lane & 3);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (row + 8 * h < length)
      *reinterpret_cast<uint32_t*>(A_kk_inv + swizzle128(row + 8 * h, piece) + 2 * column) =
          pack_bf16(-tile[2 * h], -tile[2 * h + 1]);
}

}  // namespace jax_flashkda::chunk_prepare
