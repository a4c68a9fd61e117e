// Raw inputs of a block to its decayed operands and to the factors of the scores, in the registers
// that the products take them from. Relative to its block's references a token has three exponents:
// of its row factor, of its column factor, and of what the state takes of it at the chunk's end.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "sm90/chunk_prepare/inputs.cuh"

namespace jax_flashkda::chunk_prepare {

// Of a warp's 16 tokens and 64 channels, eight channels at a time. As they come: tokens 2 t, 2 t + 1,
// 2 t + 8, 2 t + 9 of channel lane / 4, t = lane % 4 (the columns of a product's right operand). Summed:
// elements of an accumulator, tokens lane / 4 (and 8 behind) of channels 2 t and 2 t + 1.
using BlockDecays = float[Config::kEighths][4];

template <DType kGateType>
__device__ __forceinline__ void load_gate(BlockDecays& g, const Config::Shared& s,
                                          const ForwardParams& p, const Item& item,
                                          const Place& at) {
  if constexpr (kGateType == DType::kBF16) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t x[4];
      load_matrices_transposed(x, at.address(s.g, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        g[2 * step + i / 2][2 * (i % 2)] = bf16_low(x[i]);
        g[2 * step + i / 2][2 * (i % 2) + 1] = bf16_high(x[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = min(at.token(i), item.length - 1);  // one that exists in any case
      const uint32_t* row = static_cast<const uint32_t*>(p.g) +
                            (item.value_row + token * p.shape.HV) * Config::kHeadDim +
                            Config::kChannels * at.half + at.row();
#pragma unroll
      for (int j = 0; j < Config::kEighths; ++j) g[j][i] = __uint_as_float(load_early(row + 8 * j));
    }
  }
}

template <Gate kGate>
__device__ __forceinline__ void decay_of_tokens(BlockDecays& g, const Config::Shared& s,
                                                float slope, float amplitude, const Place& at) {
  const float* dt_bias = &s.dt_bias[Config::kChannels * at.half + at.row()];
#pragma unroll
  for (int j = 0; j < Config::kEighths; ++j) {
    const GateCoefficients c = {slope, slope * dt_bias[8 * j], amplitude};
#pragma unroll
    for (int i = 0; i < 4; ++i) g[j][i] = log2_decay<kGate>(g[j][i], c);
  }
}

// Running sums over a block's tokens by tensor cores: a product with ones on and below the diagonal,
// for eight tokens each. Its lower rows are all ones, so there stands what the later tokens add to.
// The two terms of a decay keep all but its last bits.
__device__ __forceinline__ void sum_over_tokens(BlockDecays& g, const Place& at) {
  const int row = at.row(), token = 2 * at.quarter();
  const auto one_if = [](bool condition) { return condition ? 0x3f800000u : 0u; };
  // Columns of the ones in the order that a lane has its tokens in.
  const uint32_t ones[4] = {one_if(row >= token), one_if(true), one_if(row > token), one_if(true)};
#pragma unroll
  for (int j = 0; j < Config::kEighths; ++j) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(g[j][i], high[i], low[i]);
    float first[4], second[4];
    mma_tf32_first(first, ones, {low[0], low[1]});
    mma_tf32_first(second, ones, {low[2], low[3]});
    mma_tf32(first, ones, {high[0], high[1]});
    mma_tf32(second, ones, {high[2], high[3]});
    g[j][0] = first[0];
    g[j][1] = first[1];
    g[j][2] = first[2] + second[0];
    g[j][3] = first[3] + second[1];
  }
}

// Raw gate to the running sums of the log2 decay from the block's start. Missing tokens decay
// nothing.
template <DType kGateType>
__device__ __forceinline__ void cumulate_decay(BlockDecays& g, const Config::Shared& s,
                                               const ForwardParams& p, const Item& item,
                                               const Place& at) {
  load_gate<kGateType>(g, s, p, item, at);
  const GateCoefficients c =
      gate_coefficients(p.gate, exp2_fast(s.A_log * kLog2E), 0.0f, p.gate_lower_bound);
  if (p.gate == Gate::kSoftplus) {
    decay_of_tokens<Gate::kSoftplus>(g, s, c.slope, c.amplitude, at);
  } else if (p.gate == Gate::kBounded) {
    decay_of_tokens<Gate::kBounded>(g, s, c.slope, c.amplitude, at);
  } else {
    decay_of_tokens<Gate::kLogDecay>(g, s, c.slope, c.amplitude, at);
  }
  if (item.length < kBlock * (at.block + 1)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = at.token(i) < item.length;
#pragma unroll
      for (int j = 0; j < Config::kEighths; ++j) g[j][i] = exists ? g[j][i] : 0.0f;
    }
  }
  sum_over_tokens(g, at);
}

// The decays of a warp's block to shared memory: its first half's and the whole.
__device__ __forceinline__ void publish_decay(Config::Shared& s, const BlockDecays& g,
                                              const Place& at) {
  if (at.row() != 7) return;  // else the lane has neither token 7 nor token 15
#pragma unroll
  for (int j = 0; j < Config::kEighths; ++j)
    *reinterpret_cast<float4*>(&s.block_decay[at.block][at.channel(j)]) =
        make_float4(g[j][0], g[j][2], g[j][1], g[j][3]);
}

// What 16 tokens of q (which: 0) or k (1) are multiplied by, a warp: sums of squares are the diagonal
// of x x^T. No branch, so that other work goes on beside it.
__device__ __forceinline__ void find_norms(Config::Shared& s, bool normalise, int block, int which,
                                           int lane) {
  float first[2][4] = {}, second[2][4] = {};  // rows 0 .. 7 and 8 .. 15 of the columns
#pragma unroll
  for (int half = 0; half < Config::kHalves; ++half) {
    const Place at = {block, half, lane};
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t x[4];
      load_matrices(x, at.address(which ? s.k : s.q, step));
      // As the left operand's registers lie, those of the right one are no pair.
      mma_bf16_half(first[0], x[0], x[1], x[0]);
      mma_bf16_half(second[0], x[0], x[1], x[1]);
      mma_bf16_half(first[1], x[2], x[3], x[2]);
      mma_bf16_half(second[1], x[2], x[3], x[3]);
    }
  }
  const int row = lane >> 2, odd = row & 1;
  const float upper = odd ? first[0][1] + first[1][1] : first[0][0] + first[1][0],
              lower = odd ? second[0][3] + second[1][3] : second[0][2] + second[1][2];
  if ((lane & 3) == row >> 1) {  // else the lane holds nothing of the diagonal
    float (*norms)[2] = s.norms + kBlock * block;
    norms[row][which] = normalise ? l2norm_factor(upper) : 1.0f;
    norms[row + 8][which] = normalise ? l2norm_factor(lower) : 1.0f;
  }
}

