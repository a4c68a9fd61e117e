// Products over the columns of V, on a warpgroup's tensor cores with both operands in shared
// memory.
#pragma once

#include "core/mma.cuh"
#include "sm90/chunk_gradient/config.h"
#include "sm90/wgmma.cuh"

namespace jax_flashkda::chunk_gradient {

// A thread's elements of a product, eight columns at a time. Of a transposed tile with the warp's
// 16 channels as rows and the 64 tokens as columns, [n][2 h + e] is channel lane / 4 + 8 h of
// token 8 n + 2 (lane % 4) + e. Two rows of it, rounded, are the left operand of a product over the
// 16 tokens of a block.
using Elements = float[Config::kGroups][4];

struct Place {
  int warp, lane;

  __device__ int channel() const { return 16 * warp + (lane >> 2); }  // of h = 0
  __device__ int token() const { return 2 * (lane & 3); }             // of n = 0, e = 0
};

// One warpgroup: c[64x64] {+}= a[64x16] b[16x64]. Rows of b's 64 columns run along the 16; those of
// a too, or if kTransposed a has 16 rows with its 64 rows along them.
template <bool kTransposed, bool kAccumulate>
__device__ __forceinline__ void wgmma_64x64_shared(Elements& c, uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, accumulate, 1, 1, %35, 0;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b), "n"(kAccumulate ? 1 : 0), "n"(kTransposed ? 1 : 0));
}

// c[64x64] = a b^T over the 128 columns of V. Tokens lie in two tiles of 64 columns, 32 bytes a
// step of 16; a transposed left operand has 2048 bytes a step. Addresses count in 16 bytes.
template <bool kTransposed>
__device__ __forceinline__ void product_over_values(Elements& c, uint64_t a, uint64_t b) {
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    const uint64_t along = (step / 4) * (Config::kHalfTile / 16) + (step % 4) * 2;
    const uint64_t from = a + (kTransposed ? step * 128 : along);
    if (step == 0) {
      wgmma_64x64_shared<kTransposed, false>(c, from, b + along);
    } else {
      wgmma_64x64_shared<kTransposed, true>(c, from, b + along);
    }
  }
}

__device__ __forceinline__ uint64_t operand(const void* tile) {
  return swizzled_operand(shared_address(tile), 0);
}

// What the compiler must not move across a wait.
__device__ __forceinline__ void fence_elements(Elements& c) {
#pragma unroll
  for (int n = 0; n < Config::kGroups; ++n) fence_registers(c[n]);
}

// <S, dS'> of the thread's two channels: the diagonal of S dS'^T, 16 by 16 channels of the warp.
template <class Shared>
__device__ __forceinline__ void multiply_boundaries(float (&sums)[2], const Shared& s,
                                                    const Place& at) {
  float c[2][4] = {};
  const uint32_t from =
      (at.warp / 4) * (static_cast<uint32_t>(kBoundaryBytes) / 2) +
      swizzle128(8 * (at.lane >> 4) + (at.lane & 7), 2 * (at.warp % 4) + ((at.lane >> 3) & 1));
  const uint32_t state = shared_address(s.state) + from,
                 state_gradient = shared_address(s.state_gradient) + from;
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    uint32_t a[4], b[4];
    load_matrices_transposed(a, state + step * 2048);
    load_matrices_transposed(b, state_gradient + step * 2048);
    mma_bf16(c[0], a, b[0], b[2]);
    mma_bf16(c[1], a, b[1], b[3]);
  }
  // Row r = lane / 4 of the upper left and of the lower right quarter: its column r is with lane
  // r / 2 of the row's four.
  const int row = at.lane >> 2, holder = (at.lane & ~3) | (row >> 1);
  sums[0] = __shfl_sync(0xffffffffu, row & 1 ? c[0][1] : c[0][0], holder);
  sums[1] = __shfl_sync(0xffffffffu, row & 1 ? c[1][3] : c[1][2], holder);
}

// The gradient of the scores to shared memory, rounded, strictly lower. The first warpgroup holds
// dO U^T, the second dR U^T, tokens i along rows; their diagonals are kept in fp32:
//   dA_qk = scale tril(dO U^T)      dL = -strict_tril(dR U^T)
template <class Shared>
__device__ __forceinline__ void store_score_gradients(Shared& s, const Elements& c, float scale,
                                                      const Place& at) {
  const bool of_q = at.warp < 4;
  const float factor = of_q ? scale : -1.0f;
  uint8_t* to = of_q ? s.d_A_qk : s.d_L;
  float* diagonal = of_q ? s.d_A_qk_diagonal : s.d_r_times_u;
  const float diagonal_factor = of_q ? scale : 1.0f;
#pragma unroll
  for (int n = 0; n < Config::kGroups; ++n) {
    if (n > 2 * (at.warp % 4) + 1) break;  // blocks above the diagonal are never read
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * (at.warp % 4) + (at.lane >> 2) + 8 * h, j = 8 * n + at.token();
      const float x0 = c[n][2 * h], x1 = c[n][2 * h + 1];
      *reinterpret_cast<uint32_t*>(to + swizzle128(i, n) + 2 * at.token()) =
          pack_bf16(i > j ? factor * x0 : 0.0f, i > j + 1 ? factor * x1 : 0.0f);
      if (i == j) diagonal[i] = diagonal_factor * x0;
      if (i == j + 1) diagonal[i] = diagonal_factor * x1;
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
