// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log decay inside the chunk:
//   k_decayed = k exp(G)     q_decayed = q exp(G)     k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j    A_kk_inv = (I + A_kk)^-1 Diag(beta)
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same rows of memory.
// Read: q, k [B, T, H, K], g [B, T, HV, K], beta [B, T, HV]. Written: the workspace, as images of the shared-memory tiles of
// the state stage (rows of 128 bytes, pieces swizzled by the row inside the chunk), and zeros to o for padding.
// Rows behind the chunk's end are never read: they count as zeros, so nothing of a neighbour can enter.
// It is a stage of its own because it is parallel over chunks: nothing of it may sit on the serial path of the state.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

using Rows = uint2[kBlock];                          // a lane's 4 channels of its block's 16 tokens, bf16
using DecayRows = float[kBlock][Config::kChannels];  // the same of the log2 decay

// What a warp knows of the block it owns.
struct BlockView {
  int warp, lane, channel;
  int rows;            // tokens that exist, 0 .. 16
  int64_t token;       // row * T + first token of the block
};

__device__ __forceinline__ void load_rows(Rows& x, const void* base, int64_t token, int64_t heads, int64_t head, int channel, int rows) {
  const char* from = static_cast<const char*>(base) + (((token * heads + head) * Config::kHeadDim) + channel) * 2;
#pragma unroll
  for (int r = 0; r < kBlock; ++r)
    x[r] = r < rows ? __ldg(reinterpret_cast<const uint2*>(from + r * heads * Config::kHeadDim * 2)) : make_uint2(0, 0);
}

// Raw gate to the running sum of the log2 decay from the block's start. Missing tokens decay nothing.
template <Gate kGate>
__device__ __forceinline__ void accumulate_gate(DecayRows& g, const GateCoefficients (&c)[Config::kChannels], int rows) {
#pragma unroll
  for (int e = 0; e < Config::kChannels; ++e) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kBlock; ++r) {
      const float decay = log2_decay<kGate>(g[r][e], c[e]);
      sum += r < rows ? decay : 0.0f;
      g[r][e] = sum;
    }
  }
}

__device__ __forceinline__ void load_gate(DecayRows& g, const ForwardParams& p, const BlockView& block, int64_t head) {
  const int64_t HV = p.shape.HV;
  if (p.g_dtype == DType::kBF16) {
    Rows raw;
    load_rows(raw, p.g, block.token, HV, head, block.channel, block.rows);
#pragma unroll
    for (int r = 0; r < kBlock; ++r) {
      g[r][0] = bf16_low(raw[r].x);
      g[r][1] = bf16_high(raw[r].x);
      g[r][2] = bf16_low(raw[r].y);
      g[r][3] = bf16_high(raw[r].y);
    }
  } else {
    const float* from = static_cast<const float*>(p.g) + (block.token * HV + head) * Config::kHeadDim + block.channel;
#pragma unroll
    for (int r = 0; r < kBlock; ++r) {
      const float4 x = r < block.rows ? __ldg(reinterpret_cast<const float4*>(from + r * HV * Config::kHeadDim))
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      g[r][0] = x.x;
      g[r][1] = x.y;
      g[r][2] = x.z;
      g[r][3] = x.w;
    }
  }
}

__device__ __forceinline__ void cumulate_decay(DecayRows& g, const ForwardParams& p, int64_t row, int64_t head,
                                               const BlockView& block) {
  GateCoefficients c[Config::kChannels];
  const int64_t gate_head = row * p.shape.HV + head;
  const float A_log = p.A_log != nullptr ? __ldg(p.A_log + gate_head) : 0.0f;
#pragma unroll
  for (int e = 0; e < Config::kChannels; ++e) {
    const float bias = p.dt_bias != nullptr ? __ldg(p.dt_bias + gate_head * Config::kHeadDim + block.channel + e) : 0.0f;
    c[e] = gate_coefficients(p.gate, A_log, bias, p.gate_lower_bound);
  }
  if (p.gate == Gate::kSoftplus) {
    accumulate_gate<Gate::kSoftplus>(g, c, block.rows);
  } else if (p.gate == Gate::kBounded) {
    accumulate_gate<Gate::kBounded>(g, c, block.rows);
  } else {
    accumulate_gate<Gate::kLogDecay>(g, c, block.rows);
  }
}

