// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log
// decay inside the chunk:
//
//   k_decayed = k exp(G)            q_decayed = q exp(G)
//   k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j
//   A_kk_inv = (I + A_kk)^-1
//
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same
// rows of memory. A warp owns a strip of 4 tokens.
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

// The inverse of I + A_kk, and both matrices to memory: while eight warps find the inverse's lower
// left quarter, the others write the rest.
__device__ __forceinline__ void invert_and_write(Config::Shared& s, const ForwardParams& p,
                                                 const ForwardWorkspace& w, uint8_t* operands,
                                                 int length) {
  constexpr uint32_t kMergeBarrier = 1;
  Config::Matrices& m = s.matrices;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  __syncthreads();  // A_kk complete, before the substitution reads it
  if (warp < Config::kBlocks && lane < kBlock)
    invert_diagonal_block(m.A_kk, m.A_kk_inv, warp, lane);
  if (thread_index() == Config::kThreads - 1) announce(p, w, s.written_row);  // nobody waits for it
  __syncthreads();  // diagonal blocks of the inverse, before the merges; the item has been read
  if (thread_index() == 0) {
    if (w.overlap.processors > 0) s.written_row = s.item.operand_row;
    s.item = s.next_item;
  }
  if (warp < 4) merge_to_32(m.A_kk, m.A_kk_inv, warp, lane);
  __syncthreads();  // the 8-column halves of a block come from two warps
  if (warp < 8) {
    float tile[4] = {};
    merge_to_64(tile, m.A_kk, m.A_kk_inv, warp, lane, kMergeBarrier);
    write_tile(s, tile, operands, length, warp, lane);
  } else {
    write_matrices(s, operands, length, thread_index() - 8 * 32);
  }
}

__device__ __forceinline__ uint8_t* operands_of(const ForwardParams& p, const ForwardWorkspace& w,
                                                const Item& item) {
  return static_cast<uint8_t*>(p.workspace) + w.operands + item.operand_row * kOperandBytes;
}

// The running sums of the decays of a warp's strip; its whole decay and beta to shared memory.
template <DType kGateType>
__device__ __forceinline__ void publish_decay(DecayRows& g, Config::Shared& s,
                                              const ForwardParams& p, const Item& item) {
  const Strip strip(item.length);
  const int beta_token = static_cast<int>(thread_index()) - 128;  // warps 4 and 5
  const uint32_t beta = load_beta(p, item, beta_token);
  cumulate_decay<kGateType>(g, s, p, item, strip);
  const float (&decay)[Config::kChannels] = g[Config::kStrip - 1];
  *reinterpret_cast<float4*>(&s.references.strip_offset[strip.warp][strip.channel]) =
      make_float4(decay[0], decay[1], decay[2], decay[3]);
  publish_beta(s, beta, p, item.length, beta_token);
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w, uint32_t workers) {
  wait_for_earlier_kernel();  // the tables
  let_next_kernel_start();    // behind that, so that it too finds them
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  constexpr int kWalker = 7;  // the warp that looks for the next item
  if (threadIdx.x / 32 == kWalker) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) start_walk(s.walk, p, w, workers);
    __syncwarp();  // the walk's start, before the other lanes read it
    find_item(s.item, s.walk, p, w, lane);
  }
  __syncthreads();  // the first item is there
  if (threadIdx.x < 2 * kChunk) s.norms[threadIdx.x / 2][threadIdx.x % 2] = 1.0f;
  if (threadIdx.x < Config::kHeadDim) s.dt_bias[threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) {
    s.A_log = 0.0f;
    s.written_row = -1;
  }
  __syncthreads();  // what stays as it is where there are no norms, bias or A_log: before the copies
  const Item& item = s.item;
  if (item.length > 0) stage_inputs<kGateType>(s, p, item);
  while (true) {
    if (threadIdx.x < Config::kBlocks) s.references.too_far[threadIdx.x] = false;
    wait_for_async_loads();
    __syncthreads();  // the item and its inputs are there, and the last one has been written out
    if (item.length == 0) break;
    DecayRows g;
    publish_decay<kGateType>(g, s, p, item);
    __syncthreads();  // all strips' decays, before they are summed
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    if (warp < 4) {
      const int channel = thread_index();
      const float decay = find_references(s.references, channel);
      if (item.decay_row >= 0)
        reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) +
                                 w.chunk_decay)[item.decay_row * Config::kHeadDim + channel] =
            exp2_fast(decay);
    } else if (warp == kWalker) {
      find_item(s.next_item, s.walk, p, w, lane);
    } else if (warp >= 8 && p.qk_l2norm) {
      const int block = warp % 4, which = warp < 12 ? 0 : 1;
      find_norms(s.norms + kBlock * block, which, shared_address(which ? s.k[block] : s.q[block]),
                 lane);
    }
    __syncthreads();  // points of reference and norms, before the factors

    write_factors(s, operands_of(p, w, item), item.length, g, Strip(item.length));
    __syncthreads();  // all factors, before their readers
    Scores scores = multiply_factors(s, Strip(item.length));
    const int32_t* too_far = s.references.too_far;
    if (too_far[0] || too_far[1] || too_far[2] || too_far[3])
      pairwise_diagonal<kGateType>(scores.block, s, p, item);
    __syncthreads();  // factors and inputs have been read: the matrices and the next item's inputs
                      // take their place
    if (s.next_item.length > 0) stage_inputs<kGateType>(s, p, s.next_item);
    clear_upper_blocks(s.matrices, Strip(item.length));
    store_scores(s, scores, Strip(item.length));
    invert_and_write(s, p, w, operands_of(p, w, item), item.length);
  }
  if (threadIdx.x == 0) announce(p, w, s.written_row);
}

}  // namespace jax_flashkda::chunk_prepare
