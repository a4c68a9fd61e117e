// Scores of 16-row blocks: A[i, j] = sum over channels of x_i exp(G_i - G_j) k_j.
// Off the diagonal both factors refer to the decay at one token between i and j, so every exponent is <= 0.
#pragma once

#include "sm90/mma.cuh"

namespace jax_flashkda {

inline constexpr int kBlock = 16;         // rows of a block
inline constexpr int kTileBytes = 4096;   // 16 rows of 128 bf16: a factor tile

// 16-byte piece of a row of a factor tile; eight consecutive rows fall into different banks.
__device__ __forceinline__ uint32_t tile_offset(int row, int piece) { return row * 256 + ((piece ^ (row & 7)) << 4); }

// acc[x][y] += tiles x[16 x 128] times tiles y[16 x 128] transposed. acc[x][y][n] is the n-th half (8 columns) of the block.
template <int X, int Y>
__device__ __forceinline__ void score_blocks(float (&acc)[X][Y][2][4], const uint32_t (&x_tiles)[X], const uint32_t (&y_tiles)[Y],
                                             int lane) {
  const int row = lane & 15;
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const uint32_t offset = tile_offset(row, 2 * step + (lane >> 4));
    uint32_t x[X][4], y[Y][4];
#pragma unroll
    for (int i = 0; i < X; ++i) load_matrices(x[i], x_tiles[i] + offset);
#pragma unroll
    for (int j = 0; j < Y; ++j) load_matrices(y[j], y_tiles[j] + offset);
#pragma unroll
    for (int i = 0; i < X; ++i)
#pragma unroll
      for (int j = 0; j < Y; ++j) {
        mma_bf16(acc[i][j][0], x[i], y[j][0], y[j][2]);
        mma_bf16(acc[i][j][1], x[i], y[j][1], y[j][3]);
      }
  }
}

// A diagonal block whose decay spans more than one reference point can carry: each pair of tokens gets its own exponent,
// always <= 0 where it is kept (i >= j). A warp; lane owns channels 4 lane .. 4 lane + 3 of all 16 rows, and gets back the
// same elements of the block that a matrix product would give it. scratch: 12 KB of the warp's own.
__device__ __forceinline__ void pairwise_scores(float (&acc_q)[2][4], float (&acc_k)[2][4], const uint2 (&q)[16],
                                                const uint2 (&k)[16], const float* q_norms, const float* k_norms,
                                                const float (&log2_decay_cumsum)[16][4], float* scratch, int lane) {
  float* s_q = scratch;
  float* s_k = scratch + 16 * 64;
  float* s_decay = scratch + 2 * 16 * 64;
  auto at = [](int row, int channel) { return row * 64 + (((channel >> 2) ^ row) << 2) + (channel & 3); };
  const int row = lane >> 2, column = 2 * (lane & 3);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    __syncwarp();
    if ((lane >> 4) == half) {
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        const int to = at(r, 4 * (lane & 15));
        const float a = q_norms[r], b = k_norms[r];
        *reinterpret_cast<float4*>(s_q + to) =
            make_float4(a * bf16_low(q[r].x), a * bf16_high(q[r].x), a * bf16_low(q[r].y), a * bf16_high(q[r].y));
        *reinterpret_cast<float4*>(s_k + to) =
            make_float4(b * bf16_low(k[r].x), b * bf16_high(k[r].x), b * bf16_low(k[r].y), b * bf16_high(k[r].y));
        *reinterpret_cast<float4*>(s_decay + to) = make_float4(log2_decay_cumsum[r][0], log2_decay_cumsum[r][1],
                                                              log2_decay_cumsum[r][2], log2_decay_cumsum[r][3]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int channel = 0; channel < 64; ++channel) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int i = row + 8 * ((e >> 1) & 1), j = column + 8 * (e >> 2) + (e & 1);
        const float decayed_k = s_k[at(j, channel)] * exp2_fast(s_decay[at(i, channel)] - s_decay[at(j, channel)]);
        if (i >= j) {
          acc_q[e >> 2][e & 3] = fmaf(s_q[at(i, channel)], decayed_k, acc_q[e >> 2][e & 3]);
          acc_k[e >> 2][e & 3] = fmaf(s_k[at(i, channel)], decayed_k, acc_k[e >> 2][e & 3]);
        }
      }
    }
  }
  __syncwarp();
}

}  // namespace jax_flashkda
