// Raw inputs of a block of 16 tokens to its scores, in the registers of one warp. Sums over the
// channels may take these in any order, so a lane reads whole pieces of 16 bytes: of channels
// 64 half + 32 e + 8 t + m (e = 0, 1; m = 0 .. 7; t = lane % 4), of tokens lane / 4 and 8 behind.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "core/mma.cuh"
#include "sm90/short_segments/items.cuh"

namespace jax_flashkda::short_segments {

struct Place {
  int lane;
  __device__ int row() const { return lane >> 2; }
  __device__ int quarter() const { return lane & 3; }
  // How far element i of the n-th eight columns of a 16 x 16 accumulator is below its diagonal.
  __device__ int below_diagonal(int n, int i) const {
    return row() + 8 * (i / 2) - 8 * n - 2 * quarter() - i % 2;
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

using BlockScores = float[2][4];   // eights of columns, elements of an accumulator
using Rows = uint4[2][2];          // of a lane: tokens, pieces e
using Exponents = float[8][4];     // of a lane: m, then element 2 (token) + e
using StepFactor = uint32_t[4];    // as an operand of a product over 16 channels

// Log2 decay of a half's channels, as the columns of a product's right operand: of tokens t, t + 4,
// t + 8, t + 12 and channels 64 half + 32 (row % 2) + 8 (row / 2) + m. Missing tokens decay nothing.
template <DType kGateType>
__device__ __forceinline__ void load_decay(Exponents& g, const ForwardParams& p, const Item& item,
                                           int block, int half, const Place& at) {
  const int channel = Config::kChannels * half + 32 * (at.row() & 1) + 8 * (at.row() >> 1);
  const int left = item.length - kBlock * block;  // tokens, from the block's first
  float bias[8] = {};
  if (p.dt_bias != nullptr) {
    const float4* from = reinterpret_cast<const float4*>(
        p.dt_bias + int64_t{item.gate_row} * Config::kHeadDim + channel);
    const float4 low = __ldg(from), high = __ldg(from + 1);
    bias[0] = low.x, bias[1] = low.y, bias[2] = low.z, bias[3] = low.w;
    bias[4] = high.x, bias[5] = high.y, bias[6] = high.z, bias[7] = high.w;
  }
  const float amplitude = p.A_log != nullptr ? exp2_fast(__ldg(p.A_log + item.gate_row) * kLog2E)
                                             : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = kBlock * block + min(at.quarter() + 4 * i, left - 1);
    const int64_t from =
        (item.value_row + token * p.shape.HV) * Config::kHeadDim + channel;
    if constexpr (kGateType == DType::kBF16) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(
          static_cast<const uint16_t*>(p.g) + from));
#pragma unroll
      for (int m = 0; m < 8; ++m)
        g[m][i] = m % 2 == 0 ? bf16_low(word_of(x, m / 2)) : bf16_high(word_of(x, m / 2));
    } else {
      const float4* pieces =
          reinterpret_cast<const float4*>(static_cast<const float*>(p.g) + from);
      const float4 low = __ldg(pieces), high = __ldg(pieces + 1);
      g[0][i] = low.x, g[1][i] = low.y, g[2][i] = low.z, g[3][i] = low.w;
      g[4][i] = high.x, g[5][i] = high.y, g[6][i] = high.z, g[7][i] = high.w;
    }
  }
  const auto apply = [&](auto gate) {
    constexpr Gate kGate = decltype(gate)::value;
    const GateCoefficients c = gate_coefficients(kGate, amplitude, 0.0f, p.gate_lower_bound);
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const GateCoefficients of_channel = {c.slope, c.slope * bias[m], c.amplitude};
#pragma unroll
      for (int i = 0; i < 4; ++i) g[m][i] = log2_decay<kGate>(g[m][i], of_channel);
    }
  };
  if (p.gate == Gate::kSoftplus) {
    apply(std::integral_constant<Gate, Gate::kSoftplus>{});
  } else if (p.gate == Gate::kBounded) {
    apply(std::integral_constant<Gate, Gate::kBounded>{});
  } else {
    apply(std::integral_constant<Gate, Gate::kLogDecay>{});
  }
  if (left < kBlock) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = at.quarter() + 4 * i < left;
#pragma unroll
      for (int m = 0; m < 8; ++m) g[m][i] = exists ? g[m][i] : 0.0f;
    }
  }
}

