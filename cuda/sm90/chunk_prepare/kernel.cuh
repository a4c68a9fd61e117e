// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log
// decay inside the chunk:
//
//   k_decayed = k exp(G)            q_decayed = q exp(G)
//   k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j
//   A_kk_inv = (I + A_kk)^-1 Diag(beta)
//
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same
// rows of memory. A warp owns a strip of 8 tokens: decays are summed from the strip's start, and
// the decay between any two points of reference is a product of per-channel constants, so a token
// costs two exponentials whatever the number of its factors.
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

// The first half: inputs to factors to scores, decayed operands to memory. The matrices are in
// shared memory behind it.
template <DType kGateType>
__device__ __forceinline__ void find_scores(Config::Shared& s, const Inputs<kGateType>& in,
                                            const ForwardParams& p, const ForwardWorkspace& w,
                                            const Chunk& chunk, int64_t head, int turn,
                                            uint8_t* operands) {
  const Strip strip = strip_of(p.shape, chunk);
  DecayRows g;
  cumulate_decay(g, in, s.scalars[turn], p, strip);
  publish_decay(s, g, strip);
  const float norms = find_norms(in.q, in.k, p.qk_l2norm, strip.lane);
  __syncthreads();  // all strips' decays, before every warp reads them

  write_factors(s, operands, chunk.length, in.q, in.k, norms, g, find_strip_decays(s, g, strip),
                strip);
  if (chunk.decay_slot >= 0) {
    const int64_t slot =
        (int64_t{chunk.row} * p.shape.HV + head) * w.decay_slots + chunk.decay_slot;
    write_chunk_decay(s,
                      reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + w.chunk_decay) +
                          slot * Config::kHeadDim);
  }
  __syncthreads();  // all factors, before their readers
  Scores scores = {};
  multiply_far_and_near(scores, s, strip);
  const int block = strip.warp >> 1;
  if (s.spans_too_far[2 * block] || s.spans_too_far[2 * block + 1]) {
    pairwise_diagonal(scores.diagonal, s, in.q, in.k, norms, g, strip);
  } else {
    score_block(scores.diagonal,
                factor_tile(s, block, strip.warp & 1 ? Config::kDiagonalK : Config::kDiagonalQ),
                factor_tile(s, block, Config::kDiagonalC), strip.lane);
  }
  __syncthreads();  // the factors have been read: their memory becomes the matrices
  clear_upper_blocks(s.matrices, strip);
  store_scores(s, s.scalars[turn].beta, scores, strip);
}

// The second half: the inverse, and both matrices to memory.
__device__ __forceinline__ void invert(Config::Shared& s, int length, int turn, uint8_t* operands) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // A_kk complete, before the substitution reads it
  if (threadIdx.x < kChunk)
    invert_diagonal_block(s.matrices.A_kk, s.matrices.A_kk_inv, threadIdx.x / 16, threadIdx.x % 16);
  __syncthreads();  // diagonal blocks of the inverse, before the merges
  merge_blocks(s.matrices.A_kk, s.matrices.A_kk_inv, warp, lane);
  __syncthreads();  // the whole inverse, before it is written out
  write_matrices(s, s.scalars[turn].beta, operands, length);
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  Items items(p, w);
  Chunk chunk = items.next_segment_chunk();
  Inputs<kGateType> in;
  load_inputs(in, p, chunk, items.head);
  publish_scalar(s.scalars[0], in.scalar, p, chunk.length);
  for (int turn = 0; items.left(); turn ^= 1) {
    __syncthreads();  // the chunk's scalars are there, and the last chunk's matrices have been read
    const int64_t head = items.head,
                  operand_row = (int64_t{chunk.row} * p.shape.HV + head) * p.shape.T + chunk.start;
    const int length = chunk.length;
    uint8_t* operands =
        static_cast<uint8_t*>(p.workspace) + w.operands + operand_row * kOperandBytes;
    find_scores(s, in, p, w, chunk, head, turn, operands);
    items.advance();
    chunk = items.next_segment_chunk();
    load_inputs(
        in, p, chunk,
        items.head);  // on their way while the matrices are inverted; of no chunk nothing is read
    invert(s, length, turn, operands);
    publish_scalar(s.scalars[turn ^ 1], in.scalar, p, chunk.length);
  }
}

}  // namespace jax_flashkda::chunk_prepare
