// Raw inputs of a strip to its decayed operands and to the factors of the scores. With down the
// decay from the strip's start to a token and up the decay from the token to the strip's end, each
// of them is x down or k up times the decay between an end of the strip and a point of reference.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "sm90/chunk_prepare/inputs.cuh"

namespace jax_flashkda::chunk_prepare {

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
__device__ __forceinline__ void decay_of_rows(DecayRows& g,
                                              const GateCoefficients (&c)[Config::kChannels]) {
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] = log2_decay<kGate>(g[r][e], c[e]);
}

// Raw gate to the running sum of the log2 decay from the strip's start. Missing tokens decay
// nothing.
template <DType kGateType>
__device__ __forceinline__ void cumulate_decay(DecayRows& g, const Inputs<kGateType>& in,
                                               const Config::Shared::Scalars& s,
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
__device__ __forceinline__ float find_norms(const Rows& q, const Rows& k, bool qk_l2norm,
                                            int lane) {
  if (!qk_l2norm) return 1.0f;
  float squares[2 * Config::kStrip];
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    squares[r] = sum_of_squares(q[r]);
    squares[Config::kStrip + r] = sum_of_squares(k[r]);
  }
  return l2norm_factor(sum_over_lanes(squares, lane));
}
// By shuffles, not through shared memory, whose loads would have to wait behind every store of the
// row before.
__device__ __forceinline__ float norm_of_q(float norms, int r) {
  return __shfl_sync(0xffffffffu, norms, r);
}
__device__ __forceinline__ float norm_of_k(float norms, int r) {
  return __shfl_sync(0xffffffffu, norms, Config::kStrip + r);
}

// Tells the other warps how far the strip decays, and whether a reference point at its end can
// carry it.
__device__ __forceinline__ void publish_decay(Config::Shared& s, const DecayRows& g,
                                              const Strip& strip) {
  const float (&total)[4] = g[Config::kStrip - 1];
  *reinterpret_cast<float4*>(&s.strip_decay[strip.warp][strip.channel]) =
      make_float4(total[0], total[1], total[2], total[3]);
  bool far = false;
#pragma unroll
  for (int e = 0; e < 4; ++e) far |= !(total[e] >= -kLog2DecayHalfSpan);
  far = __any_sync(0xffffffffu, far);
  if (strip.lane == 0) s.spans_too_far[strip.warp] = far;
}

// The decays between the ends of the strip and the points its factors refer to, per channel of the
// lane.
struct StripDecays {
  float before[4];  // the chunk's decay ahead of the strip
  float after[4];   // the chunk's decay behind the strip
  float far[4];     // between the strip and the middle of the chunk
  float near[4];    // between the strip and the middle of its half
  float row[4];  // between the strip's start and the middle of its block: >= 1, against the decay,
                 // in a lower strip
  float column[4];  // between the strip's end and the middle of its block: >= 1 in an upper strip
};

// exp of the decay of strips first .. last - 1; the same range for the whole warp.
__device__ __forceinline__ void decay_between(float (&out)[4], const Config::Shared& s, int first,
                                              int last, int channel) {
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

__device__ __forceinline__ StripDecays find_strip_decays(const Config::Shared& s,
                                                         const DecayRows& g, const Strip& strip) {
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

// Predicated rather than branched around: the strips differ in what they store, and branches would
// keep rows apart.
__device__ __forceinline__ void put(uint32_t shared, uint2 value, bool wanted = true) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n@wanted st.shared.v2.b32 [%0], {%1, "
      "%2};\n}" ::"r"(shared),
      "r"(value.x), "r"(value.y), "r"(static_cast<int>(wanted))
      : "memory");
}
// Row r of a swizzled tile, from the lane's place in row 0: pieces move by an exclusive or.
__device__ __forceinline__ void put(uint8_t* tile, int r, uint2 value, bool wanted) {
  const uintptr_t to = (reinterpret_cast<uintptr_t>(tile) ^ (r << 4)) + r * kTileRowBytes;
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n@wanted st.global.v2.b32 [%0], {%1, "
      "%2};\n}" ::"l"(to),
      "r"(value.x), "r"(value.y), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ void choose(float (&out)[4], bool first, const float (&x)[4],
                                       const float (&y)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = first ? x[e] : y[e];
}

// Each token of the strip once: its decayed operands to memory, its score factors to shared memory.
__device__ __forceinline__ void write_factors(Config::Shared& s, uint8_t* operands, int length,
                                              const Rows& q, const Rows& k, float norms,
                                              const DecayRows& g, const StripDecays& d,
                                              const Strip& strip) {
  const int block = strip.warp >> 1, upper_half = strip.warp & 1;
  const bool far_row = block >= 2, near_row = block & 1;
  const uint32_t tiles =
      shared_address(s.factors[Config::first_tile(block)]) + 2048 * upper_half + 8 * strip.lane;
  const int64_t tile_bytes = length * kTileRowBytes;
  uint8_t* k_decayed = operands + (kTileKDecayed + (strip.lane >> 4)) * tile_bytes +
                       Config::kStrip * kTileRowBytes * strip.warp + 8 * (strip.lane & 15);
  uint8_t* q_decayed = k_decayed + (kTileQDecayed - kTileKDecayed) * tile_bytes;
  uint8_t* k_restored = k_decayed + (kTileKRestored - kTileKDecayed) * tile_bytes;
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    const float q_norm = norm_of_q(norms, r), k_norm = norm_of_k(norms, r);
    const float q_row[4] = {bf16_low(q[r].x), bf16_high(q[r].x), bf16_low(q[r].y),
                            bf16_high(q[r].y)};
    const float k_row[4] = {bf16_low(k[r].x), bf16_high(k[r].x), bf16_low(k[r].y),
                            bf16_high(k[r].y)};
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

__device__ __forceinline__ uint32_t factor_tile(const Config::Shared& s, int block,
                                                Config::Factor factor) {
  return shared_address(s.factors[Config::first_tile(block) + factor]);
}

__device__ __forceinline__ void write_chunk_decay(const Config::Shared& s, float* chunk_decay) {
  if (threadIdx.x >= Config::kHeadDim) return;
  float total = 0.0f;
#pragma unroll
  for (int b = 0; b < Config::kStrips; ++b) total += s.strip_decay[b][threadIdx.x];
  chunk_decay[threadIdx.x] = exp2_fast(total);
}

}  // namespace jax_flashkda::chunk_prepare
