// Segments of at most 32 tokens in calls that neither bring states nor ask for them: no state ever
// meets such a segment, so with A_kk, A_qk of its tokens alone
//
//   U = (I + A_kk)^-1 Diag(beta) V    O = scale A_qk U
//
// Grid: persistent CTAs, as many as fit; a warp takes a segment and value head, a half warp one of
// one token, and waits for nobody. Kinds of like cost one after the other, the longest first, so
// that all warps end together. Neighbouring warps have neighbouring heads, whose rows are
// neighbours in memory.
//
// Read: q, k [B, T, H, K], g [B, T, HV, K], v [B, T, HV, V], beta [B, T, HV], once, and the segment
// table. Written: o, zeros for short runs of padding too. Rows of other segments are never read.
//
// It is a stage of its own because a short segment costs a chunk's latency in the others: there are
// many and they are small, so here a warp works on each alone, twelve to a multiprocessor.
#pragma once

#include "sm90/short_segments/blocks.cuh"
#include "sm90/short_segments/single_token.cuh"

namespace jax_flashkda::short_segments {

__device__ __forceinline__ void clear_padding(const ForwardParams& p, const ForwardWorkspace& w) {
  const int lane = lane_index();
  Walk walk = start_walk(p, w, kShortPadding, warp_number(), warps());
  for (; walk.run < walk.count; advance(walk, p)) {
    const Item item = item_at(walk, p);
    uint4* rows = static_cast<uint4*>(p.o) + item.value_row * 16 + lane % 16;
#pragma unroll 1
    for (int token = lane / 16; token < item.length; token += 2)
      rows[token * p.shape.HV * 16] = make_uint4(0, 0, 0, 0);
  }
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    short_segments_kernel(const __grid_constant__ ForwardParams p,
                          const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ __align__(16) uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  wait_for_earlier_kernel();  // the tables
  walk_blocks<kGateType, 2>(s, p, w);
  walk_blocks<kGateType, 1>(s, p, w);
  walk_single_tokens<kGateType>(p, w);
  clear_padding(p, w);
}

}  // namespace jax_flashkda::short_segments