// 2^exponent of a whole number <= 0; zero below the smallest normal number.
__device__ __forceinline__ uint16_t power_bf16(float exponent) {
  return static_cast<uint16_t>(pack_bf16(exp2_fast(exponent), 0.0f));
}

// Where the lanes of a product look for a channel's power: channels 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of
// 16 stand side by side.
__device__ __forceinline__ int channel_place(int channel) {
  return (channel & ~15) + 4 * (channel % 8 / 2) + 2 * (channel / 8 % 2) + channel % 2;
}
__device__ __forceinline__ uint2 load_powers(const uint16_t (&powers)[Config::kHeadDim], int step,
                                             const Place& at) {
  return *reinterpret_cast<const uint2*>(
      &powers[Config::kChannels * at.half + 16 * step + 4 * at.quarter()]);
}

// The nearest whole number, of numbers below 2^22.
__device__ __forceinline__ float nearest_whole(float x) {
  constexpr float kHalfUlpOne = 12582912.0f;  // 1.5 2^23: whole numbers are what it can hold
  return __fadd_rn(__fadd_rn(x, kHalfUlpOne), -kHalfUlpOne);
}

// From the decays of the blocks to everything of References, two threads a channel: one stores
// offsets and returns the chunk's decay, the other powers.
//
// A power between two blocks may underflow only where the decay between the blocks does not
// matter either: rows before a block's middle and columns behind it grow, and were both far from
// their references, the scores beside the blocks' common border would be lost. Such a block takes
// the other references.
__device__ __forceinline__ float find_references(Config::Shared& s, int channel, bool powers) {
  constexpr float kSmallest = -126.0f, kNegligible = -24.0f;  // powers of two
  Config::References& ref = s.references;
  float row[Config::kBlocks], column[Config::kBlocks], begin[Config::kBlocks], end[Config::kBlocks],
      start = 0.0f;
#pragma unroll
  for (int b = 0; b < Config::kBlocks; ++b) {
    const float first_half = s.block_decay[b][channel].x, whole = s.block_decay[b][channel].y;
    begin[b] = start;
    end[b] = start + whole;
    bool near = first_half >= -kLog2DecayHalfSpan && whole - first_half >= -kLog2DecayHalfSpan;
    row[b] = nearest_whole(start + first_half);
#pragma unroll
    for (int earlier = 0; earlier < b; ++earlier)
      near &= !(row[b] - column[earlier] < kSmallest && start - end[earlier] > kNegligible);
    column[b] = row[b];
    if (!near) {
      row[b] = nearest_whole(start);
      column[b] = nearest_whole(end[b]);
      ref.too_far[b][channel / Config::kChannels] = true;
    }
    start = end[b];
  }
  if (powers) {
    const int place = channel_place(channel);
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      ref.before[b][place] = power_bf16(row[b]);
#pragma unroll
      for (int earlier = 0; earlier < b; ++earlier)
        ref.between[Config::pair(b, earlier)][place] = power_bf16(row[b] - column[earlier]);
    }
  } else {
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      ref.row_offset[b][channel] = begin[b] - row[b];
      ref.column_offset[b][channel] = column[b] - row[b];
      ref.half_rest[b][channel] = exp2_fast(0.5f * (start - column[b]));
    }
  }
  return start;
}

