// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log
// decay inside the chunk:
//
//   k_decayed = k exp(G)            q_decayed = q exp(G)
//   k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j
//   A_kk_inv = (I + A_kk)^-1 Diag(beta)
//
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same
// rows of memory. A warp owns a strip of 4 tokens.
//
// Read: q, k [B, T, H, K], g [B, T, HV, K], beta [B, T, HV]. Written: the workspace's operand tiles
// and chunk decays, and zeros to o for padding. Rows behind the chunk's end are never read: they
// count as zeros, so nothing of a neighbour can enter.
//
// It is a stage of its own because it is parallel over chunks: nothing of it may sit on the serial
// path of the state.
#pragma once

#include "sm90/chunk_prepare/scores.cuh"

namespace jax_flashkda::chunk_prepare {

// The inverse of I + A_kk, over the matrix's own blocks.
__device__ __forceinline__ void invert(Config::Matrices& m) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  __syncthreads();  // A_kk complete, before the substitution reads it
  if (warp < Config::kBlocks && lane < kBlock)
    invert_diagonal_block(m.A_kk, m.A_kk_inv, warp, lane);
  __syncthreads();  // diagonal blocks of the inverse, before the merges
  merge_blocks(m.A_kk, m.A_kk_inv, warp, lane);
  __syncthreads();  // the whole inverse, before it is written out
}

__device__ __forceinline__ uint8_t* operands_of(const ForwardParams& p, const ForwardWorkspace& w,
                                                const Item& item) {
  return static_cast<uint8_t*>(p.workspace) + w.operands + item.operand_row * kOperandBytes;
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kWalker = 7;  // the warp that looks for the next item
  if (warp == kWalker) {
    if (lane == 0) start_walk(s.walk, p, w);
    __syncwarp();  // the walk's start, before the other lanes read it
    const Item first = next_item(s.walk, p, w, lane);
    if (lane == 0) s.items[0] = first;
  }
  __syncthreads();  // the first item is there
  Scalars scalars;
  auto prefetch = [&](const Item& item) {
    if (item.length == 0) return;
    stage_inputs<kGateType>(s, p, item);
    scalars = load_scalars(p, item);
  };
  prefetch(s.items[0]);
  publish_gate(s, scalars, p);
  if (threadIdx.x < kChunk) s.q_norm[threadIdx.x] = s.k_norm[threadIdx.x] = 1.0f;
  for (int turn = 0; s.items[turn].length > 0; turn ^= 1) {
    const Item& item = s.items[turn];
    if (threadIdx.x < Config::kBlocks) s.references.too_far[threadIdx.x] = false;
    wait_for_async_loads();
    __syncthreads();  // inputs and scalars are there, and the last item has been written out
    publish_beta(s, scalars, p, item.length);
    const Strip strip(item.length);
    DecayRows g;
    cumulate_decay<kGateType>(g, s, p, item, strip);
    const float (&strip_decay)[Config::kChannels] = g[Config::kStrip - 1];
    *reinterpret_cast<float4*>(&s.references.strip_offset[warp][strip.channel]) =
        make_float4(strip_decay[0], strip_decay[1], strip_decay[2], strip_decay[3]);
    __syncthreads();  // all strips' decays, before they are summed
    if (warp < 4) {
      const float decay = find_references(s.references, threadIdx.x);
      if (item.decay_row >= 0)
        reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) +
                                 w.chunk_decay)[item.decay_row * Config::kHeadDim + threadIdx.x] =
            exp2_fast(decay);
    } else if (warp == kWalker) {
      const Item next = next_item(s.walk, p, w, lane);
      if (lane == 0) s.items[turn ^ 1] = next;
    } else if (warp >= 8 && p.qk_l2norm) {
      const int block = warp % 4;
      if (warp < 12) {
        find_norms(s.q_norm + kBlock * block, shared_address(s.q[block]), lane);
      } else {
        find_norms(s.k_norm + kBlock * block, shared_address(s.k[block]), lane);
      }
    }
    __syncthreads();  // points of reference and norms, before the factors

    write_factors(s, operands_of(p, w, item), item.length, g, strip);
    __syncthreads();  // all factors, before their readers
    Scores scores = multiply_factors(s, strip);
    const int32_t* too_far = s.references.too_far;
    if (too_far[0] || too_far[1] || too_far[2] || too_far[3])
      pairwise_diagonal<kGateType>(scores.block, s, p, item);
    __syncthreads();  // factors and inputs have been read: the matrices and the next item's inputs
                      // take their place
    prefetch(s.items[turn ^ 1]);
    clear_upper_blocks(s.matrices, strip);
    store_scores(s, scores, strip);
    invert(s.matrices);
    write_matrices(s, operands_of(p, w, item), item.length);
    publish_gate(s, scalars, p);
  }
}

}  // namespace jax_flashkda::chunk_prepare
