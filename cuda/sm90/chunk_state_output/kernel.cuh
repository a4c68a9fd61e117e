// The recurrence over chunks, and the output:
//
//   R = Diag(beta) (V - (k exp(G)) S)
//   U = (I + A_kk)^-1 R
//   O = scale ((q exp(G)) S + A_qk U)
//   S <- Diag(exp(G_C)) S + (k exp(G_C - G))^T U
//
// Grid: persistent CTAs over (segment or piece of a row, value head[, half of V]); a chain of chunks
// is serial, chains are not. Where the stages overlap (problem/stage_overlap.h), a CTA has a track,
// and its loader waits for each chunk; CTAs that find no place yet start as others end. Roles: see
// state_scan.cuh; S, R and U become register operands where they are.
//
// Read: the workspace, v [B, T, HV, V], initial_state. Written: o [B, T, HV, V], final_state, and
// with kChunkStates chunk_states.
#pragma once

#include "sm90/chunk_state_output/config.h"
#include "sm90/chunk_state_pieces/config.h"
#include "sm90/chunk_step.cuh"

namespace jax_flashkda::chunk_state_output {

using namespace state_scan;

// A warpgroup that carries 64 columns of the state.
template <class Config>
struct StateWarps {
  const ForwardParams& p;
  const ForwardWorkspace& w;
  const Place at;
  State state;

  __device__ void start(const ChunkHeader& header) {
    if (header.piece == 0) {
      load_state(state, p.initial_state, header.state, header, at);
    } else {  // where chunk_state_pieces left what the piece before leads to
      const int64_t row = header.token / p.shape.T;
      load_state(
          state,
          reinterpret_cast<const float*>(static_cast<uint8_t*>(p.workspace) + w.piece_maps),
          chunk_state_pieces::map_place(p.shape, w.pieces, row, header.piece - 1, header.head),
          header, at);
    }
  }

  __device__ void chunk(const typename Config::Stage& stage) {
    uint32_t a[32];
    pack_operand(a, state);

    float projected[32], o[32];
    begin_projection<Config>(projected, a, stage);
#pragma unroll
    for (int i = 0; i < 8; ++i) product(o, a, i, operand<kTileQDecayed, Config>(stage), i > 0);
    wgmma_commit();
    uint32_t values[4][4];
    stage.wait_for_rows();
    load_rows_transposed(values, stage.rows[at.tile], at);
    wgmma_wait<1>();
    fence_registers(projected);

    float u[32];
    correct_values<Config>(u, state, values, projected, stage, at);
    fence_registers(o);

    uint32_t u_operand[16];
    pack_operand(u_operand, u);
    begin_update<Config>(state, u_operand, stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) product(o, u_operand, i, operand<kTileAqk, Config>(stage), true);
    wgmma_commit();
    const ChunkHeader header = stage.header;
    wgmma_wait<0>();
    fence_registers(state);
    fence_registers(o);
    stage.release(at.lane);
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= p.scale;
    uint32_t output[16];
    pack_operand(output, o);
    store_rows(output, stage.rows[at.tile], p.o, p.shape, header, at);
    stage.release_rows(at.lane);
    if constexpr (Config::kChunkStates) {
      const int64_t row = header.token / p.shape.T, start = header.token % p.shape.T;
      if (header.length == kChunk)
        store_state(state, p.chunk_states,
                    (row * (p.shape.T / kChunk) + start / kChunk) * p.shape.HV + header.head,
                    header, at);
    }
    if (header.last && header.piece == w.pieces.count - 1)
      store_state(state, p.final_state, header.state, header, at);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    chunk_state_output_kernel(const __grid_constant__ ForwardParams p,
                              const __grid_constant__ ForwardWorkspace w) {
  const bool overlapped = w.overlap.processors > 0;
  if (!overlapped) wait_for_earlier_kernel();  // all of the workspace
  const Share share = {blockIdx.x, gridDim.x, w.pieces.count, w.pieces.tokens,
                       /*by_turns=*/!overlapped};
  scan<Config>(p, w, p.v, share, [&](typename Config::Shared& s, const Place& at) {
    StateWarps<Config> warps{p, w, at};
    consume_chunks<Config>(s, warps);
  });
  // Whoever waits for this kernel means the one before it too. One CTA is enough, and the last to
  // start: the others make room.
  if (overlapped && blockIdx.x == gridDim.x - 1) wait_for_earlier_kernel();
}

}  // namespace jax_flashkda::chunk_state_output