// Exact but for underflow, y being powers of two.
__device__ __forceinline__ void scale(uint32_t (&scaled)[4], const uint32_t (&x)[4],
                                      const uint2& powers) {
#pragma unroll
  for (int i = 0; i < 4; ++i) scaled[i] = multiply_bf16(x[i], i < 2 ? powers.x : powers.y);
}

// Factors of 16 channels as operands of products: token lane / 4 of channels 2 t and 2 t + 1. As a left
// operand (rows), then 8 tokens further, then both 8 channels further; as a right one (columns), 8
// channels further, then both 8 tokens further.
using StepFactor = uint32_t[4];

// What a warp keeps for the products with earlier blocks: x exp(G - row reference).
struct RowFactors {
  StepFactor q[Config::kSteps], k[Config::kSteps];
};
struct ColumnFactors {
  StepFactor k;         // k exp(column reference - G)
  StepFactor restored;  // k exp(G_C - G)
};

__device__ __forceinline__ void find_factors(StepFactor& row_q, StepFactor& row_k,
                                             ColumnFactors& column_factors, const Config::Shared& s,
                                             const BlockDecays& G, const float2 (&norms)[2],
                                             int step, const Place& at) {
  const Config::References& ref = s.references;
  uint32_t q[4], k[4];
  load_matrices(q, at.address(s.q, step));
  load_matrices(k, at.address(s.k, step));
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int j = 2 * step + n, channel = at.channel(j);
    auto load2 = [&](const float (&from)[Config::kBlocks][Config::kHeadDim]) {
      return *reinterpret_cast<const float2*>(&from[at.block][channel]);
    };
    const float2 row = load2(ref.row_offset), column = load2(ref.column_offset),
                 half_rest = load2(ref.half_rest);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 2 * n + h;
      const float x = row.x + G[j][2 * h], y = row.y + G[j][2 * h + 1];
      const float row_x = exp2_fast(x), row_y = exp2_fast(y);
      const float q_x = bf16_low(q[i]) * norms[h].x, q_y = bf16_high(q[i]) * norms[h].x,
                  k_x = bf16_low(k[i]) * norms[h].y, k_y = bf16_high(k[i]) * norms[h].y;
      row_q[i] = pack_bf16(q_x * row_x, q_y * row_y);
      row_k[i] = pack_bf16(k_x * row_x, k_y * row_y);
      const float column_x = k_x * exp2_fast(column.x - x),
                  column_y = k_y * exp2_fast(column.y - y);
      column_factors.k[2 * h + n] = pack_bf16(column_x, column_y);
      // In two steps: neither underflows where the whole does not matter.
      column_factors.restored[i] =
          pack_bf16(column_x * half_rest.x * half_rest.x, column_y * half_rest.y * half_rest.y);
    }
  }
}

// The column factors to their place, and what the state stage reads to where the inputs were: the
// same lanes have read those.
__device__ __forceinline__ void store_factors(Config::Shared& s, const StepFactor& row_q,
                                              const StepFactor& row_k, const ColumnFactors& columns,
                                              int step, const Place& at) {
  const uint2 before = load_powers(s.references.before[at.block], step, at);
  StepFactor q_decayed, k_decayed;
  scale(q_decayed, row_q, before);
  scale(k_decayed, row_k, before);
  store_matrices(at.column_address(s.columns, at.block, step), columns.k);
  store_matrices(at.address(s.q, step), q_decayed);
  store_matrices(at.address(s.k, step), k_decayed);
  store_matrices(at.address(s.g, step), columns.restored);
}

}  // namespace jax_flashkda::chunk_prepare