// What a block needs beside the decays from its middle.
enum Edge { kNoEdge, kFirstHalf, kSecondHalf };

// Decays to exponents from the block's middle: x_i = G_i - G_7 by tensor cores, as products with a
// matrix of 1 (tokens 8 .. i) and -1 (tokens i + 1 .. 7): no differences of sums. The two terms of a
// decay keep all but its last bits. With an edge also the sum over half of the tokens.
template <Edge kEdge>
__device__ __forceinline__ void sum_from_middle(Exponents& x, float (&edge)[8][2],
                                                const Place& at) {
  const int row = at.row(), token = at.quarter();
  const auto if_true = [](bool condition, uint32_t bits) { return condition ? bits : 0u; };
  constexpr uint32_t kOne = 0x3f800000u, kMinusOne = 0xbf800000u;
  const uint32_t first[4] = {if_true(row < token, kMinusOne), 0,
                             if_true(row < token + 4, kMinusOne), 0},
                 second[4] = {0, if_true(token <= row, kOne), 0, if_true(token + 4 <= row, kOne)},
                 ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(x[m][i], high[i], low[i]);
    mma_tf32_first(x[m], first, {low[0], low[1]});
    mma_tf32(x[m], second, {low[2], low[3]});
    mma_tf32(x[m], first, {high[0], high[1]});
    mma_tf32(x[m], second, {high[2], high[3]});
    if constexpr (kEdge != kNoEdge) {
      constexpr int kAt = kEdge == kSecondHalf ? 2 : 0;
      float sum[4];
      mma_tf32_first(sum, ones, {low[kAt], low[kAt + 1]});
      mma_tf32(sum, ones, {high[kAt], high[kAt + 1]});
      edge[m][0] = sum[0];
      edge[m][1] = sum[1];
    }
  }
}

// The tokens of a lane, or the last one that exists.
__device__ __forceinline__ void load_rows(Rows& x, const void* tensor, const ForwardParams& p,
                                          const Item& item, int block, int half, const Place& at) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = min(kBlock * block + at.row() + 8 * r, item.length - 1);
    const uint4* row = static_cast<const uint4*>(tensor) +
                       (item.qk_row + token * p.shape.H) * (Config::kRowBytes / 16) + 8 * half;
#pragma unroll
    for (int e = 0; e < 2; ++e) x[r][e] = __ldg(row + 4 * e + at.quarter());
  }
}

// acc += x times the columns y, transposed, over 16 channels.
__device__ __forceinline__ void multiply(BlockScores& acc, const StepFactor& x,
                                         const StepFactor& y) {
  mma_bf16(acc[0], x, y[0], y[1]);
  mma_bf16(acc[1], x, y[2], y[3]);
}

// Of a block with itself, where its middle cannot carry the decay: each pair of tokens gets its own
// exponent, <= 0 where it is kept. Rare, and slow.
__device__ __forceinline__ void add_pairwise(BlockScores& of_q, BlockScores& of_k,
                                             const Exponents& x, const Rows& q, const Rows& k,
                                             const Place& at) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll 1
    for (int column = 0; column < 8; ++column) {
      const int source = 4 * column + at.quarter();  // who has token 8 n + column
      float q_sum[2] = {}, k_sum[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t k_j = __shfl_sync(0xffffffffu, word_of(k[n][e], i), source);
          const float x_j = __shfl_sync(0xffffffffu, x[2 * i][2 * n + e], source),
                      y_j = __shfl_sync(0xffffffffu, x[2 * i + 1][2 * n + e], source);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float k_x = bf16_low(k_j) * exp2_fast(x[2 * i][2 * r + e] - x_j),
                        k_y = bf16_high(k_j) * exp2_fast(x[2 * i + 1][2 * r + e] - y_j);
            const uint32_t q_i = word_of(q[r][e], i), k_i = word_of(k[r][e], i);
            q_sum[r] = fmaf(bf16_low(q_i), k_x, fmaf(bf16_high(q_i), k_y, q_sum[r]));
            k_sum[r] = fmaf(bf16_low(k_i), k_x, fmaf(bf16_high(k_i), k_y, k_sum[r]));
          }
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int distance = 1; distance <= 2; distance *= 2) {
          q_sum[r] += __shfl_xor_sync(0xffffffffu, q_sum[r], distance);
          k_sum[r] += __shfl_xor_sync(0xffffffffu, k_sum[r], distance);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool own = 2 * at.quarter() + e == column;
          of_q[n][2 * r + e] += own ? q_sum[r] : 0.0f;
          of_k[n][2 * r + e] += own ? k_sum[r] : 0.0f;
        }
      }
    }
  }
}

