// Few long chains, cut into pieces. Over a chunk the state moves by an affine map of its columns,
//
//   S -> (Diag(exp(G_C)) - (k exp(G_C - G))^T A_kk_inv Diag(beta) (k exp(G))) S
//        + (k exp(G_C - G))^T A_kk_inv Diag(beta) V,
//
// so over a piece by S -> M S + B. chunk_state_maps_kernel walks each piece from no state, which
// leaves B, and from the identity without values, which leaves M. state_combine_kernel then goes
// from piece to piece, S_p+1 = M_p S_p + B_p in fp32, and leaves each state in B's place, where
// chunk_state_output finds what its piece starts from.
//
// state_maps stops after the maps, of one piece: the segment that ends each row.
//
// Grids: persistent CTAs over (row, piece, value head); a CTA for each (row, value head) and
// 8 columns of V. Read: the workspace's operands, v, initial_state. Written: the piece maps.
#pragma once

#include "sm90/chunk_state_pieces/config.h"
#include "sm90/chunk_step.cuh"

namespace jax_flashkda::chunk_state_pieces {

using namespace state_scan;

// A warpgroup that carries 64 columns of B and of M.
struct MapWarps {
  const ForwardParams& p;
  const ForwardWorkspace& w;
  const MapPlaces& maps;
  const Place at;
  State offset, factor;

  __device__ void start(const ChunkHeader& header) {
    const int column = header.value_column + 64 * at.tile + 16 * at.warp + (at.lane >> 2);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int channel = 8 * (i / 4) + 2 * (at.lane & 3) + i % 2;
      offset[i] = 0.0f;
      factor[i] = channel == column + 8 * (i / 2 % 2) ? 1.0f : 0.0f;
    }
  }

  // One chunk further, with values or without.
  template <bool kValues>
  __device__ __forceinline__ void advance(State& state, const MapConfig::Stage& stage) {
    uint32_t a[32];
    pack_operand(a, state);
    float projected[32];
    begin_projection<MapConfig>(projected, a, stage);
    uint32_t values[4][4] = {};
    if constexpr (kValues) load_rows_transposed(values, stage.rows[at.tile], at);
    wgmma_wait<0>();
    fence_registers(projected);

    float u[32];
    correct_values<MapConfig>(u, state, values, projected, stage, at);

    uint32_t u_operand[16];
    pack_operand(u_operand, u);
    begin_update<MapConfig>(state, u_operand, stage);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(state);
  }

  __device__ void chunk(const MapConfig::Stage& stage) {
    stage.wait_for_rows();
    advance<true>(offset, stage);
    advance<false>(factor, stage);
    const ChunkHeader header = stage.header;
    stage.release(at.lane);
    stage.release_rows(at.lane);
    if (!header.last) return;
    const int64_t place =
        map_place(p.shape, w.pieces, header.token / p.shape.T, header.piece, header.head) / kMaps;
    store_state(offset, maps.offset, place * maps.stride, header, at);
    store_state(factor, maps.factor, place * maps.stride, header, at);
  }
};

__global__ void __launch_bounds__(MapConfig::kThreads, 1)
    chunk_state_maps_kernel(const __grid_constant__ ForwardParams p,
                            const __grid_constant__ ForwardWorkspace w,
                            const __grid_constant__ MapPlaces maps) {
  let_next_kernel_start();
  wait_for_earlier_kernel();  // all of the workspace
  const Share share = {blockIdx.x, gridDim.x, w.pieces.count - 1, w.pieces.tokens};
  scan<MapConfig>(p, w, p.v, share, [&](MapConfig::Shared& s, const Place& at) {
    MapWarps warps{p, w, maps, at};
    consume_chunks<MapConfig>(s, warps);
  });
}

// M of a piece to shared memory, in the background.
__device__ __forceinline__ void stage_factor(CombineConfig::Shared& s, int turn,
                                             const float* factor) {
  for (int at = threadIdx.x; at < 128 * 32; at += CombineConfig::kThreads)
    async_load_16(&s.factor[turn][at / 32 * CombineConfig::kFactorStride + at % 32 * 4],
                  factor + 4 * at, true);
}

__global__ void __launch_bounds__(CombineConfig::kThreads)
    state_combine_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  let_next_kernel_start();
  wait_for_earlier_kernel();  // the maps
  extern __shared__ uint8_t shared_bytes[];
  CombineConfig::Shared& s = *reinterpret_cast<CombineConfig::Shared*>(shared_bytes);
  constexpr int kSplits = 128 / CombineConfig::kColumns;
  const int64_t item = blockIdx.x / kSplits, row = item / p.shape.HV, head = item % p.shape.HV;
  const int first_column = blockIdx.x % kSplits * CombineConfig::kColumns;
  float* maps = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + w.piece_maps);
  auto map = [&](int64_t piece, Map kind) {
    return maps + (map_place(p.shape, w.pieces, row, piece, head) + kind) * kStateFloats;
  };
  stage_factor(s, 0, map(0, kFactor));
  for (int at = threadIdx.x; at < 128 * CombineConfig::kColumns; at += CombineConfig::kThreads) {
    const int channel = at / CombineConfig::kColumns, column = at % CombineConfig::kColumns;
    s.state[channel][column] =
        p.initial_state == nullptr
            ? 0.0f
            : p.initial_state[item * kStateFloats + channel * 128 + first_column + column];
  }
  // A thread has 2 channels, 64 apart, and 2 columns.
  const int channel = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  auto offset = [&](int64_t piece, int i) {
    return reinterpret_cast<float2*>(map(piece, kOffset) + (channel + 64 * i) * 128 + first_column +
                                     column);
  };
  float2 next[2] = {*offset(0, 0), *offset(0, 1)};
  for (int64_t piece = 0; piece < w.pieces.count - 1; ++piece) {
    const int turn = static_cast<int>(piece & 1);
    wait_for_async_loads();
    __syncthreads();  // M and the state are there; the other M has been read
    float2 sum[2] = {next[0], next[1]};
    if (piece + 2 < w.pieces.count) {
      stage_factor(s, turn ^ 1, map(piece + 1, kFactor));
      next[0] = *offset(piece + 1, 0), next[1] = *offset(piece + 1, 1);
    }
#pragma unroll 8
    for (int j = 0; j < 128; j += 4) {
      float2 x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = *reinterpret_cast<const float2*>(&s.state[j + e][column]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 m = *reinterpret_cast<const float4*>(
            &s.factor[turn][(channel + 64 * i) * CombineConfig::kFactorStride + j]);
        const float row[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[i].x = fmaf(row[e], x[e].x, sum[i].x);
          sum[i].y = fmaf(row[e], x[e].y, sum[i].y);
        }
      }
    }
    __syncthreads();  // the state has been read by all, before it is replaced
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float2*>(&s.state[channel + 64 * i][column]) = sum[i];
      *offset(piece, i) = sum[i];
    }
  }
}

}  // namespace jax_flashkda::chunk_state_pieces
