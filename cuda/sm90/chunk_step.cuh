// The forward step over a chunk, which the state stage, the maps of pieces and the backward's first
// scan share. Transposed, with S in accumulators; R and U become register operands where they are:
//
//   P = (k exp(G)) S
//   U = (I + A_kk)^-1 R     with R = Diag(beta) (V - P); and S <- Diag(exp(G_C)) S beside it
//   S <- S + (k exp(G_C - G))^T U
//
// Products are begun here and waited for by the scan, which may have others of its own under way.
#pragma once

#include "sm90/state_scan.cuh"

namespace jax_flashkda::state_scan {

// P, from S packed: a group of products to be waited for.
template <class Config>
__device__ __forceinline__ void begin_projection(float (&projected)[32], const uint32_t (&a)[32],
                                                 const typename Config::Stage& stage) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i)
    product(projected, a, i, operand<kTileKDecayed, Config>(stage), i > 0);
  wgmma_commit();
}

// U in fp32, and S as it decays over the chunk. Waits for all products.
template <class Config>
__device__ __forceinline__ void correct_values(float (&u)[32], State& state,
                                               const uint32_t (&values)[4][4],
                                               const float (&projected)[32],
                                               const typename Config::Stage& stage,
                                               const Place& at) {
  uint32_t r[16];
  subtract_projection(r, values, projected, stage.beta, at);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) product(u, r, i, operand<kTileAkkInv, Config>(stage), i > 0);
  wgmma_commit();
  decay_state(state, stage.chunk_decay, at);
  wgmma_wait<0>();
  fence_registers(u);
}

// S + (k exp(G_C - G))^T U, from U packed: products of the group that the caller commits.
template <class Config>
__device__ __forceinline__ void begin_update(State& state, const uint32_t (&u)[16],
                                             const typename Config::Stage& stage) {
  fence_registers(state);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    product_transposed(state, u, i, operand<kTileKRestored, Config>(stage, 8192), true);
}

}  // namespace jax_flashkda::state_scan