// Lane l leaves the factor of row l % 16, of q for l < 16 and of k above.
__device__ __forceinline__ void find_norms(float* s_norms, const Rows& q, const Rows& k, bool qk_l2norm, int lane) {
  float factor = 1.0f;
  if (qk_l2norm) {
    float squares[32];
#pragma unroll
    for (int r = 0; r < kBlock; ++r) {
      squares[r] = sum_of_squares(q[r]);
      squares[kBlock + r] = sum_of_squares(k[r]);
    }
    factor = l2norm_factor(sum_over_lanes(squares, lane));
  }
  s_norms[lane] = factor;
  __syncwarp();
}

// The decays between the ends of the block and the points its factors refer to, per channel of the lane.
struct BlockDecays {
  float before[4];  // exp of the chunk's decay ahead of the block
  float after[4];   // exp of the chunk's decay behind the block
  float far[4];     // between the block and the middle of the chunk
  float rise[4];    // from the block's middle up to its start: >= 1
  float fall[4];    // from the block's middle down to its end
};

__device__ __forceinline__ BlockDecays find_block_decays(const Config::Shared& s, const DecayRows& g, const BlockView& block) {
  BlockDecays d;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float total[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) total[b] = s.block_decay[b][block.channel + e];
    float before = 0.0f, after = 0.0f;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      before += b < block.warp ? total[b] : 0.0f;
      after += b > block.warp ? total[b] : 0.0f;
    }
    d.before[e] = exp2_fast(before);
    d.after[e] = exp2_fast(after);
    d.far[e] = exp2_fast(block.warp == 0 ? total[1] : block.warp == 3 ? total[2] : 0.0f);
    const float middle = g[kBlock / 2 - 1][e];
    d.rise[e] = exp2_fast(-middle);
    d.fall[e] = exp2_fast(middle - g[kBlock - 1][e]);
  }
  return d;
}

// One reference point carries the diagonal block if neither of its halves decays too far. The same answer in all lanes.
__device__ __forceinline__ bool spans_too_far(const DecayRows& g) {
  bool far = false;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float middle = g[kBlock / 2 - 1][e];
    far |= !(middle >= -kLog2DecayHalfSpan) || !(g[kBlock - 1][e] - middle >= -kLog2DecayHalfSpan);
  }
  return __any_sync(0xffffffffu, far);
}

__device__ __forceinline__ uint2 pack4(const float (&x)[4], const float (&y)[4]) {
  return make_uint2(pack_bf16(x[0] * y[0], x[1] * y[1]), pack_bf16(x[2] * y[2], x[3] * y[3]));
}
__device__ __forceinline__ uint2 pack4(const float (&x)[4]) {
  return make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}
__device__ __forceinline__ void put(uint8_t* tile, uint32_t offset, uint2 value) { *reinterpret_cast<uint2*>(tile + offset) = value; }

// Where the three decayed operands of the chunk go: base of each image, and the lane's place in a row of it.
struct DecayedImages {
  uint8_t *k_decayed, *q_decayed, *k_restored;
  int64_t half;  // bytes of this lane's column half ahead of its rows
};

// Each token of the block once: its decayed operands to memory, its score factors to shared memory.
__device__ __forceinline__ void write_factors(Config::Shared& s, const DecayedImages& images, const Rows& q, const Rows& k,
                                              const DecayRows& g, const BlockDecays& d, const BlockView& block) {
  const int pair = block.warp >> 1, far = block.warp & 1;  // tile numbers: far tiles by block in its half, near ones by half
  uint8_t* far_q = block.warp >= 2 ? s.factors.q_far[far] : nullptr;
  uint8_t* far_k = block.warp >= 2 ? s.factors.k_far[far] : s.factors.c_far[far];
  uint8_t* near_q = far ? s.factors.q_near[pair] : nullptr;
  uint8_t* near_k = far ? s.factors.k_near[pair] : s.factors.c_near[pair];
  Config::DiagonalFactors& diagonal = s.diagonal[block.warp];
#pragma unroll
  for (int r = 0; r < kBlock; ++r) {
    const float q_norm = s.norms[block.warp][r], k_norm = s.norms[block.warp][kBlock + r];
    const float q_row[4] = {bf16_low(q[r].x) * q_norm, bf16_high(q[r].x) * q_norm, bf16_low(q[r].y) * q_norm, bf16_high(q[r].y) * q_norm};
    const float k_row[4] = {bf16_low(k[r].x) * k_norm, bf16_high(k[r].x) * k_norm, bf16_low(k[r].y) * k_norm, bf16_high(k[r].y) * k_norm};
    float q_down[4], k_down[4], k_up[4];  // decayed from the block's start; up to the block's end
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float down = exp2_fast(g[r][e]);
      q_down[e] = q_row[e] * down;
      k_down[e] = k_row[e] * down;
      k_up[e] = k_row[e] * exp2_fast(g[kBlock - 1][e] - g[r][e]);
    }
    const int row = kBlock * block.warp + r;
    if (r < block.rows) {
      const int64_t to = images.half + swizzle128(row, (block.lane & 15) >> 1) + 8 * (block.lane & 1);
      *reinterpret_cast<uint2*>(images.k_decayed + to) = pack4(k_down, d.before);
      *reinterpret_cast<uint2*>(images.q_decayed + to) = pack4(q_down, d.before);
      *reinterpret_cast<uint2*>(images.k_restored + to) = pack4(k_up, d.after);
    }
    const uint32_t at = tile_offset(r, block.lane >> 1) + 8 * (block.lane & 1);
    if (far_q != nullptr) {
      put(far_q, at, pack4(q_down, d.far));
      put(far_k, at, pack4(k_down, d.far));
    } else {
      put(far_k, at, pack4(k_up, d.far));
    }
    if (near_q != nullptr) {
      put(near_q, at, pack4(q_down));
      put(near_k, at, pack4(k_down));
    } else {
      put(near_k, at, pack4(k_up));
    }
    put(diagonal.q, at, pack4(q_down, d.rise));
    put(diagonal.k, at, pack4(k_down, d.rise));
    put(diagonal.c, at, pack4(k_up, d.fall));
  }
}

