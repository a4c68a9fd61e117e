// Factors to scores to the chunk's matrices:
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>           i >= j
//   A_kk[i, j] = beta_i <k_i exp(G_i - G_j), k_j>    i > j
#pragma once

#include "sm90/chunk_prepare/factors.cuh"

namespace jax_flashkda::chunk_prepare {

// A diagonal block whose decay no single reference point can carry. Two warps: one sums the scores
// of q, the other those of k.
__device__ __forceinline__ void pairwise_diagonal(float (&acc)[2][4], Config::Shared& s,
                                                  const Rows& q, const Rows& k, float norms,
                                                  const DecayRows& g, const Strip& strip) {
  const int block = strip.warp >> 1, upper_half = strip.warp & 1;
  const uint32_t barrier = 1 + block;
  PairwiseScratch& scratch = *reinterpret_cast<PairwiseScratch*>(
      s.factors[Config::first_tile(block) + Config::kDiagonalQ]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    named_barrier(barrier, 64);  // the two warps have read what is there, before it is overwritten
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      const float a = norm_of_q(norms, r), b = norm_of_k(norms, r);
      if ((strip.lane >> 4) == half) {
        const int to = pairwise_at(Config::kStrip * upper_half + r, 4 * (strip.lane & 15));
        *reinterpret_cast<float4*>(scratch.q + to) =
            make_float4(a * bf16_low(q[r].x), a * bf16_high(q[r].x), a * bf16_low(q[r].y),
                        a * bf16_high(q[r].y));
        *reinterpret_cast<float4*>(scratch.k + to) =
            make_float4(b * bf16_low(k[r].x), b * bf16_high(k[r].x), b * bf16_low(k[r].y),
                        b * bf16_high(k[r].y));
        float4 start = *reinterpret_cast<const float4*>(
            &s.strip_decay[strip.warp - upper_half][strip.channel]);
        if (!upper_half) start = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *reinterpret_cast<float4*>(scratch.log2_decay_cumsum + to) =
            make_float4(start.x + g[r][0], start.y + g[r][1], start.z + g[r][2], start.w + g[r][3]);
      }
    }
    named_barrier(barrier, 64);  // both strips' rows are there, before either warp reads them
    add_pairwise_scores(acc, scratch, upper_half ? scratch.k : scratch.q, strip.lane);
  }
}

// The blocks of scores a warp computes.
struct Scores {
  float far[2][4];  // block row 2 + (warp / 2) % 2 against block column warp % 2; of q for warps 0
                    // .. 3, else of k
  float near[4];  // half warp % 2 of block (1, 0) for warps 0 .. 3, else of (3, 2); of q where warp
                  // / 2 is even
  float diagonal[2][4];  // block warp / 2; of q for even warps
};

__device__ __forceinline__ void multiply_far_and_near(Scores& scores, const Config::Shared& s,
                                                      const Strip& strip) {
  const int w = strip.warp, second = (w >> 1) & 1, pair = w >> 2;
  score_block(scores.far, factor_tile(s, 2 + second, w < 4 ? Config::kFarQ : Config::kFarK),
              factor_tile(s, w & 1, Config::kFarK), strip.lane);
  score_half_block(scores.near,
                   factor_tile(s, 2 * pair + 1, second ? Config::kNearK : Config::kNearQ),
                   factor_tile(s, 2 * pair, Config::kNearK), w & 1, strip.lane);
}

// Eight columns of A_qk from accumulators: zero above the diagonal (select: factors may be infinite
// there).
__device__ __forceinline__ void store_A_qk(Config::Matrices& m, const float (&c)[4], int row,
                                           int column, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + (lane >> 2) + 8 * h, j = column + 2 * (lane & 3);
    *reinterpret_cast<uint32_t*>(m.A_qk + swizzle128(i, j >> 3) + 2 * (j & 7)) =
        pack_bf16(i >= j ? c[2 * h] : 0.0f, i >= j + 1 ? c[2 * h + 1] : 0.0f);
  }
}

__device__ __forceinline__ void store_A_kk(Config::Matrices& m, const float* s_beta,
                                           const float (&c)[4], int row, int column, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + (lane >> 2) + 8 * h, j = column + 2 * (lane & 3);
    *reinterpret_cast<float2*>(m.A_kk + matrix_at(i, j)) = make_float2(
        i > j ? s_beta[i] * c[2 * h] : 0.0f, i > j + 1 ? s_beta[i] * c[2 * h + 1] : 0.0f);
  }
}

__device__ __forceinline__ void store_scores(Config::Shared& s, const float* s_beta,
                                             const Scores& scores, const Strip& strip) {
  Config::Matrices& m = s.matrices;
  const int w = strip.warp, second = (w >> 1) & 1, lane = strip.lane;
  auto store = [&](bool of_q, const float (&c)[4], int row, int column) {
    if (of_q) {
      store_A_qk(m, c, row, column, lane);
    } else {
      store_A_kk(m, s_beta, c, row, column, lane);
    }
  };
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    store(w < 4, scores.far[n], 32 + 16 * second, 16 * (w & 1) + 8 * n);
    store((w & 1) == 0, scores.diagonal[n], 16 * (w >> 1), 16 * (w >> 1) + 8 * n);
  }
  store(second == 0, scores.near, 32 * (w >> 2) + 16, 32 * (w >> 2) + 8 * (w & 1));
}

// Above the diagonal blocks nothing is computed, and zeros are read.
__device__ __forceinline__ void clear_upper_blocks(Config::Matrices& m, const Strip& strip) {
  if (strip.warp >= 6) return;
  constexpr int kRow[6] = {0, 0, 0, 1, 1, 2}, kColumn[6] = {1, 2, 3, 2, 3, 3};
  int row = 0, column = 0;
#pragma unroll
  for (int i = 0; i < 6; ++i)
    if (i == strip.warp) row = kRow[i], column = kColumn[i];
  const int i = 16 * row + (strip.lane >> 1), piece = 2 * column + (strip.lane & 1);
  *reinterpret_cast<uint4*>(m.A_qk + swizzle128(i, piece)) = make_uint4(0, 0, 0, 0);
  float4* X = reinterpret_cast<float4*>(m.A_kk_inv + matrix_at(i, 8 * piece));
  X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// A_qk and (I + A_kk)^-1 Diag(beta) to memory, the tokens that exist.
__device__ __forceinline__ void write_matrices(const Config::Shared& s, const float* s_beta,
                                               uint8_t* operands, int length) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  uint8_t* A_qk = operands + kTileAqk * length * kTileRowBytes;
#pragma unroll
  for (int n = 0; n < kChunk * 8 / Config::kThreads; ++n) {
    const int at = threadIdx.x + n * Config::kThreads, row = at >> 3, piece = at & 7;
    if (row >= length) continue;
    const float4* X =
        reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
    const float4* beta = reinterpret_cast<const float4*>(s_beta + 8 * piece);
    const float4 x0 = X[0], x1 = X[1], b0 = beta[0], b1 = beta[1];
    *reinterpret_cast<uint4*>(A_kk_inv + swizzle128(row, piece)) =
        make_uint4(pack_bf16(x0.x * b0.x, x0.y * b0.y), pack_bf16(x0.z * b0.z, x0.w * b0.w),
                   pack_bf16(x1.x * b1.x, x1.y * b1.y), pack_bf16(x1.z * b1.z, x1.w * b1.w));
    *reinterpret_cast<uint4*>(A_qk + 16 * at) =
        *reinterpret_cast<const uint4*>(s.matrices.A_qk + 16 * at);
  }
}

}  // namespace jax_flashkda::chunk_prepare
