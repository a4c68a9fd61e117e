// Everything of a chunk that needs no state, all chunks at once. With G the running sum of the log decay inside the chunk:
//   k_decayed = k exp(G)     q_decayed = q exp(G)     k_restored = k exp(G_C - G)     chunk_decay = exp(G_C)
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>, i >= j    A_kk_inv = (I + A_kk)^-1 Diag(beta)
// Grid: persistent CTAs over (chunk, value head), heads fastest so that neighbours read the same rows of memory. A warp owns
// a strip of 8 tokens: decays are summed from the strip's start, and the decay between any two points of reference is a
// product of per-channel constants, so a token costs two exponentials whatever the number of its factors.
// Read: q, k [B, T, H, K], g [B, T, HV, K], beta [B, T, HV]. Written: the workspace's operand tiles and chunk decays, and zeros
// to o for padding.
// Rows behind the chunk's end are never read: they count as zeros, so nothing of a neighbour can enter.
// It is a stage of its own because it is parallel over chunks: nothing of it may sit on the serial path of the state.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

using Rows = uint2[Config::kStrip];                         // a lane's 4 channels of its strip's tokens, bf16
using DecayRows = float[Config::kStrip][Config::kChannels];  // the same of the log2 decay

// What a warp knows of the strip it owns.
struct Strip {
  int warp, lane, channel;
  int rows;       // tokens that exist, 0 .. 8
  int64_t token;  // row * T + first token of the strip
};

__device__ __forceinline__ void load_rows(Rows& x, const void* base, int64_t heads, int64_t head, const Strip& strip) {
  const char* from = static_cast<const char*>(base) + ((strip.token * heads + head) * Config::kHeadDim + strip.channel) * 2;
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r)
    x[r] = r < strip.rows ? __ldg(reinterpret_cast<const uint2*>(from + r * heads * Config::kHeadDim * 2)) : make_uint2(0, 0);
}

__device__ __forceinline__ void load_gate(DecayRows& g, const ForwardParams& p, const Strip& strip, int64_t head) {
  const int64_t HV = p.shape.HV;
  if (p.g_dtype == DType::kBF16) {
    Rows raw;
    load_rows(raw, p.g, HV, head, strip);
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      g[r][0] = bf16_low(raw[r].x);
      g[r][1] = bf16_high(raw[r].x);
      g[r][2] = bf16_low(raw[r].y);
      g[r][3] = bf16_high(raw[r].y);
    }
  } else {
    const float* from = static_cast<const float*>(p.g) + (strip.token * HV + head) * Config::kHeadDim + strip.channel;
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      const float4 x = r < strip.rows ? __ldg(reinterpret_cast<const float4*>(from + r * HV * Config::kHeadDim))
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      g[r][0] = x.x;
      g[r][1] = x.y;
      g[r][2] = x.z;
      g[r][3] = x.w;
    }
  }
}

template <Gate kGate>
__device__ __forceinline__ void decay_of_rows(DecayRows& g, const GateCoefficients (&c)[Config::kChannels]) {
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] = log2_decay<kGate>(g[r][e], c[e]);
}

// Raw gate to the running sum of the log2 decay from the strip's start. Missing tokens decay nothing.
__device__ __forceinline__ void cumulate_decay(DecayRows& g, const ForwardParams& p, int64_t row, int64_t head, const Strip& strip) {
  GateCoefficients c[Config::kChannels];
  const int64_t gate_head = row * p.shape.HV + head;
  const float A_log = p.A_log != nullptr ? __ldg(p.A_log + gate_head) : 0.0f;
  float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (p.dt_bias != nullptr) bias = __ldg(reinterpret_cast<const float4*>(p.dt_bias + gate_head * Config::kHeadDim + strip.channel));
  const float biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
  for (int e = 0; e < Config::kChannels; ++e) c[e] = gate_coefficients(p.gate, A_log, biases[e], p.gate_lower_bound);
  if (p.gate == Gate::kSoftplus) {
    decay_of_rows<Gate::kSoftplus>(g, c);
  } else if (p.gate == Gate::kBounded) {
    decay_of_rows<Gate::kBounded>(g, c);
  } else {
    decay_of_rows<Gate::kLogDecay>(g, c);
  }
  if (strip.rows < Config::kStrip) {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
      for (int e = 0; e < Config::kChannels; ++e) g[r][e] = r < strip.rows ? g[r][e] : 0.0f;
  }
#pragma unroll
  for (int r = 1; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] += g[r - 1][e];
}

