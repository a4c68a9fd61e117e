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

#include <type_traits>

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

using Rows = uint2[Config::kStrip];                         // a lane's 4 channels of its strip's tokens, bf16
using DecayRows = float[Config::kStrip][Config::kChannels];  // the same of the log2 decay

__device__ __forceinline__ int64_t query_head(const ForwardShape& shape, int64_t value_head) {
  return static_cast<uint32_t>(value_head) / (static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H));
}

// What a warp knows of the strip it owns.
struct Strip {
  int warp, lane, channel;
  int rows;       // tokens that exist, 0 .. 8
  int64_t token;  // row * T + first token of the strip
};

__device__ __forceinline__ Strip strip_of(const ForwardShape& shape, const Chunk& chunk) {
  Strip strip;
  strip.warp = threadIdx.x / 32;
  strip.lane = threadIdx.x % 32;
  strip.channel = Config::kChannels * strip.lane;
  strip.rows = min(max(chunk.length - Config::kStrip * strip.warp, 0), Config::kStrip);
  strip.token = static_cast<int64_t>(chunk.row) * shape.T + chunk.start + Config::kStrip * strip.warp;
  return strip;
}

// What a thread reads for a chunk, as it comes from memory: loaded while the chunk before is still being worked on.
template <DType kGateType>
struct Inputs {
  using GateWord = std::conditional_t<kGateType == DType::kBF16, uint2, uint4>;  // 4 channels
  Rows q, k;
  GateWord g[Config::kStrip];
  uint32_t scalar;  // threads 0 .. 127: dt_bias of that channel; 128 .. 191: beta of a token; 192: A_log
};

template <class Word>
__device__ __forceinline__ void load_rows(Word (&x)[Config::kStrip], const void* base, int64_t row, int64_t heads, int channel, int rows) {
  constexpr int kBytes = sizeof(Word) / Config::kChannels;
  const char* from = static_cast<const char*>(base) + (row * Config::kHeadDim + channel) * kBytes;
  const int64_t stride = heads * Config::kHeadDim * kBytes;
  if (rows == Config::kStrip) {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      x[r] = load_early(reinterpret_cast<const Word*>(from));
      from += stride;
      asm volatile("" : "+l"(from));  // one running pointer: eight of them at once would not fit beside the loads
    }
  } else {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      x[r] = Word{};
      if (r < rows) x[r] = load_early(reinterpret_cast<const Word*>(from));
      from += stride;
      asm volatile("" : "+l"(from));
    }
  }
}

__device__ __forceinline__ uint32_t load_scalar(const ForwardParams& p, const Chunk& chunk, int64_t head) {
  const int64_t gate_head = int64_t{chunk.row} * p.shape.HV + head;
  const int thread = threadIdx.x, token = thread - Config::kHeadDim;
  if (chunk.length == 0) return 0;
  if (token < 0) return p.dt_bias != nullptr ? load_early(reinterpret_cast<const uint32_t*>(p.dt_bias + gate_head * Config::kHeadDim + thread)) : 0;
  if (token == kChunk) return p.A_log != nullptr ? load_early(reinterpret_cast<const uint32_t*>(p.A_log + gate_head)) : 0;
  if (token >= chunk.length) return 0;
  const int64_t at = (int64_t{chunk.row} * p.shape.T + chunk.start + token) * p.shape.HV + head;
  if (p.beta_dtype == DType::kBF16) return load_early(static_cast<const uint16_t*>(p.beta) + at);
  return load_early(static_cast<const uint32_t*>(p.beta) + at);
}

__device__ __forceinline__ void publish_scalar(Config::Shared::Scalars& s, uint32_t scalar, const ForwardParams& p, int length) {
  const int thread = threadIdx.x, token = thread - Config::kHeadDim;
  if (token < 0) {
    s.dt_bias[thread] = __uint_as_float(scalar);
  } else if (token < kChunk) {
    const float beta = __uint_as_float(p.beta_dtype == DType::kBF16 ? scalar << 16 : scalar);
    s.beta[token] = token < length ? beta_value(beta, p.beta_is_logits, p.allow_neg_eigval) : 0.0f;
  } else if (token == kChunk) {
    s.amplitude = expf(__uint_as_float(scalar));
  }
}

