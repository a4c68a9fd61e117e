// The two serial parts of the backward. Forwards, the recurrence over chunks once more without its
// output, for what the gradients are made of:
//
//   U = (I + A_kk)^-1 Diag(beta) (V - (k exp(G)) S)
//   S <- Diag(exp(G_C)) S + (k exp(G_C - G))^T U
//
// and backwards, with dS the gradient of the state behind the chunk, then of that ahead of it:
//
//   dU = scale A_qk^T dO + (k exp(G_C - G)) dS
//   dV = Diag(beta) (I + A_kk)^-T dU
//   dS <- Diag(exp(G_C)) dS + scale (q exp(G))^T dO - (k exp(G))^T dV
//
// Neither reads what the other writes, so one launch does both. Grid: persistent CTAs over
// (direction, segment, value head[, half of V]). Roles: see state_scan.cuh; S or dS stays in
// accumulators, transposed [64 V x 128 K], and everything [64 V x 64 tokens] that is multiplied
// becomes a register operand where it is.
//
// Read: the prepared operands, v or d_o [B, T, HV, V], initial_state or d_final_state. Written:
// S or dS at each boundary between two chunks, as bf16 images; U; dv [B, T, HV, V],
// d_initial_state.
//
// chunk_initial_gradient_kernel walks backwards alone and leaves nothing but d_initial_state.
#pragma once

#include "sm90/chunk_state_gradient/config.h"
#include "sm90/chunk_step.cuh"

namespace jax_flashkda::chunk_state_gradient {

using namespace state_scan;

// The carried state, packed, to the workspace. A warp stores and copies its own 16 rows: no other
// warp is waited for.
__device__ __forceinline__ void store_boundary(const uint32_t (&a)[32], BoundaryStage& staged,
                                               uint8_t* images, const ChunkHeader& header,
                                               const Place& at) {
  if (at.lane == 0) bulk_store_wait_read();  // the last image has left
  __syncwarp();                              // .. before any lane writes over it
  const int row = 16 * at.warp + (at.lane & 15), next_piece = at.lane >> 4;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // 8 channels are a 16-byte piece
    const uint32_t pairs[4] = {a[2 * j], a[2 * j + 1], a[2 * j + 2], a[2 * j + 3]};
    store_matrices(shared_address(&staged[j / 8][swizzle128(row, j % 8 + next_piece)]), pairs);
  }
  fence_async_shared();  // this lane's pieces, before the copy engine reads them
  __syncwarp();          // all lanes' pieces, before one of them starts the copies
  if (at.lane == 0) {
    const int first = header.value_column + 64 * at.tile + 16 * at.warp;
    uint8_t* image = images + header.boundary * kBoundaryBytes + first * 128;
    for (int half = 0; half < 2; ++half)
      bulk_store(image + half * (kBoundaryBytes / 2), &staged[half][16 * at.warp * 128], 16 * 128);
    bulk_store_commit();
  }
}

// U as it reaches the state: where beta is zero, U is kept for d_beta alone, on the scale of the
// beta that was taken instead.
__device__ __forceinline__ void drop_tokens_without_beta(uint32_t (&written)[16],
                                                         const uint32_t (&u)[16],
                                                         const float* beta, const Place& at) {
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    const float2 b = load_betas(beta, group, at);
    const uint32_t kept = (fabsf(b.x) <= kSmallestBeta ? 0u : 0x0000ffffu) |
                          (fabsf(b.y) <= kSmallestBeta ? 0u : 0xffff0000u);
    written[2 * group] = u[2 * group] & kept;
    written[2 * group + 1] = u[2 * group + 1] & kept;
  }
}

// S, forwards.
template <class Config>
struct StateWarps {
  const BackwardParams& p;
  const BackwardWorkspace& w;
  BoundaryStage* boundary;
  const Place at;
  State state;

  __device__ void start(const ChunkHeader& header) {
    load_state(state, p.forward.initial_state, header.state, header, at);
  }

  __device__ void chunk(const typename Config::Stage& stage) {
    uint8_t* workspace = static_cast<uint8_t*>(p.forward.workspace);
    const ChunkHeader header = stage.header;
    uint32_t a[32];
    pack_operand(a, state);
    float projected[32];
    begin_projection<Config>(projected, a, stage);
    uint32_t values[4][4];
    stage.wait_for_rows();
    load_rows_transposed(values, stage.rows[at.tile], at);
    if (!header.first) store_boundary(a, *boundary, workspace + w.states, header, at);
    wgmma_wait<0>();
    fence_registers(projected);

    float u[32];
    correct_values<Config>(u, state, values, projected, stage, at);

    uint32_t u_operand[16], written[16];
    pack_operand(u_operand, u);
    drop_tokens_without_beta(written, u_operand, stage.beta, at);
    begin_update<Config>(state, written, stage);
    wgmma_commit();
    store_rows(u_operand, stage.rows[at.tile], workspace + w.corrected_values, p.forward.shape,
               header, at);
    wgmma_wait<0>();
    fence_registers(state);
    stage.release(at.lane);
    stage.release_rows(at.lane);
  }
};

// dS, backwards.
template <class Config>
struct StateGradientWarps {
  const BackwardParams& p;
  const BackwardWorkspace& w;
  BoundaryStage* boundary;  // null unless the config keeps chunks
  const Place at;
  State state;