struct Scores {
  BlockScores q, k;
};

// What the normalisation needs: sums of squares, of the lane's tokens.
struct Squares {
  float q[2], k[2];
};

// Scores of block kIndex of kBlocks with itself, and of the second with the first, which leaves its
// column factors in shared memory; before norms and beta.
template <DType kGateType, int kIndex, int kBlocks>
__device__ __forceinline__ void score_block(Scores& own, Scores& earlier, Squares& squares,
                                            Config::Warp& s, const ForwardParams& p,
                                            const Item& item, const Place& at) {
  constexpr Edge kEdge = kBlocks == 1 ? kNoEdge : kIndex == 0 ? kSecondHalf : kFirstHalf;
  const float span = p.qk_l2norm ? Config::kNormSpan : kLog2DecayHalfSpan;
#pragma unroll 1
  for (int half = 0; half < Config::kHalves; ++half) {
    Exponents x;
    float edge[8][2];
    load_decay<kGateType>(x, p, item, kIndex, half, at);
    Rows q, k;
    load_rows(q, p.q, p, item, kIndex, half, at);
    load_rows(k, p.k, p, item, kIndex, half, at);
    sum_from_middle<kEdge>(x, edge, at);
    float largest = 0.0f;
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x[m][i]));
    const bool too_far = __any_sync(0xffffffffu, largest > span);
    if (too_far) add_pairwise(own.q, own.k, x, q, k, at);
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const int e = step / 2;
      StepFactor row_q, row_k, column, far_q, far_k;
#pragma unroll
      for (int w = 0; w < 2; ++w)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int word = 2 * (step % 2) + w, m = 2 * word, i = 2 * r + e;
          const uint32_t q_pair = word_of(q[r][e], word), k_pair = word_of(k[r][e], word);
          const float q_x = bf16_low(q_pair), q_y = bf16_high(q_pair), k_x = bf16_low(k_pair),
                      k_y = bf16_high(k_pair);
          squares.q[r] = fmaf(q_x, q_x, fmaf(q_y, q_y, squares.q[r]));
          squares.k[r] = fmaf(k_x, k_x, fmaf(k_y, k_y, squares.k[r]));
          const float row_x = exp2_fast(x[m][i]), row_y = exp2_fast(x[m + 1][i]);
          row_q[r + 2 * w] = pack_bf16(q_x * row_x, q_y * row_y);
          row_k[r + 2 * w] = pack_bf16(k_x * row_x, k_y * row_y);
          column[2 * r + w] =
              pack_bf16(k_x * exp2_fast(-x[m][i]), k_y * exp2_fast(-x[m + 1][i]));
          if constexpr (kEdge == kSecondHalf) {
            far_k[2 * r + w] = pack_bf16(k_x * exp2_fast(edge[m][e] - x[m][i]),
                                         k_y * exp2_fast(edge[m + 1][e] - x[m + 1][i]));
          } else if constexpr (kEdge == kFirstHalf) {
            const float far_x = exp2_fast(edge[m][e] + x[m][i]),
                        far_y = exp2_fast(edge[m + 1][e] + x[m + 1][i]);
            far_q[r + 2 * w] = pack_bf16(q_x * far_x, q_y * far_y);
            far_k[r + 2 * w] = pack_bf16(k_x * far_x, k_y * far_y);
          }
        }
      if (!too_far) {
        multiply(own.q, row_q, column);
        multiply(own.k, row_k, column);
      }
      if constexpr (kEdge == kSecondHalf) {
        s.columns[half][step][at.lane] = make_uint4(far_k[0], far_k[1], far_k[2], far_k[3]);
      } else if constexpr (kEdge == kFirstHalf) {
        const uint4 columns = s.columns[half][step][at.lane];  // the lane's own
        const StepFactor of_first = {columns.x, columns.y, columns.z, columns.w};
        multiply(earlier.q, far_q, of_first);
        multiply(earlier.k, far_k, of_first);
      }
    }
  }
}

}  // namespace jax_flashkda::short_segments