template <DType kGateType>
__device__ __forceinline__ void load_inputs(Inputs<kGateType>& in, const ForwardParams& p, const Chunk& chunk, int64_t head) {
  const Strip strip = strip_of(p.shape, chunk);
  const int64_t qk_row = strip.token * p.shape.H + query_head(p.shape, head);
  in.scalar = load_scalar(p, chunk, head);
  load_rows(in.g, p.g, strip.token * p.shape.HV + head, p.shape.HV, strip.channel, strip.rows);
  load_rows(in.k, p.k, qk_row, p.shape.H, strip.channel, strip.rows);
  load_rows(in.q, p.q, qk_row, p.shape.H, strip.channel, strip.rows);
}

__device__ __forceinline__ void unpack_gate(float (&g)[4], uint2 x) {
  g[0] = bf16_low(x.x);
  g[1] = bf16_high(x.x);
  g[2] = bf16_low(x.y);
  g[3] = bf16_high(x.y);
}
__device__ __forceinline__ void unpack_gate(float (&g)[4], uint4 x) {
  g[0] = __uint_as_float(x.x);
  g[1] = __uint_as_float(x.y);
  g[2] = __uint_as_float(x.z);
  g[3] = __uint_as_float(x.w);
}

template <Gate kGate>
__device__ __forceinline__ void decay_of_rows(DecayRows& g, const GateCoefficients (&c)[Config::kChannels]) {
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] = log2_decay<kGate>(g[r][e], c[e]);
}

// Raw gate to the running sum of the log2 decay from the strip's start. Missing tokens decay nothing.
template <DType kGateType>
__device__ __forceinline__ void cumulate_decay(DecayRows& g, const Inputs<kGateType>& in, const Config::Shared::Scalars& s,
                                               const ForwardParams& p, const Strip& strip) {
  float dt_bias[4];
  unpack_gate(dt_bias, *reinterpret_cast<const uint4*>(&s.dt_bias[strip.channel]));
  GateCoefficients c[Config::kChannels];
#pragma unroll
  for (int e = 0; e < Config::kChannels; ++e)
    c[e] = gate_coefficients(p.gate, s.amplitude, dt_bias[e], p.gate_lower_bound);
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) unpack_gate(g[r], in.g[r]);
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

// The factor of row lane % 8, of q in lanes 0 .. 7 (and 16 ..), of k in lanes 8 .. 15.
__device__ __forceinline__ float find_norms(const Rows& q, const Rows& k, bool qk_l2norm, int lane) {
  if (!qk_l2norm) return 1.0f;
  float squares[2 * Config::kStrip];
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    squares[r] = sum_of_squares(q[r]);
    squares[Config::kStrip + r] = sum_of_squares(k[r]);
  }
  return l2norm_factor(sum_over_lanes(squares, lane));
}
// By shuffles, not through shared memory, whose loads would have to wait behind every store of the row before.
__device__ __forceinline__ float norm_of_q(float norms, int r) { return __shfl_sync(0xffffffffu, norms, r); }
__device__ __forceinline__ float norm_of_k(float norms, int r) { return __shfl_sync(0xffffffffu, norms, Config::kStrip + r); }

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

// exp of the decay of strips first .. last - 1; the same range for the whole warp.
__device__ __forceinline__ void decay_between(float (&out)[4], const Config::Shared& s, int first, int last, int channel) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int b = first; b < last; ++b) {
    const float4 total = *reinterpret_cast<const float4*>(&s.strip_decay[b][channel]);
    sum = make_float4(sum.x + total.x, sum.y + total.y, sum.z + total.z, sum.w + total.w);
  }
  out[0] = exp2_fast(sum.x);
  out[1] = exp2_fast(sum.y);
  out[2] = exp2_fast(sum.z);
  out[3] = exp2_fast(sum.w);
}