  __device__ void start(const ChunkHeader& header) {
    load_state(state, p.d_final_state, header.state, header, at);
  }

  __device__ void chunk(const typename Config::Stage& stage) {
    const ChunkHeader header = stage.header;
    const float scale = p.forward.scale;
    uint32_t a[32], d_o[4][4];
    pack_operand(a, state);
    stage.wait_for_rows();
    load_rows_transposed(d_o, stage.rows[at.tile], at);
    float from_state[32], from_output[32];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      product(from_state, a, i, operand<kTileKRestored, Config>(stage), i > 0);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      product_transposed(from_output, d_o[i], 0, operand<kTileAqk, Config>(stage) + 128 * i, i > 0);
    wgmma_commit();
    if constexpr (Config::kKeepsChunks) {
      uint8_t* images = static_cast<uint8_t*>(p.forward.workspace) + w.state_gradients;
      if (!header.first) store_boundary(a, *boundary, images, header, at);
    }
    wgmma_wait<0>();
    fence_registers(from_state);
    fence_registers(from_output);

    // The scale stays in fp32: it multiplies products, not d_o.
    uint32_t du[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      du[i] = pack_bf16(fmaf(scale, from_output[2 * i], from_state[2 * i]),
                        fmaf(scale, from_output[2 * i + 1], from_state[2 * i + 1]));
    float dv[32], read_out[64];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      product_transposed(dv, du, i, operand<kTileAkkInv, Config>(stage), i > 0);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      product_transposed(read_out, d_o[i], 0, operand<kTileQDecayed, Config>(stage, 8192) + 128 * i,
                         i > 0);
    wgmma_commit();
    // A segment without a slot starts from a zero gradient, and nobody wrote its last decay.
    if (!header.first || header.state >= 0) decay_state(state, stage.chunk_decay, at);
    wgmma_wait<1>();
    fence_registers(dv);

    uint32_t dv_operand[16], minus_dv[16];
#pragma unroll
    for (int group = 0; group < 8; ++group) {
      const float2 b = load_betas(stage.beta, group, at);
      dv_operand[2 * group] = pack_bf16(b.x * dv[4 * group], b.y * dv[4 * group + 1]);
      dv_operand[2 * group + 1] = pack_bf16(b.x * dv[4 * group + 2], b.y * dv[4 * group + 3]);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) minus_dv[i] = dv_operand[i] ^ 0x80008000u;
    fence_registers(state);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      product_transposed(state, minus_dv, i, operand<kTileKDecayed, Config>(stage, 8192), true);
    wgmma_commit();
    if constexpr (Config::kKeepsChunks)
      store_rows(dv_operand, stage.rows[at.tile], p.dv, p.forward.shape, header, at);
    wgmma_wait<0>();
    fence_registers(state);
    fence_registers(read_out);
    stage.release(at.lane);
    stage.release_rows(at.lane);
#pragma unroll
    for (int i = 0; i < 64; ++i) state[i] = fmaf(scale, read_out[i], state[i]);
    if (header.last) store_state(state, p.d_initial_state, header.state, header, at);
  }
};

template <class Config, template <class> class Warps>
__device__ __forceinline__ void scan_boundaries(const BackwardParams& p, const BackwardWorkspace& w,
                                                const void* rows, const Share& share) {
  scan<Config>(p.forward, w.forward, rows, share, [&](typename Config::Shared& s, const Place& at) {
    Warps<Config> warps{p, w, &s.boundary[at.tile], at};
    consume_chunks<Config>(s, warps);
    if (at.lane == 0) bulk_store_wait_read();  // shared memory outlives the copies that read it
  });
}

// The first CTAs, of which there are `backward_ctas`, walk backwards, which takes longer.
template <int kValueTiles>
__global__ void __launch_bounds__(128 * (kValueTiles + 1), 1)
    chunk_state_gradient_kernel(const __grid_constant__ BackwardParams p,
                                const __grid_constant__ BackwardWorkspace w,
                                uint32_t backward_ctas) {
  if (blockIdx.x < backward_ctas) {
    const Share share = {blockIdx.x, backward_ctas};
    scan_boundaries<BackwardConfig<kValueTiles>, StateGradientWarps>(p, w, p.d_o, share);
  } else {
    const Share share = {blockIdx.x - backward_ctas, gridDim.x - backward_ctas};
    scan_boundaries<ForwardConfig<kValueTiles>, StateWarps>(p, w, p.forward.v, share);
  }
}

template <int kValueTiles>
__global__ void __launch_bounds__(128 * (kValueTiles + 1), 1)
    chunk_initial_gradient_kernel(const __grid_constant__ BackwardParams p,
                                  const __grid_constant__ BackwardWorkspace w) {
  using Config = InitialConfig<kValueTiles>;
  const Share share = {blockIdx.x, gridDim.x};
  scan<Config>(p.forward, w.forward, p.d_o, share,
               [&](typename Config::Shared& s, const Place& at) {
                 StateGradientWarps<Config> warps{p, w, nullptr, at};
                 consume_chunks<Config>(s, warps);
               });
}

}  // namespace jax_flashkda::chunk_state_gradient