// Leaves the factors of the strip's rows: of q, then of k.
__device__ __forceinline__ void find_norms(float* s_norms, const Rows& q, const Rows& k, bool qk_l2norm, int lane) {
  float factor = 1.0f;
  if (qk_l2norm) {
    float squares[2 * Config::kStrip];
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      squares[r] = sum_of_squares(q[r]);
      squares[Config::kStrip + r] = sum_of_squares(k[r]);
    }
    factor = l2norm_factor(sum_over_lanes(squares, lane));
  }
  if (lane < 2 * Config::kStrip) s_norms[lane] = factor;
}

// Tells the other warps how far the strip decays, and whether a reference point at its end can carry it.
__device__ __forceinline__ void publish_decay(Config::Shared& s, const DecayRows& g, const Strip& strip) {
  const float(&total)[4] = g[Config::kStrip - 1];
  *reinterpret_cast<float4*>(&s.strip_decay[strip.warp][strip.channel]) = make_float4(total[0], total[1], total[2], total[3]);
  bool far = false;
#pragma unroll
  for (int e = 0; e < 4; ++e) far |= !(total[e] >= -kLog2DecayHalfSpan);
  far = __any_sync(0xffffffffu, far);
  if (strip.lane == 0) s.spans_too_far[strip.warp] = far;
}

// The decays between the ends of the strip and the points its factors refer to, per channel of the lane.
struct StripDecays {
  float before[4];  // the chunk's decay ahead of the strip
  float after[4];   // the chunk's decay behind the strip
  float far[4];     // between the strip and the middle of the chunk
  float near[4];    // between the strip and the middle of its half
  float row[4];     // between the strip's start and the middle of its block: >= 1, against the decay, in a lower strip
  float column[4];  // between the strip's end and the middle of its block: >= 1 in an upper strip
};

__device__ __forceinline__ StripDecays find_strip_decays(const Config::Shared& s, const DecayRows& g, const Strip& strip) {
  StripDecays d = {};
  const int w = strip.warp, half = w & 4;
#pragma unroll
  for (int b = 0; b < Config::kStrips; ++b) {
    const float4 total = *reinterpret_cast<const float4*>(&s.strip_decay[b][strip.channel]);
    const float totals[4] = {total.x, total.y, total.z, total.w};
    const bool to_far = w < 4 ? (b > w && b < 4) : (b >= 4 && b < w);
    const bool to_near = (w & 2) == 0 ? (b == w + 1 && (w & 1) == 0) : (b == w - 1 && (w & 1) == 1);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (b < w) d.before[e] += totals[e];
      if (b > w) d.after[e] += totals[e];
      if (to_far) d.far[e] += totals[e];
      if (to_near && b / 4 == half / 4) d.near[e] += totals[e];
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    d.before[e] = exp2_fast(d.before[e]);
    d.after[e] = exp2_fast(d.after[e]);
    d.far[e] = exp2_fast(d.far[e]);
    d.near[e] = exp2_fast(d.near[e]);
    const float rise = exp2_fast(-g[Config::kStrip - 1][e]);
    d.row[e] = w & 1 ? 1.0f : rise;
    d.column[e] = w & 1 ? rise : 1.0f;
  }
  return d;
}

__device__ __forceinline__ uint2 pack4(const float (&x)[4], const float (&y)[4]) {
  return make_uint2(pack_bf16(x[0] * y[0], x[1] * y[1]), pack_bf16(x[2] * y[2], x[3] * y[3]));
}

// The lane's place in row r of a swizzled tile, from its place in the strip's row 0: pieces move by an exclusive or.
// Predicated rather than branched around: the strips differ in what they store, and branches would keep rows apart.
__device__ __forceinline__ void put(uint32_t tile, int r, uint2 value, bool wanted = true) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n@wanted st.shared.v2.b32 [%0], {%1, %2};\n}" ::"r"(
                   (tile ^ (r << 4)) + r * 256),
               "r"(value.x), "r"(value.y), "r"(static_cast<int>(wanted))
               : "memory");
}
__device__ __forceinline__ void put(uint8_t* tile, int r, uint2 value, bool wanted) {
  const uintptr_t to = (reinterpret_cast<uintptr_t>(tile) ^ (r << 4)) + r * kTileRowBytes;
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n@wanted st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(to),
               "r"(value.x), "r"(value.y), "r"(static_cast<int>(wanted))
               : "memory");
}
__device__ __forceinline__ void choose(float (&out)[4], bool first, const float (&x)[4], const float (&y)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = first ? x[e] : y[e];
}