// The blocks of scores a warp computes, as accumulators of the warp's products.
struct Scores {
  float far[1][2][2][4];   // block row 2 + (warp & 1) against columns 0 and 1; of q for warps 0, 1, of k for 2, 3
  float near[1][1][2][4];  // block (1, 0) for warps 0, 1, (3, 2) for 2, 3; of q for even warps
  float q[2][4];           // the warp's own diagonal block
  float k[2][4];
};

__device__ __forceinline__ void multiply_far_and_near(Scores& scores, const Config::Shared& s, const BlockView& block) {
  const int which = block.warp & 1, pair = block.warp >> 1;
  const uint32_t far_rows[1] = {shared_address(pair == 0 ? s.factors.q_far[which] : s.factors.k_far[which])};
  const uint32_t far_columns[2] = {shared_address(s.factors.c_far[0]), shared_address(s.factors.c_far[1])};
  score_blocks<1, 2>(scores.far, far_rows, far_columns, block.lane);
  const uint32_t near_rows[1] = {shared_address(which == 0 ? s.factors.q_near[pair] : s.factors.k_near[pair])};
  const uint32_t near_columns[1] = {shared_address(s.factors.c_near[pair])};
  score_blocks<1, 1>(scores.near, near_rows, near_columns, block.lane);
}

__device__ __forceinline__ void multiply_diagonal(Scores& scores, const Config::Shared& s, const BlockView& block) {
  const Config::DiagonalFactors& diagonal = s.diagonal[block.warp];
  float acc[2][1][2][4] = {};
  const uint32_t rows[2] = {shared_address(diagonal.q), shared_address(diagonal.k)};
  const uint32_t columns[1] = {shared_address(diagonal.c)};
  score_blocks<2, 1>(acc, rows, columns, block.lane);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores.q[n][e] = acc[0][0][n][e];
      scores.k[n][e] = acc[1][0][n][e];
    }
}

// One 16x16 block of A_qk: zero above the diagonal (select: factors may be infinite there).
__device__ __forceinline__ void store_A_qk(Config::Matrices& m, const float (&c)[2][4], int block_row, int block_column, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * block_row + (lane >> 2) + 8 * h, j = 16 * block_column + 8 * n + 2 * (lane & 3);
      const uint32_t pair = pack_bf16(i >= j ? c[n][2 * h] : 0.0f, i >= j + 1 ? c[n][2 * h + 1] : 0.0f);
      *reinterpret_cast<uint32_t*>(m.A_qk + swizzle128(i, j >> 3) + 2 * (j & 7)) = pair;
    }
}

__device__ __forceinline__ void store_A_kk(Config::Matrices& m, const float* s_beta, const float (&c)[2][4], int block_row,
                                           int block_column, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * block_row + (lane >> 2) + 8 * h, j = 16 * block_column + 8 * n + 2 * (lane & 3);
      const float beta = s_beta[i];
      *reinterpret_cast<float2*>(m.A_kk + matrix_at(i, j)) =
          make_float2(i > j ? beta * c[n][2 * h] : 0.0f, i > j + 1 ? beta * c[n][2 * h + 1] : 0.0f);
    }
}

