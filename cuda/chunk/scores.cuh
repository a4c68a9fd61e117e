// Scores of 16-row blocks: A[i, j] = sum over channels of x_i exp(G_i - G_j) k_j.
// Both factors refer to one decay between those of i and j, or near it.
#pragma once

#include "core/mma.cuh"

namespace jax_flashkda {

inline constexpr int kBlock = 16;        // rows of a block
inline constexpr int kTileBytes = 4096;  // 16 rows of 128 bf16: a factor tile

// 16-byte piece of a row of a factor tile; eight consecutive rows fall into different banks.
__device__ __forceinline__ uint32_t tile_offset(int row, int piece) {
  return row * 256 + ((piece ^ (row & 7)) << 4);
}

// acc[n] += n-th eight columns of tiles x[16 x 128] times y[16 x 128] transposed.
__device__ __forceinline__ void score_block(float (&acc)[2][4], uint32_t x_tile, uint32_t y_tile,
                                            int lane) {
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const uint32_t offset = tile_offset(lane & 15, 2 * step + (lane >> 4));
    uint32_t x[4], y[4];
    load_matrices(x, x_tile + offset);
    load_matrices(y, y_tile + offset);
    mma_bf16(acc[0], x, y[0], y[2]);
    mma_bf16(acc[1], x, y[1], y[3]);
  }
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t x, uint32_t y) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

// The same with every channel of y scaled by a power of two. A lane of a product wants those of
// channels 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of a step of 16, t = lane % 4: powers is
// [8 steps][4 lanes] of them.
__device__ __forceinline__ void score_scaled_block(float (&acc)[2][4], uint32_t x_tile,
                                                   uint32_t y_tile, const uint2* powers, int lane) {
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const uint32_t offset = tile_offset(lane & 15, 2 * step + (lane >> 4));
    const uint2 power = powers[4 * step + (lane & 3)];
    uint32_t x[4], y[4];
    load_matrices(x, x_tile + offset);
    load_matrices(y, y_tile + offset);
    mma_bf16(acc[0], x, multiply_bf16(y[0], power.x), multiply_bf16(y[2], power.y));
    mma_bf16(acc[1], x, multiply_bf16(y[1], power.x), multiply_bf16(y[3], power.y));
  }
}

// The same for eight rows of y alone: columns 8 half .. 8 half + 7.
__device__ __forceinline__ void score_scaled_half_block(float (&acc)[4], uint32_t x_tile,
                                                        uint32_t y_tile, int half,
                                                        const uint2* powers, int lane) {
#pragma unroll
  for (int step = 0; step < 8; step += 2) {
    uint32_t x0[4], x1[4], y[4];
    load_matrices(x0, x_tile + tile_offset(lane & 15, 2 * step + (lane >> 4)));
    load_matrices(x1, x_tile + tile_offset(lane & 15, 2 * step + 2 + (lane >> 4)));
    load_matrices(y, y_tile + tile_offset(8 * half + (lane & 7), 2 * step + (lane >> 3)));
    const uint2 p0 = powers[4 * step + (lane & 3)], p1 = powers[4 * step + 4 + (lane & 3)];
    mma_bf16(acc, x0, multiply_bf16(y[0], p0.x), multiply_bf16(y[1], p0.y));
    mma_bf16(acc, x1, multiply_bf16(y[2], p1.x), multiply_bf16(y[3], p1.y));
  }
}

// Scratch of a diagonal block whose decay spans more than one reference point can carry: 64
// channels of 16 tokens at a time.
struct PairwiseScratch {
  float q[16 * 64];
  float k[16 * 64];
  float log2_decay_cumsum[16 * 64];  // from the block's start
};
__device__ __forceinline__ int pairwise_at(int row, int channel) {
  return row * 64 + (((channel >> 2) ^ row) << 2) + (channel & 3);
}

// Adds those channels: each pair of tokens gets its own exponent, <= 0 where it is kept (i >= j). x
// is q or k of the scratch. A warp; its lanes hold the elements of the block that a matrix product
// would give them.
__device__ __forceinline__ void add_pairwise_scores(float (&acc)[2][4], const PairwiseScratch& s,
                                                    const float* x, int lane) {
  const int row = lane >> 2, column = 2 * (lane & 3);
#pragma unroll 1
  for (int channel = 0; channel < 64; ++channel) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = row + 8 * ((e >> 1) & 1), j = column + 8 * (e >> 2) + (e & 1);
      const int at_i = pairwise_at(i, channel), at_j = pairwise_at(j, channel);
      const float decayed_k =
          s.k[at_j] * exp2_fast(s.log2_decay_cumsum[at_i] - s.log2_decay_cumsum[at_j]);
      if (i >= j) acc[e >> 2][e & 3] = fmaf(x[at_i], decayed_k, acc[e >> 2][e & 3]);
    }
  }
}

}  // namespace jax_flashkda