// Each token of the strip once: its decayed operands to memory, its score factors to shared memory.
__device__ __forceinline__ void write_factors(Config::Shared& s, uint8_t* operands, int length, const Rows& q, const Rows& k,
                                              const DecayRows& g, const StripDecays& d, const Strip& strip) {
  const int block = strip.warp >> 1, pair = strip.warp >> 2, upper_half = strip.warp & 1;
  const uint32_t in_tile = 2048 * upper_half + 8 * strip.lane;
  Config::Factors& f = s.factors;
  const bool far_row = block >= 2, near_row = block & 1;
  const uint32_t far_q = shared_address(f.q_far[block & 1]) + in_tile;
  const uint32_t far_k = shared_address(far_row ? f.k_far[block & 1] : f.c_far[block & 1]) + in_tile;
  const uint32_t near_q = shared_address(f.q_near[pair]) + in_tile;
  const uint32_t near_k = shared_address(near_row ? f.k_near[pair] : f.c_near[pair]) + in_tile;
  const uint32_t diagonal = shared_address(&s.diagonal[block]) + in_tile;
  const int64_t tile_bytes = length * kTileRowBytes;
  uint8_t* k_decayed = operands + (kTileKDecayed + (strip.lane >> 4)) * tile_bytes + Config::kStrip * kTileRowBytes * strip.warp + 8 * (strip.lane & 15);
  uint8_t* q_decayed = k_decayed + (kTileQDecayed - kTileKDecayed) * tile_bytes;
  uint8_t* k_restored = k_decayed + (kTileKRestored - kTileKDecayed) * tile_bytes;
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    const float q_norm = s.norms[strip.warp][r], k_norm = s.norms[strip.warp][Config::kStrip + r];
    const float q_row[4] = {bf16_low(q[r].x), bf16_high(q[r].x), bf16_low(q[r].y), bf16_high(q[r].y)};
    const float k_row[4] = {bf16_low(k[r].x), bf16_high(k[r].x), bf16_low(k[r].y), bf16_high(k[r].y)};
    float q_down[4], k_down[4], k_up[4];  // decayed from the strip's start; up to the strip's end
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float down = exp2_fast(g[r][e]), k_normed = k_row[e] * k_norm;
      q_down[e] = q_row[e] * q_norm * down;
      k_down[e] = k_normed * down;
      k_up[e] = k_normed * exp2_fast(g[Config::kStrip - 1][e] - g[r][e]);
    }
    const bool exists = r < strip.rows;
    put(k_decayed, r, pack4(k_down, d.before), exists);
    put(q_decayed, r, pack4(q_down, d.before), exists);
    put(k_restored, r, pack4(k_up, d.after), exists);
    float far[4], near[4];
    choose(far, far_row, k_down, k_up);
    choose(near, near_row, k_down, k_up);
    put(far_q, r, pack4(q_down, d.far), far_row);
    put(far_k, r, pack4(far, d.far));
    put(near_q, r, pack4(q_down, d.near), near_row);
    put(near_k, r, pack4(near, d.near));
    put(diagonal, r, pack4(q_down, d.row));
    put(diagonal + kTileBytes, r, pack4(k_down, d.row));
    put(diagonal + 2 * kTileBytes, r, pack4(k_up, d.column));
  }
}

