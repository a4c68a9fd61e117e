// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log
// decay inside the chunk:
//
//   k_decayed = k exp(G)            q_decayed = q exp(G)
//   k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j
//   A_kk_inv = (I + A_kk)^-1
//
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same
// rows of memory. A warp owns 16 tokens of 64 channels: its factors are the registers that its
// products take, its decayed operands take the place of its inputs, and the copy engine brings both
// to memory. Shared memory carries what warps have to tell each other: the decays of blocks, the
// column factors of earlier blocks, and halves of the scores.
//
// Where the stages overlap, chunk_state_output runs beside this kernel and waits for chunks; this
// kernel waits for nobody. The state stage can start only when every CTA of this one runs or has
// ended, and each share of the chunks belongs to one of them: whatever anybody waits for is being
// prepared by a CTA that nothing holds up, wherever CTAs come to run, whatever else the device
// does, and also where the two kernels are run one after the other. Nothing hangs, and the results
// are those of the serial order, since a chunk is read only once its flag is there.
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

enum Barrier : uint32_t { kMergeBarrier = 1, kInverseBarrier };  // 0: all threads

// The inverse of I + A_kk to its image. While four warps find its larger diagonal blocks, the others
// bring the next inputs.
template <DType kGateType>
__device__ __forceinline__ void invert(Config::Shared& s, const ForwardParams& p) {
  Config::Matrices& m = s.matrices;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  if (thread == Config::kWriter) {
    bulk_store_wait_read();
    s.written = s.item;
    s.item = s.next_item;
  }
  __syncthreads();  // A_kk complete, and the halves of the scores read, before the substitution; the
                    // decayed operands have left, so the next inputs take their place
  if (thread < Config::kFirstStaging) {
    if (lane < kBlock) invert_diagonal_block(m.A_kk, m.A_kk_inv, warp, lane);
    named_barrier(kInverseBarrier, 128);  // diagonal blocks of the inverse, before the merges
    merge_to_32(m.A_kk, m.A_kk_inv, warp, lane);
  } else {
    if (s.item.length > 0) stage_inputs<kGateType>(s, p, s.item, thread - Config::kFirstStaging);
    if (warp >= Config::kWarps - 2) clear_upper_block(m, warp - (Config::kWarps - 2), lane);
  }
  __syncthreads();  // the 8-column halves of a block come from two warps
  float tile[4];
  merge_to_64(tile, m.A_kk, m.A_kk_inv, warp, lane, kMergeBarrier);
  store_inverse(s, thread);
  store_inverse_tile(s, tile, warp, lane);
}

__device__ __forceinline__ uint8_t* operands_of(const ForwardParams& p, const ForwardWorkspace& w,
                                                const Item& item) {
  return static_cast<uint8_t*>(p.workspace) + w.operands + item.operand_row * kOperandBytes;
}
__device__ __forceinline__ uint8_t* betas_of(const ForwardParams& p, const ForwardWorkspace& w,
                                             const Item& item) {
  return static_cast<uint8_t*>(p.workspace) + w.betas + item.operand_row * kBetaBytes;
}

// Decays, points of reference and norms.
template <DType kGateType>
__device__ __forceinline__ void prepare_references(BlockDecays& G, Config::Shared& s,
                                                   const ForwardParams& p,
                                                   const ForwardWorkspace& w) {
  const Item& item = s.item;
  const int beta_token = thread_index();  // of two warps
  const uint32_t beta = load_beta(p, item, beta_token);
  cumulate_decay<kGateType>(G, s, p, item, Place::of_warp());
  publish_decay(s, G, Place::of_warp());
  if (beta_token < kChunk) publish_beta(s, beta, p, item, betas_of(p, w, item), beta_token);
  __syncthreads();  // all blocks' decays, before they are summed
  const int warp = thread_index() / 32;
  find_norms(s, p.qk_l2norm, warp / 2, warp % 2, thread_index() % 32);
  const int channel = thread_index() % Config::kHeadDim;
  const bool powers = thread_index() >= Config::kHeadDim;
  const float decay = find_references(s, channel, powers);
  if (!powers && item.decay_row >= 0)
    reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) +
                             w.chunk_decay)[item.decay_row * Config::kHeadDim + channel] =
        exp2_fast(decay);
}