__device__ __forceinline__ StripDecays find_strip_decays(const Config::Shared& s, const DecayRows& g, const Strip& strip) {
  StripDecays d;
  const int w = strip.warp, near = w < 4 ? 2 : 6;  // the first strip behind the middle of the half
  decay_between(d.before, s, 0, w, strip.channel);
  decay_between(d.after, s, w + 1, Config::kStrips, strip.channel);
  decay_between(d.far, s, w < 4 ? w + 1 : 4, w < 4 ? 4 : w, strip.channel);
  decay_between(d.near, s, w < near ? w + 1 : near, w < near ? near : w, strip.channel);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float rise = exp2_fast(-g[Config::kStrip - 1][e]);
    d.row[e] = w & 1 ? 1.0f : rise;
    d.column[e] = w & 1 ? rise : 1.0f;
  }
  return d;
}

__device__ __forceinline__ uint2 pack4(const float (&x)[4], const float (&y)[4]) {
  return make_uint2(pack_bf16(x[0] * y[0], x[1] * y[1]), pack_bf16(x[2] * y[2], x[3] * y[3]));
}

// Predicated rather than branched around: the strips differ in what they store, and branches would keep rows apart.
__device__ __forceinline__ void put(uint32_t shared, uint2 value, bool wanted = true) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n@wanted st.shared.v2.b32 [%0], {%1, %2};\n}" ::"r"(shared),
               "r"(value.x), "r"(value.y), "r"(static_cast<int>(wanted))
               : "memory");
}
// Row r of a swizzled tile, from the lane's place in row 0: pieces move by an exclusive or.
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
__device__ __forceinline__ void write_factors(Config::Shared& s, uint8_t* operands, int length, const Rows& q, const Rows& k, float norms,
                                              const DecayRows& g, const StripDecays& d, const Strip& strip) {
  const int block = strip.warp >> 1, upper_half = strip.warp & 1;
  const bool far_row = block >= 2, near_row = block & 1;
  const uint32_t tiles = shared_address(s.factors[Config::first_tile(block)]) + 2048 * upper_half + 8 * strip.lane;
  const int64_t tile_bytes = length * kTileRowBytes;
  uint8_t* k_decayed = operands + (kTileKDecayed + (strip.lane >> 4)) * tile_bytes + Config::kStrip * kTileRowBytes * strip.warp + 8 * (strip.lane & 15);
  uint8_t* q_decayed = k_decayed + (kTileQDecayed - kTileKDecayed) * tile_bytes;
  uint8_t* k_restored = k_decayed + (kTileKRestored - kTileKDecayed) * tile_bytes;
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    const float q_norm = norm_of_q(norms, r), k_norm = norm_of_k(norms, r);
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
    const uint32_t at = (tiles ^ (r << 4)) + r * 256;
    put(at + Config::kFarQ * kTileBytes, pack4(q_down, d.far), far_row);
    put(at + Config::kFarK * kTileBytes, pack4(far, d.far));
    put(at + Config::kNearQ * kTileBytes, pack4(q_down, d.near), near_row);
    put(at + Config::kNearK * kTileBytes, pack4(near, d.near));
    put(at + Config::kDiagonalQ * kTileBytes, pack4(q_down, d.row));
    put(at + Config::kDiagonalK * kTileBytes, pack4(k_down, d.row));
    put(at + Config::kDiagonalC * kTileBytes, pack4(k_up, d.column));
  }
}

__device__ __forceinline__ uint32_t factor_tile(const Config::Shared& s, int block, Config::Factor factor) {
  return shared_address(s.factors[Config::first_tile(block) + factor]);
}