// A diagonal block whose decay no single reference point can carry. Two warps: one sums the scores of q, the other those of k.
__device__ __forceinline__ void pairwise_diagonal(float (&acc)[2][4], Config::Shared& s, const Rows& q, const Rows& k,
                                                  const DecayRows& g, const Strip& strip) {
  const int block = strip.warp >> 1, upper_half = strip.warp & 1;
  const uint32_t barrier = 1 + block;
  PairwiseScratch& scratch = s.diagonal[block].pairwise;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    named_barrier(barrier, 64);  // the two warps have read what is there, before it is overwritten
    if ((strip.lane >> 4) == half) {
#pragma unroll
      for (int r = 0; r < Config::kStrip; ++r) {
        const int to = pairwise_at(Config::kStrip * upper_half + r, 4 * (strip.lane & 15));
        const float a = s.norms[strip.warp][r], b = s.norms[strip.warp][Config::kStrip + r];
        *reinterpret_cast<float4*>(scratch.q + to) =
            make_float4(a * bf16_low(q[r].x), a * bf16_high(q[r].x), a * bf16_low(q[r].y), a * bf16_high(q[r].y));
        *reinterpret_cast<float4*>(scratch.k + to) =
            make_float4(b * bf16_low(k[r].x), b * bf16_high(k[r].x), b * bf16_low(k[r].y), b * bf16_high(k[r].y));
        float4 start = *reinterpret_cast<const float4*>(&s.strip_decay[strip.warp - upper_half][strip.channel]);
        if (!upper_half) start = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *reinterpret_cast<float4*>(scratch.log2_decay_cumsum + to) =
            make_float4(start.x + g[r][0], start.y + g[r][1], start.z + g[r][2], start.w + g[r][3]);
      }
    }
    named_barrier(barrier, 64);  // both strips' rows are there, before either warp reads them
    add_pairwise_scores(acc, scratch, upper_half ? scratch.k : scratch.q, strip.lane);
  }
}

// The blocks of scores a warp computes.
struct Scores {
  float far[2][4];       // block row 2 + (warp / 2) % 2 against block column warp % 2; of q for warps 0 .. 3, else of k
  float near[4];         // half warp % 2 of block (1, 0) for warps 0 .. 3, else of (3, 2); of q where warp / 2 is even
  float diagonal[2][4];  // block warp / 2; of q for even warps
};

__device__ __forceinline__ void multiply_factors(Scores& scores, const Config::Factors& f, const Strip& strip) {
  const int w = strip.warp, second = (w >> 1) & 1;
  score_block(scores.far, shared_address(w < 4 ? f.q_far[second] : f.k_far[second]), shared_address(f.c_far[w & 1]), strip.lane);
  score_half_block(scores.near, shared_address(second ? f.k_near[w >> 2] : f.q_near[w >> 2]), shared_address(f.c_near[w >> 2]), w & 1,
                   strip.lane);
}

// Eight columns of A_qk from accumulators: zero above the diagonal (select: factors may be infinite there).
__device__ __forceinline__ void store_A_qk(Config::Matrices& m, const float (&c)[4], int row, int column, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + (lane >> 2) + 8 * h, j = column + 2 * (lane & 3);
    *reinterpret_cast<uint32_t*>(m.A_qk + swizzle128(i, j >> 3) + 2 * (j & 7)) =
        pack_bf16(i >= j ? c[2 * h] : 0.0f, i >= j + 1 ? c[2 * h + 1] : 0.0f);
  }
}

__device__ __forceinline__ void store_A_kk(Config::Matrices& m, const float* s_beta, const float (&c)[4], int row, int column, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + (lane >> 2) + 8 * h, j = column + 2 * (lane & 3);
    *reinterpret_cast<float2*>(m.A_kk + matrix_at(i, j)) =
        make_float2(i > j ? s_beta[i] * c[2 * h] : 0.0f, i > j + 1 ? s_beta[i] * c[2 * h + 1] : 0.0f);
  }
}

__device__ __forceinline__ void store_scores(Config::Shared& s, const Scores& scores, const Strip& strip) {
  Config::Matrices& m = s.matrices;
  const int w = strip.warp, second = (w >> 1) & 1, lane = strip.lane;
  auto store = [&](bool of_q, const float(&c)[4], int row, int column) {
    if (of_q) {
      store_A_qk(m, c, row, column, lane);
    } else {
      store_A_kk(m, s.beta, c, row, column, lane);
    }
  };
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    store(w < 4, scores.far[n], 32 + 16 * second, 16 * (w & 1) + 8 * n);
    store((w & 1) == 0, scores.diagonal[n], 16 * (w >> 1), 16 * (w >> 1) + 8 * n);
  }
  store(second == 0, scores.near, 32 * (w >> 2) + 16, 32 * (w >> 2) + 8 * (w & 1));
}

