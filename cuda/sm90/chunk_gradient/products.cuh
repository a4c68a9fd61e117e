// Products over the columns of V, on a warpgroup's tensor cores with both operands in shared
// memory.
#pragma once

#include "core/mma.cuh"
#include "sm90/chunk_gradient/config.h"
#include "sm90/wgmma.cuh"

namespace jax_flashkda::chunk_gradient {

// A thread's elements of a product, eight columns at a time. Of a transposed tile with the warp's
// 16 channels as rows and its 32 tokens as columns, [n][2 h + e] is channel lane / 4 + 8 h of token
// 8 n + 2 (lane % 4) + e. Two groups of it, rounded, are the left operand of a product over the 16
// tokens of a block.
using Elements = float[Config::kGroups][4];

// 16-byte piece of a token's row in a tile of raw inputs; eight consecutive rows fall into different
// banks.
__device__ __forceinline__ uint32_t tile_offset(int row, int piece) {
  return row * Config::kRowBytes + ((piece ^ (row & 7)) << 4);
}

// The thread's number, read anew: what follows from it is cheaper found again than kept in
// registers through the chunk.
__device__ __forceinline__ int reread_thread() { return static_cast<int>(thread_index()); }

// The thread's warpgroup, found anew likewise. The shuffle tells the compiler that warps do not
// diverge on it.
__device__ __forceinline__ int find_warpgroup() {
  return __shfl_sync(0xffffffffu, reread_thread() / 128, 0);
}

// A thread's place, and what of it addresses know.
struct Place {
  int warp, lane;
  uint32_t keys;                     // of the lane's row in its warp's piece of q
  uint32_t over_columns, over_rows;  // in block (0, 0) of d_A_qk, for products over j, over i

  template <class Shared>
  __device__ explicit Place(const Shared& s)
      : warp(reread_thread() / 32), lane(reread_thread() % 32) {
    keys = shared_address(s.q) + tile_offset(32 * half() + 8 * (lane >> 4) + (lane & 7),
                                             2 * channel_warp() + ((lane >> 3) & 1));
    over_columns =
        shared_address(s.d_A_qk) + swizzle128((lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1);
    over_rows = shared_address(s.d_A_qk) + swizzle128(lane & 15, lane >> 4);
  }
  __device__ int channel_warp() const { return warp % Config::kChannelWarps; }
  __device__ int half() const { return warp / Config::kChannelWarps; }          // of the tokens
  __device__ int channel() const { return 16 * channel_warp() + (lane >> 2); }  // of h = 0
  __device__ int token() const { return 32 * half() + 2 * (lane & 3); }         // of n = 0, e = 0
};

// One warpgroup: c[64x32] {+}= a[64x16] b[16x32]. Rows of b's 32 columns run along the 16; those of
// a too, or if kTransposed a has 16 rows with its 64 rows along them.
template <bool kTransposed, bool kAccumulate>
__device__ __forceinline__ void wgmma_64x32_shared(Elements& c, uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, accumulate, 1, 1, %19, 0;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
      : "l"(a), "l"(b), "n"(kAccumulate ? 1 : 0), "n"(kTransposed ? 1 : 0));
}

// c[64x32] = a b^T over the 128 columns of V. Tokens lie in two tiles of 64 columns, 32 bytes a
// step of 16; a transposed left operand has 2048 bytes a step. Addresses count in 16 bytes.
template <bool kTransposed>
__device__ __forceinline__ void product_over_values(Elements& c, uint64_t a, uint64_t b) {
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    const uint64_t along = (step / 4) * (Config::kHalfTile / 16) + (step % 4) * 2;
    const uint64_t from = a + (kTransposed ? step * 128 : along);
    if (step == 0) {
      wgmma_64x32_shared<kTransposed, false>(c, from, b + along);
    } else {
      wgmma_64x32_shared<kTransposed, true>(c, from, b + along);
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

// Hands half of the remaining values to the lane that differs in the mask and takes its share of
// the others.
template <int kMask, int kHalf, int kCount>
__device__ __forceinline__ void fold_values(float (&values)[kCount], int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = values[i + kHalf];
    values[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kMask);
  }
}

// <S, dS'> of the warp's channels over half the columns of V: the diagonal of S dS'^T, 16 by 16
// channels.
template <class Shared>
__device__ __forceinline__ void multiply_boundaries(Shared& s, const Place& at) {
  float c[2][4] = {};
  const int warp = at.channel_warp();
  const uint32_t from = (warp / 4) * (static_cast<uint32_t>(kBoundaryBytes) / 2) +
                        swizzle128(64 * at.half() + 8 * (at.lane >> 4) + (at.lane & 7),
                                   2 * (warp % 4) + ((at.lane >> 3) & 1));
  const uint32_t state = shared_address(s.values.state) + from,
                 state_gradient = shared_address(s.values.state_gradient) + from;
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 32; ++step) {
    uint32_t a[4], b[4];
    load_matrices_transposed(a, state + step * 2048);
    load_matrices_transposed(b, state_gradient + step * 2048);
    mma_bf16(c[0], a, b[0], b[2]);
    mma_bf16(c[1], a, b[1], b[3]);
  }
  // Row r = lane / 4 of the upper left and of the lower right quarter: its column r is with lane
  // r / 2 of the row's four.
  const int row = at.lane >> 2;
  if ((at.lane & 3) == (row >> 1)) {
    float (&to)[Config::kHeadDim] = s.exchange.boundary_product[at.half()];
    to[at.channel()] = row & 1 ? c[0][1] : c[0][0];
    to[at.channel() + 8] = row & 1 ? c[1][3] : c[1][2];
  }
}

// Eight channels of a column of V of a boundary image.
__device__ __forceinline__ void unpack_boundary(float (&x)[8], const uint8_t* image, int v,
                                                int piece) {
  const uint4 packed = *reinterpret_cast<const uint4*>(
      image + (piece / 8) * (kBoundaryBytes / 2) + swizzle128(v, piece % 8));
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i % 2 ? bf16_high(pairs[i / 2]) : bf16_low(pairs[i / 2]);
}
__device__ __forceinline__ void load_state_piece(float (&x)[8], const float* state, int v,
                                                 int piece) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __ldg(state + (8 * piece + i) * Config::kHeadDim + v);
}