// A diagonal block whose decay no single reference point can carry. Two warps: one sums the scores of q, the other those of k.
__device__ __forceinline__ void pairwise_diagonal(float (&acc)[2][4], Config::Shared& s, const Rows& q, const Rows& k,
                                                  float norms, const DecayRows& g, const Strip& strip) {
  const int block = strip.warp >> 1, upper_half = strip.warp & 1;
  const uint32_t barrier = 1 + block;
  PairwiseScratch& scratch = *reinterpret_cast<PairwiseScratch*>(s.factors[Config::first_tile(block) + Config::kDiagonalQ]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    named_barrier(barrier, 64);  // the two warps have read what is there, before it is overwritten
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      const float a = norm_of_q(norms, r), b = norm_of_k(norms, r);
      if ((strip.lane >> 4) == half) {
        const int to = pairwise_at(Config::kStrip * upper_half + r, 4 * (strip.lane & 15));
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

__device__ __forceinline__ void multiply_far_and_near(Scores& scores, const Config::Shared& s, const Strip& strip) {
  const int w = strip.warp, second = (w >> 1) & 1, pair = w >> 2;
  score_block(scores.far, factor_tile(s, 2 + second, w < 4 ? Config::kFarQ : Config::kFarK), factor_tile(s, w & 1, Config::kFarK),
              strip.lane);
  score_half_block(scores.near, factor_tile(s, 2 * pair + 1, second ? Config::kNearK : Config::kNearQ),
                   factor_tile(s, 2 * pair, Config::kNearK), w & 1, strip.lane);
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

__device__ __forceinline__ void store_scores(Config::Shared& s, const float* s_beta, const Scores& scores, const Strip& strip) {
  Config::Matrices& m = s.matrices;
  const int w = strip.warp, second = (w >> 1) & 1, lane = strip.lane;
  auto store = [&](bool of_q, const float(&c)[4], int row, int column) {
    if (of_q) {
      store_A_qk(m, c, row, column, lane);
    } else {
      store_A_kk(m, s_beta, c, row, column, lane);
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
__device__ __forceinline__ void write_matrices(const Config::Shared& s, const float* s_beta, uint8_t* operands, int length) {
  uint8_t* A_kk_inv = operands + kTileAkkInv * length * kTileRowBytes;
  uint8_t* A_qk = operands + kTileAqk * length * kTileRowBytes;
#pragma unroll
  for (int n = 0; n < kChunk * 8 / Config::kThreads; ++n) {
    const int at = threadIdx.x + n * Config::kThreads, row = at >> 3, piece = at & 7;
    if (row >= length) continue;
    const float4* X = reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
    const float4* beta = reinterpret_cast<const float4*>(s_beta + 8 * piece);
    const float4 x0 = X[0], x1 = X[1], b0 = beta[0], b1 = beta[1];
    *reinterpret_cast<uint4*>(A_kk_inv + swizzle128(row, piece)) =
        make_uint4(pack_bf16(x0.x * b0.x, x0.y * b0.y), pack_bf16(x0.z * b0.z, x0.w * b0.w), pack_bf16(x1.x * b1.x, x1.y * b1.y),
                   pack_bf16(x1.z * b1.z, x1.w * b1.w));
    *reinterpret_cast<uint4*>(A_qk + 16 * at) = *reinterpret_cast<const uint4*>(s.matrices.A_qk + 16 * at);
  }
}

__device__ __forceinline__ void clear_output(const ForwardParams& p, const Chunk& chunk, int64_t head) {
  for (int at = threadIdx.x; at < chunk.length * 16; at += Config::kThreads) {
    const int64_t token = int64_t{chunk.row} * p.shape.T + chunk.start + (at >> 4);
    reinterpret_cast<uint4*>(p.o)[(token * p.shape.HV + head) * 16 + (at & 15)] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void write_chunk_decay(const Config::Shared& s, float* chunk_decay) {
  if (threadIdx.x >= Config::kHeadDim) return;
  float total = 0.0f;
#pragma unroll
  for (int b = 0; b < Config::kStrips; ++b) total += s.strip_decay[b][threadIdx.x];
  chunk_decay[threadIdx.x] = exp2_fast(total);
}

// The first half: inputs to factors to scores, decayed operands to memory. The matrices are in shared memory behind it.
template <DType kGateType>
__device__ __forceinline__ void find_scores(Config::Shared& s, const Inputs<kGateType>& in, const ForwardParams& p,
                                            const ForwardWorkspace& w, const Chunk& chunk, int64_t head, int turn, uint8_t* operands) {
  const Strip strip = strip_of(p.shape, chunk);
  DecayRows g;
  cumulate_decay(g, in, s.scalars[turn], p, strip);
  publish_decay(s, g, strip);
  const float norms = find_norms(in.q, in.k, p.qk_l2norm, strip.lane);
  __syncthreads();  // all strips' decays, before every warp reads them

  write_factors(s, operands, chunk.length, in.q, in.k, norms, g, find_strip_decays(s, g, strip), strip);
  if (chunk.decay_slot >= 0) {
    const int64_t slot = (int64_t{chunk.row} * p.shape.HV + head) * w.decay_slots + chunk.decay_slot;
    write_chunk_decay(s, reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + w.chunk_decay) + slot * Config::kHeadDim);
  }
  __syncthreads();  // all factors, before their readers
  Scores scores = {};
  multiply_far_and_near(scores, s, strip);
  const int block = strip.warp >> 1;
  if (s.spans_too_far[2 * block] || s.spans_too_far[2 * block + 1]) {
    pairwise_diagonal(scores.diagonal, s, in.q, in.k, norms, g, strip);
  } else {
    score_block(scores.diagonal, factor_tile(s, block, strip.warp & 1 ? Config::kDiagonalK : Config::kDiagonalQ),
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
  if (threadIdx.x < kChunk) invert_diagonal_block(s.matrices.A_kk, s.matrices.A_kk_inv, threadIdx.x / 16, threadIdx.x % 16);
  __syncthreads();  // diagonal blocks of the inverse, before the merges
  merge_blocks(s.matrices.A_kk, s.matrices.A_kk_inv, warp, lane);
  __syncthreads();  // the whole inverse, before it is written out
  write_matrices(s, s.scalars[turn].beta, operands, length);
}

// The CTA's share of the items: it counts through the heads of a chunk, then the chunks, in steps of the grid's size, which
// are a fixed number of each.
struct Items {
  const ForwardParams& p;
  const ForwardWorkspace& w;
  uint32_t heads, chunks, index, head;

  __device__ Items(const ForwardParams& params, const ForwardWorkspace& workspace) : p(params), w(workspace) {
    const uint8_t* bytes = static_cast<const uint8_t*>(p.workspace);
    const bool table = p.shape.has_segment_ids;
    const int64_t most = table ? p.shape.B * p.shape.T : p.shape.B * ((p.shape.T + kChunk - 1) / kChunk);  // below 2^31
    chunks = static_cast<uint32_t>(table ? clamp_to<int64_t>(reinterpret_cast<const TableCounts*>(bytes + w.counts)->chunks, 0, most) : most);
    heads = static_cast<uint32_t>(p.shape.HV);
    index = blockIdx.x / heads;
    head = blockIdx.x % heads;
  }
  __device__ bool left() const { return index < chunks; }
  __device__ Chunk chunk() const {
    if (!p.shape.has_segment_ids) return chunk_without_table(p.shape, index);
    const ChunkEntry* entries = reinterpret_cast<const ChunkEntry*>(static_cast<const uint8_t*>(p.workspace) + w.chunk_table);
    return chunk_from_entry(p.shape, entries[index]);
  }
  __device__ void advance() {
    index += gridDim.x / heads;
    head += gridDim.x % heads;
    if (head < heads) return;
    head -= heads;
    ++index;
  }
  // The next chunk that is not padding; the output of padding is cleared on the way.
  __device__ Chunk next_segment_chunk() {
    for (; left(); advance()) {
      const Chunk found = chunk();
      if (!found.padding) return found;
      clear_output(p, found, head);
    }
    return {};
  }
};

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    chunk_prepare_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ uint8_t shared_bytes[];
  Config::Shared& s = *reinterpret_cast<Config::Shared*>(shared_bytes);
  Items items(p, w);
  Chunk chunk = items.next_segment_chunk();
  Inputs<kGateType> in;
  load_inputs(in, p, chunk, items.head);
  publish_scalar(s.scalars[0], in.scalar, p, chunk.length);
  for (int turn = 0; items.left(); turn ^= 1) {
    __syncthreads();  // the chunk's scalars are there, and the last chunk's matrices have been read
    const int64_t head = items.head, operand_row = (int64_t{chunk.row} * p.shape.HV + head) * p.shape.T + chunk.start;
    const int length = chunk.length;
    uint8_t* operands = static_cast<uint8_t*>(p.workspace) + w.operands + operand_row * kOperandBytes;
    find_scores(s, in, p, w, chunk, head, turn, operands);
    items.advance();
    chunk = items.next_segment_chunk();
    load_inputs(in, p, chunk, items.head);  // on their way while the matrices are inverted; of no chunk nothing is read
    invert(s, length, turn, operands);
    publish_scalar(s.scalars[turn ^ 1], in.scalar, p, chunk.length);
  }
}

}  // namespace jax_flashkda::chunk_prepare
