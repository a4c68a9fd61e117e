// (I + A_kk)^-1 of a 64-token chunk, in fp32: forward substitution on the 16x16 diagonal blocks,
// then blocks are merged,
//   [L11 0; L21 L22]^-1 = [X11 0; -X22 L21 X11, X22],
// 16 -> 32 -> 64. A series in powers of A_kk would blow up for correlated keys; this stays at
// rounding level.
#pragma once

#include "core/mma.cuh"

namespace jax_flashkda {

inline constexpr int kBlock = 16;  // rows of a diagonal block
inline constexpr int kMatrixStride =
    68;  // floats between rows of a 64x64 matrix: 16-byte aligned, rows in different banks

// Column `column` of the inverse of I + A, A a strictly lower block of a matrix with rows kStride
// floats apart.
template <int kStride>
__device__ __forceinline__ void solve_column(float (&x)[kBlock], const float* A, int column) {
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j4 = 0; j4 < i; j4 += 4) {
      const float4 a = *reinterpret_cast<const float4*>(A + i * kStride + j4);
      sum = fmaf(-a.x, x[j4], sum);
      if (j4 + 1 < i) sum = fmaf(-a.y, x[j4 + 1], sum);
      if (j4 + 2 < i) sum = fmaf(-a.z, x[j4 + 2], sum);
      if (j4 + 3 < i) sum = fmaf(-a.w, x[j4 + 3], sum);
    }
    x[i] = sum;
  }
}

// The same of diagonal block `block`.
__device__ __forceinline__ void invert_diagonal_block(const float* s_A, float* s_X, int block,
                                                      int column) {
  float x[kBlock];
  solve_column<kMatrixStride>(x, s_A + block * kBlock * (kMatrixStride + 1), column);
  float* X = s_X + block * kBlock * (kMatrixStride + 1) + column;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) X[i * kMatrixStride] = x[i];
}

// c[16 x 8] = a[16 x 8 Steps] b[8 Steps x 8], row-major fp32 in shared memory, as three tf32
// products a step, each with a sum of its own: a product waits for the one before it in its sum.
template <int Steps, int kStride = kMatrixStride>
__device__ __forceinline__ void product(float (&c)[4], const float* a, const float* b, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float low_high[4] = {}, high_low[4] = {}, high[4] = {};
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      split_tf32(a[(g + 8 * (i & 1)) * kStride + 8 * step + t + 4 * (i >> 1)], a_high[i], a_low[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      split_tf32(b[(8 * step + t + 4 * i) * kStride + g], b_high[i], b_low[i]);
    mma_tf32(low_high, a_low, b_high);
    mma_tf32(high_low, a_high, b_low);
    mma_tf32(high, a_high, b_high);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = (low_high[i] + high_low[i]) + high[i];
}

template <int kStride = kMatrixStride>
__device__ __forceinline__ void store_block(float* s, const float (&c)[4], float sign, int lane) {
  float* at = s + (lane >> 2) * kStride + 2 * (lane & 3);
  *reinterpret_cast<float2*>(at) = make_float2(sign * c[0], sign * c[1]);
  *reinterpret_cast<float2*>(at + 8 * kStride) = make_float2(sign * c[2], sign * c[3]);
}

__device__ __forceinline__ int matrix_at(int row, int column) {
  return row * kMatrixStride + column;
}

// The 16x16 blocks beside the diagonal of the inverse, blocks (1, 0) and (3, 2). Four warps; the
// diagonal blocks are there and what lies above them is zero. A block's own place holds the
// intermediate L21 X11.
__device__ __forceinline__ void merge_to_32(const float* s_A, float* s_X, int warp, int lane) {
  const int at = 32 * (warp >> 1), n = 8 * (warp & 1);
  float c[4], d[4];
  product<2>(c, s_A + matrix_at(at + 16, at), s_X + matrix_at(at, at + n), lane);
  store_block(s_X + matrix_at(at + 16, at + n), c, 1.0f, lane);
  __syncwarp();  // the intermediate's columns, before the warp that wrote them reads them
  product<2>(d, s_X + matrix_at(at + 16, at + 16), s_X + matrix_at(at + 16, at + n), lane);
  __syncwarp();  // .. and after
  store_block(s_X + matrix_at(at + 16, at + n), d, -1.0f, lane);
}

// Of the lower left 32x32 block of the inverse, a 16x8 tile a warp of eight: rows 16 (warp / 4),
// columns 8 (warp % 4), elements as in an accumulator; negated. The block's own place holds the
// intermediate. `barrier` is the eight warps'.
__device__ __forceinline__ void merge_to_64(float (&tile)[4], const float* s_A, float* s_X,
                                            int warp, int lane, uint32_t barrier) {
  const int m = 16 * (warp >> 2), n = 8 * (warp & 3);
  float c[4];
  product<4>(c, s_A + matrix_at(32 + m, 0), s_X + matrix_at(0, n), lane);
  store_block(s_X + matrix_at(32 + m, n), c, 1.0f, lane);
  named_barrier(barrier, 8 * 32);  // both row halves of L21 X11 are there
  product<4>(tile, s_X + matrix_at(32 + m, 32), s_X + matrix_at(32, n), lane);
}

}  // namespace jax_flashkda