// Above the diagonal nothing is computed, and zeros are read.
__device__ __forceinline__ void clear_upper_blocks(Config::Matrices& m, const BlockView& block) {
#pragma unroll
  for (int row = 0; row < 3; ++row)
#pragma unroll
    for (int column = row + 1; column < 4; ++column)
      if ((row + column) % 4 == block.warp) {
        const int i = 16 * row + (block.lane >> 1), piece = block.lane & 1;
        *reinterpret_cast<uint4*>(m.A_qk + swizzle128(i, 2 * column + piece)) = make_uint4(0, 0, 0, 0);
        float4* X = reinterpret_cast<float4*>(m.A_kk_inv + matrix_at(i, 16 * column + 8 * piece));
        X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
}

__device__ __forceinline__ void store_scores(Config::Shared& s, const Scores& scores, const BlockView& block) {
  Config::Matrices& m = s.matrices;
  const int which = block.warp & 1, pair = block.warp >> 1, lane = block.lane;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    if (pair == 0) store_A_qk(m, scores.far[0][column], 2 + which, column, lane);
    if (pair == 1) store_A_kk(m, s.beta, scores.far[0][column], 2 + which, column, lane);
  }
  if (which == 0) store_A_qk(m, scores.near[0][0], 2 * pair + 1, 2 * pair, lane);
  if (which == 1) store_A_kk(m, s.beta, scores.near[0][0], 2 * pair + 1, 2 * pair, lane);
  store_A_qk(m, scores.q, block.warp, block.warp, lane);
  store_A_kk(m, s.beta, scores.k, block.warp, block.warp, lane);
}

// A_qk and (I + A_kk)^-1 Diag(beta) to memory, the tokens that exist.
__device__ __forceinline__ void write_matrices(const Config::Shared& s, uint8_t* A_kk_inv, uint8_t* A_qk, int length) {
#pragma unroll
  for (int n = 0; n < kChunk * 8 / Config::kThreads; ++n) {
    const int at = threadIdx.x + n * Config::kThreads, row = at >> 3, piece = at & 7;
    if (row >= length) continue;
    const float4* X = reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
    const float4* beta = reinterpret_cast<const float4*>(s.beta + 8 * piece);
    const float4 x0 = X[0], x1 = X[1], b0 = beta[0], b1 = beta[1];
    *reinterpret_cast<uint4*>(A_kk_inv + swizzle128(row, piece)) =
        make_uint4(pack_bf16(x0.x * b0.x, x0.y * b0.y), pack_bf16(x0.z * b0.z, x0.w * b0.w), pack_bf16(x1.x * b1.x, x1.y * b1.y),
                   pack_bf16(x1.z * b1.z, x1.w * b1.w));
    *reinterpret_cast<uint4*>(A_qk + 16 * at) = *reinterpret_cast<const uint4*>(s.matrices.A_qk + 16 * at);
  }
}

__device__ __forceinline__ void clear_output(const ForwardParams& p, const Chunk& chunk, int64_t head) {
  for (int at = threadIdx.x; at < chunk.length * 16; at += Config::kThreads) {
    const int64_t token = chunk.row * p.shape.T + chunk.start + (at >> 4);
    reinterpret_cast<uint4*>(p.o)[(token * p.shape.HV + head) * 16 + (at & 15)] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void load_beta(float* s_beta, const ForwardParams& p, const Chunk& chunk, int64_t head) {
  const int r = threadIdx.x;
  if (r >= kChunk) return;
  float beta = 0.0f;
  if (r < chunk.length) {
    const int64_t at = (chunk.row * p.shape.T + chunk.start + r) * p.shape.HV + head;
    const float raw = p.beta_dtype == DType::kBF16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p.beta)[at])
                                                   : static_cast<const float*>(p.beta)[at];
    beta = beta_value(raw, p.beta_is_logits, p.allow_neg_eigval);
  }
  s_beta[r] = beta;
}

__device__ __forceinline__ void write_chunk_decay(const Config::Shared& s, float* chunk_decay, const BlockView& block) {
  float decay[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float total = 0.0f;
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) total += s.block_decay[b][block.channel + e];
    decay[e] = exp2_fast(total);
  }
  *reinterpret_cast<float4*>(chunk_decay + block.channel) = make_float4(decay[0], decay[1], decay[2], decay[3]);
}