// Above the diagonal blocks nothing is computed, and zeros are read.
__device__ __forceinline__ void clear_upper_blocks(Config::Matrices& m, const Strip& strip) {
  if (strip.warp >= 6) return;
  constexpr int kRow[6] = {0, 0, 0, 1, 1, 2}, kColumn[6] = {1, 2, 3, 2, 3, 3};
  int row = 0, column = 0;
#pragma unroll
  for (int i = 0; i < 6; ++i)
    if (i == strip.warp) row = kRow[i], column = kColumn[i];
  const int i = 16 * row + (strip.lane >> 1), piece = 2 * column + (strip.lane & 1);
  *reinterpret_cast<uint4*>(m.A_qk + swizzle128(i, piece)) = make_uint4(0, 0, 0, 0);
  float4* X = reinterpret_cast<float4*>(m.A_kk_inv + matrix_at(i, 8 * piece));
  X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// A_qk and (I + A_kk)^-1 Diag(beta) to memory, the tokens that exist.
__device__ __forceinline__ void write_matrices(const Config::Shared& s, uint8_t* operands, int length) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  uint8_t* A_qk = operands + kTileAqk * length * kTileRowBytes;
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

__device__ __forceinline__ void write_chunk_decay(const Config::Shared& s, float* chunk_decay) {
  if (threadIdx.x >= Config::kHeadDim) return;
  float total = 0.0f;
#pragma unroll
  for (int b = 0; b < Config::kStrips; ++b) total += s.strip_decay[b][threadIdx.x];
  chunk_decay[threadIdx.x] = exp2_fast(total);
}

__device__ __forceinline__ void prepare(Config::Shared& s, const ForwardParams& p, const ForwardWorkspace& w, const Chunk& chunk,
                                        int64_t head) {
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  const int64_t head_index = chunk.row * p.shape.HV + head;
  uint8_t* operands = workspace + w.operands + (head_index * p.shape.T + chunk.start) * kOperandBytes;
  Strip strip;
  strip.warp = threadIdx.x / 32;
  strip.lane = threadIdx.x % 32;
  strip.channel = Config::kChannels * strip.lane;
  strip.rows = min(max(chunk.length - Config::kStrip * strip.warp, 0), Config::kStrip);
  strip.token = chunk.row * p.shape.T + chunk.start + Config::kStrip * strip.warp;

  Rows q, k;
  DecayRows g;
  load_gate(g, p, strip, head);
  const int64_t qk_head = head / (p.shape.HV / p.shape.H);
  load_rows(q, p.q, p.shape.H, qk_head, strip);
  load_rows(k, p.k, p.shape.H, qk_head, strip);
  load_beta(s.beta, p, chunk, head);
  cumulate_decay(g, p, chunk.row, head, strip);
  publish_decay(s, g, strip);
  find_norms(s.norms[strip.warp], q, k, p.qk_l2norm, strip.lane);
  __syncthreads();  // all strips' decays and norms, before every warp reads them

  write_factors(s, operands, chunk.length, q, k, g, find_strip_decays(s, g, strip), strip);
  if (chunk.decay_slot >= 0)
    write_chunk_decay(s, reinterpret_cast<float*>(workspace + w.chunk_decay) + (head_index * w.decay_slots + chunk.decay_slot) * Config::kHeadDim);
  __syncthreads();  // all factors, before their readers
  Scores scores = {};
  multiply_factors(scores, s.factors, strip);
  const int block = strip.warp >> 1;
  if (s.spans_too_far[2 * block] || s.spans_too_far[2 * block + 1]) {
    pairwise_diagonal(scores.diagonal, s, q, k, g, strip);
  } else {
    const auto& diagonal = s.diagonal[block].factors;
    score_block(scores.diagonal, shared_address(strip.warp & 1 ? diagonal.k : diagonal.q), shared_address(diagonal.c), strip.lane);
  }
  __syncthreads();  // the factors have been read: their memory becomes the matrices
  clear_upper_blocks(s.matrices, strip);
  store_scores(s, scores, strip);
  __syncthreads();  // A_kk complete, before the substitution reads it
  if (threadIdx.x < kChunk) invert_diagonal_block(s.matrices.A_kk, s.matrices.A_kk_inv, threadIdx.x / 16, threadIdx.x % 16);
  __syncthreads();  // diagonal blocks of the inverse, before the merges
  merge_blocks(s.matrices.A_kk, s.matrices.A_kk_inv, strip.warp, strip.lane);
  __syncthreads();  // the whole inverse, before it is written out
  write_matrices(s, operands, chunk.length);
  __syncthreads();  // shared memory has been read, before the next chunk overwrites it
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