// Factors, and with them the scores of the warp's block with itself.
__device__ __forceinline__ void multiply_own_block(BlockScores& of_q, BlockScores& of_k,
                                                   RowFactors& rows, Config::Shared& s,
                                                   const BlockDecays& G) {
  const Place at = Place::of_warp();
  const float (*norms)[2] = s.norms + kBlock * at.block + at.row();
  const float2 norm[2] = {{norms[0][0], norms[0][1]}, {norms[8][0], norms[8][1]}};
  const bool too_far = s.references.too_far[at.block][at.half];
  if (too_far) add_pairwise(of_q, of_k, s, G, at);
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    ColumnFactors columns;
    find_factors(rows.q[step], rows.k[step], columns, s, G, norm, step, at);
    store_factors(s, rows.q[step], rows.k[step], columns, step, at);
    if (!too_far) {
      multiply(of_q, rows.q[step], columns.k);
      multiply(of_k, rows.k[step], columns.k);
    }
  }
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w, uint32_t workers) {
  wait_for_earlier_kernel();  // the tables
  let_next_kernel_start();    // behind that, so that it too finds them
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  if (threadIdx.x / 32 == Config::kWalker) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) start_walk(s.walk, p, w, workers);
    __syncwarp();  // the walk's start, before the other lanes read it
    find_item(s.item, s.walk, p, w, lane);
  }
  __syncthreads();  // the first item is there
  if (threadIdx.x < Config::kHeadDim) s.dt_bias[threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) {
    s.A_log = 0.0f;
    s.written.length = 0;
  }
  __syncthreads();  // what stays as it is where there is no bias or A_log: before the copies
  if (s.item.length > 0 && threadIdx.x >= Config::kFirstStaging)
    stage_inputs<kGateType>(s, p, s.item, threadIdx.x - Config::kFirstStaging);
  while (true) {
    if (threadIdx.x < Config::kBlocks * Config::kHalves)
      s.references.too_far[threadIdx.x / Config::kHalves][threadIdx.x % Config::kHalves] = false;
    wait_for_async_loads();
    fence_async_shared();  // the images of the last item, before the copy engine reads them
    __syncthreads();       // they are complete, and this item and its inputs are there
    if (thread_index() == Config::kWriter && s.written.length > 0)
      write_matrices(s, operands_of(p, w, s.written), s.written.length);
    if (s.item.length == 0) break;
    BlockDecays G;
    prepare_references<kGateType>(G, s, p, w);
    if (thread_index() == Config::kWriter)
      bulk_store_wait_read();  // the images: columns take their place
    __syncthreads();           // points of reference and norms, before the factors

    BlockScores of_q = {}, of_k = {};
    RowFactors rows;
    multiply_own_block(of_q, of_k, rows, s, G);
    fence_async_shared();  // the decayed operands, before the copy engine reads them
    __syncthreads();       // they are complete, and so are the column factors
    if (thread_index() == Config::kWriter) {
      write_operands(s, operands_of(p, w, s.item), s.item.length);
      if (w.overlap.processors > 0) {
        bulk_store_wait_all_but<1>();  // all of the last item
        announce(p, w, s.written);
      }
    }
    RowScores scores;
    scores.diagonal.keep(s, of_q, of_k, Place::of_warp().block, Place::of_warp());
    multiply_earlier_blocks(scores, s, rows, Place::of_warp());
    if (thread_index() / 32 == Config::kWalker)
      find_item(s.next_item, s.walk, p, w, thread_index() % 32);
    __syncthreads();  // columns have been read: images take their place; the other warps' halves of
                      // the scores are there
    const Place at = Place::of_warp();
    if (at.half == 0) {
      store_A_qk(s, scores, at);
    } else {
      store_A_kk(s, scores, at);
    }
    invert<kGateType>(s, p);
  }
  if (thread_index() == Config::kWriter) {
    bulk_store_wait_all_but<0>();  // shared memory outlives the copies, and the last item is told
    announce(p, w, s.written);
  }
}

}  // namespace jax_flashkda::chunk_prepare