__device__ __forceinline__ void prepare(Config::Shared& s, const ForwardParams& p, const ForwardWorkspace& w, const Chunk& chunk,
                                        int64_t head) {
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  const int64_t head_row = (chunk.row * p.shape.HV + head) * p.shape.T + chunk.start;
  BlockView block;
  block.warp = threadIdx.x / 32;
  block.lane = threadIdx.x % 32;
  block.channel = Config::kChannels * block.lane;
  block.rows = min(max(chunk.length - kBlock * block.warp, 0), kBlock);
  block.token = chunk.row * p.shape.T + chunk.start + kBlock * block.warp;

  Rows q, k;
  DecayRows g;
  load_gate(g, p, block, head);
  const int64_t qk_head = head / (p.shape.HV / p.shape.H);
  load_rows(q, p.q, block.token, p.shape.H, qk_head, block.channel, block.rows);
  load_rows(k, p.k, block.token, p.shape.H, qk_head, block.channel, block.rows);
  load_beta(s.beta, p, chunk, head);
  cumulate_decay(g, p, chunk.row, head, block);
  *reinterpret_cast<float4*>(&s.block_decay[block.warp][block.channel]) =
      make_float4(g[kBlock - 1][0], g[kBlock - 1][1], g[kBlock - 1][2], g[kBlock - 1][3]);
  find_norms(s.norms[block.warp], q, k, p.qk_l2norm, block.lane);
  __syncthreads();  // all warps' block_decay, before every warp reads it

  const int64_t half = (block.lane >> 4) * static_cast<int64_t>(chunk.length) * 128;
  const DecayedImages images = {workspace + w.k_decayed + head_row * 256, workspace + w.q_decayed + head_row * 256,
                                workspace + w.k_restored + head_row * 256, half};
  write_factors(s, images, q, k, g, find_block_decays(s, g, block), block);
  if (chunk.decay_slot >= 0 && block.warp == 0) {
    const int64_t slot = (chunk.row * p.shape.HV + head) * w.decay_slots + chunk.decay_slot;
    write_chunk_decay(s, reinterpret_cast<float*>(workspace + w.chunk_decay) + slot * Config::kHeadDim, block);
  }
  __syncwarp();  // the warp's diagonal factors, before its own ldmatrix
  Scores scores = {};
  if (spans_too_far(g)) {
    pairwise_scores(scores.q, scores.k, q, k, s.norms[block.warp], s.norms[block.warp] + kBlock, g,
                    reinterpret_cast<float*>(&s.diagonal[block.warp]), block.lane);
  } else {
    multiply_diagonal(scores, s, block);
  }
  __syncthreads();  // all warps' far and near factors, before their readers
  multiply_far_and_near(scores, s, block);
  __syncthreads();  // the factors have been read: their memory becomes the matrices
  clear_upper_blocks(s.matrices, block);
  store_scores(s, scores, block);
  __syncthreads();  // A_kk complete, before the substitution reads it
  if (threadIdx.x < kChunk) invert_diagonal_block(s.matrices.A_kk, s.matrices.A_kk_inv, threadIdx.x / 16, threadIdx.x % 16);
  __syncthreads();  // diagonal blocks of the inverse, before the merges
  merge_blocks(s.matrices.A_kk, s.matrices.A_kk_inv, block.warp, block.lane);
  __syncthreads();  // the whole inverse, before it is written out
  write_matrices(s, workspace + w.A_kk_inv + head_row * 128, workspace + w.A_qk + head_row * 128, chunk.length);
  __syncthreads();  // the matrices have been read, before the next chunk's factors overwrite them
}

__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  const char* workspace = static_cast<const char*>(p.workspace);
  const bool table = p.shape.has_segment_ids;
  const ChunkEntry* entries = reinterpret_cast<const ChunkEntry*>(workspace + w.chunk_table);
  const int64_t most = p.shape.has_segment_ids ? p.shape.B * p.shape.T : p.shape.B * ((p.shape.T + kChunk - 1) / kChunk);
  const int64_t chunks =
      table ? clamp_to(reinterpret_cast<const TableCounts*>(workspace + w.counts)->chunks, 0, most) : most;
  for (int64_t item = blockIdx.x; item < chunks * p.shape.HV; item += gridDim.x) {
    const int64_t index = item / p.shape.HV, head = item % p.shape.HV;
    const Chunk chunk = table ? chunk_from_entry(p.shape, entries[index]) : chunk_without_table(p.shape, index);
    if (chunk.padding) {
      clear_output(p, chunk, head);
    } else {
      prepare(s, p, w, chunk, head);
    }
  }
}

}  // namespace jax_flashkda::chunk_prepare