// The caller's states [K, V] at a chunk's ends; null: none, or the segment goes on there.
struct CallerStates {
  const float *initial, *d_final;
};

// <S, dS'> once more, with what the caller gave unrounded: it enters the gate gradient of all the
// chunk's tokens alike, and in short segments it is most of it.
template <class Shared>
__device__ __forceinline__ void multiply_caller_states(Shared& s, const CallerStates& states) {
  const int thread = reread_thread(), lane = thread % 32, part = thread / 32 % 2;
#pragma unroll 1
  for (int piece = thread / 64; piece < Config::kHeadDim / 8; piece += Config::kThreads / 64) {
    float sums[8] = {};
#pragma unroll 1
    for (int v = 32 * part + lane; v < Config::kHeadDim; v += 64) {
      float state[8], gradient[8];
      if (states.initial != nullptr) {
        load_state_piece(state, states.initial, v, piece);
      } else {
        unpack_boundary(state, s.values.state, v, piece);
      }
      if (states.d_final != nullptr) {
        load_state_piece(gradient, states.d_final, v, piece);
      } else {
        unpack_boundary(gradient, s.values.state_gradient, v, piece);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = fmaf(state[i], gradient[i], sums[i]);
    }
    fold_values<16, 4>(sums, lane);
    fold_values<8, 2>(sums, lane);
    fold_values<4, 1>(sums, lane);
    float sum = sums[0] + __shfl_xor_sync(0xffffffffu, sums[0], 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (lane % 4 == 0) s.exchange.caller_product[part][8 * piece + lane / 4] = sum;
  }
}

// The gradient of the scores to shared memory, rounded, strictly lower. A warpgroup holds 32
// columns j of dO U^T, or of dR U^T; their diagonals are kept in fp32:
//   dA_qk = scale tril(dO U^T)      dL = -strict_tril(dR U^T)
template <class Shared>
__device__ __forceinline__ void store_score_gradients(Shared& s, const Elements& c, float scale,
                                                      bool of_q, const Place& at) {
  const float factor = of_q ? scale : -1.0f;
  uint8_t* to = of_q ? s.d_A_qk : s.d_L;
  float* diagonal = of_q ? s.d_A_qk_diagonal : s.d_r_times_u;
  const float diagonal_factor = of_q ? scale : 1.0f;
  const int block = at.warp % 4;  // of rows
#pragma unroll
  for (int n = 0; n < Config::kGroups; ++n) {
    const int group = Config::kGroups * at.half() + n;
    if (group > 2 * block + 1) break;  // blocks above the diagonal are never read
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * block + (at.lane >> 2) + 8 * h, j = 8 * n + at.token();
      const float x0 = c[n][2 * h], x1 = c[n][2 * h + 1];
      *reinterpret_cast<uint32_t*>(to + swizzle128(i, group) + 4 * (at.lane & 3)) =
          pack_bf16(i > j ? factor * x0 : 0.0f, i > j + 1 ? factor * x1 : 0.0f);
      if (i == j) diagonal[i] = diagonal_factor * x0;
      if (i == j + 1) diagonal[i] = diagonal_factor * x1;
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
