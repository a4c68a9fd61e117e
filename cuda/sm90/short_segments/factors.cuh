// Raw inputs of a block of 16 tokens to its scores, in the registers of one warp. Sums over the
// channels may take these in any order, so a lane reads whole pieces of four: of a quarter's 32
// channels 16 e + 4 t + m (e = 0, 1; m = 0 .. 3; t = lane % 4), of tokens lane / 4 and 8 behind.
#pragma once

#include <type_traits>

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

using BlockScores = float[2][4];  // eights of columns, elements of an accumulator
using Exponents = float[4][4];    // of a lane: m, then element 2 (token) + e
using StepFactor = uint32_t[4];   // as an operand of a product over 16 channels

// A lane's inputs of a quarter as they come.
using Rows = uint2[2][2];  // tokens, pieces e
// The gate's are the columns of a product's right operand: tokens t, t + 4, t + 8, t + 12, channels
// 16 (row % 2) + 4 (row / 2) + m.
template <DType kGateType>
struct RawGate {
  std::conditional_t<kGateType == DType::kBF16, uint2, float4> tokens[4];
  float4 dt_bias;
};

// Where a lane's rows of a block are behind the item's first; the last token stands for those that
// are missing. The item is in shared memory, and read again for each quarter.
template <DType kGateType>
class Source {
 public:
  __device__ __forceinline__ Source(const ForwardParams& p, const Item& item, int block,
                                    const Place& at)
      : item_(item) {
    const uint32_t heads = static_cast<uint32_t>(p.shape.H),
                   value_heads = static_cast<uint32_t>(p.shape.HV);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_[r] = token_of(block, at.row() + 8 * r) * heads;
#pragma unroll
    for (int i = 0; i < 4; ++i) gate_row_[i] = token_of(block, at.quarter() + 4 * i) * value_heads;
  }

  __device__ __forceinline__ void load(RawGate<kGateType>& raw, const ForwardParams& p, int quarter,
                                       const Place& at) const {
    const GatePiece* g = static_cast<const GatePiece*>(p.g) + item_.value_row * kPieces +
                         (8 * quarter + gate_piece(at));
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.tokens[i] = __ldg(g + int64_t{gate_row_[i]} * kPieces);
    raw.dt_bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p.dt_bias != nullptr)
      raw.dt_bias = __ldg(reinterpret_cast<const float4*>(p.dt_bias) +
                          (int64_t{item_.gate_row} * kPieces + 8 * quarter + gate_piece(at)));
  }
  __device__ __forceinline__ void load(Rows& x, const void* tensor, int quarter,
                                       const Place& at) const {
    const uint2* rows =
        static_cast<const uint2*>(tensor) + item_.qk_row * kPieces + (8 * quarter + at.quarter());
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) x[r][e] = __ldg(rows + int64_t{row_[r]} * kPieces + 4 * e);
  }

 private:
  using GatePiece = std::conditional_t<kGateType == DType::kBF16, uint2, float4>;
  static constexpr uint32_t kPieces = Config::kHeadDim / 4;  // of a row

  static __device__ int gate_piece(const Place& at) { return 4 * (at.row() & 1) + (at.row() >> 1); }
  __device__ uint32_t token_of(int block, int token) const {
    return static_cast<uint32_t>(min(kBlock * block + token, item_.length - 1));
  }

  const Item& item_;
  uint32_t row_[2], gate_row_[4];
};

__device__ __forceinline__ float element(const uint2& x, int m) {
  const uint32_t word = m < 2 ? x.x : x.y;
  return m % 2 == 0 ? bf16_low(word) : bf16_high(word);
}
__device__ __forceinline__ float element(const float4& x, int m) {
  return m == 0 ? x.x : m == 1 ? x.y : m == 2 ? x.z : x.w;
}

// Log2 decays of a quarter. Missing tokens decay nothing.
template <DType kGateType>
__device__ __forceinline__ void find_decay(Exponents& g, const RawGate<kGateType>& raw,
                                           const ForwardParams& p, float a, int tokens,
                                           const Place& at) {
  const auto apply = [&](auto gate) {
    constexpr Gate kGate = decltype(gate)::value;
    const GateCoefficients c = gate_coefficients(kGate, a, 0.0f, p.gate_lower_bound);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const GateCoefficients of_channel = {c.slope, c.slope * element(raw.dt_bias, m), c.amplitude};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        g[m][i] = log2_decay<kGate>(element(raw.tokens[i], m), of_channel);
    }
  };
  if (p.gate == Gate::kSoftplus) {
    apply(std::integral_constant<Gate, Gate::kSoftplus>{});
  } else if (p.gate == Gate::kBounded) {
    apply(std::integral_constant<Gate, Gate::kBounded>{});
  } else {
    apply(std::integral_constant<Gate, Gate::kLogDecay>{});
  }
  if (tokens < kBlock) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = at.quarter() + 4 * i < tokens;
#pragma unroll
      for (int m = 0; m < 4; ++m) g[m][i] = exists ? g[m][i] : 0.0f;
    }
  }
}

// What a block needs beside the decays from its middle.
enum Edge { kNoEdge, kFirstHalf, kSecondHalf };

// Decays to exponents from the block's middle: x_i = G_i - G_7 by tensor cores, as products with a
// matrix of 1 (tokens 8 .. i) and -1 (tokens i + 1 .. 7): no differences of sums. The two terms of
// a decay keep all but its last bits. With an edge also the sum over half of the tokens.
template <Edge kEdge>
__device__ __forceinline__ void sum_from_middle(Exponents& x, float (&edge)[4][2],
                                                const Place& at) {
  const int row = at.row(), token = at.quarter();
  const auto if_true = [](bool condition, uint32_t bits) { return condition ? bits : 0u; };
  constexpr uint32_t kOne = 0x3f800000u, kMinusOne = 0xbf800000u;
  const uint32_t first[4] = {if_true(row < token, kMinusOne), 0,
                             if_true(row < token + 4, kMinusOne), 0},
                 second[4] = {0, if_true(token <= row, kOne), 0, if_true(token + 4 <= row, kOne)},
                 ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
  for (int m = 0; m < 4; ++m) {
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
        for (int m = 0; m < 4; ++m) {
          const float k_j = __shfl_sync(0xffffffffu, element(k[n][e], m), source),
                      x_j = __shfl_sync(0xffffffffu, x[m][2 * n + e], source);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float decayed_k = k_j * exp2_fast(x[m][2 * r + e] - x_j);
            q_sum[r] = fmaf(element(q[r][e], m), decayed_k, q_sum[r]);
            k_sum[r] = fmaf(element(k[r][e], m), decayed_k, k_sum[r]);
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

// Whether factors relative to the middle could leave the range of numbers.
__device__ __forceinline__ bool is_too_far(const Exponents& x, float span) {
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x[m][i]));
  return __any_sync(0xffffffffu, largest > span);
}

// A quarter's share of the scores of a block with itself, and of the second with the first, which
// leaves its column factors in shared memory.
template <Edge kEdge>
__device__ __forceinline__ void add_scores(Scores& own, Scores& earlier, Squares& squares,
                                           uint4 (&columns)[2][32], const Exponents& x,
                                           const float (&edge)[4][2], const Rows& q, const Rows& k,
                                           bool too_far, const Place& at) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    StepFactor row_q, row_k, column, far_q, far_k;
#pragma unroll
    for (int w = 0; w < 2; ++w)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int m = 2 * w, i = 2 * r + e;
        const float q_x = element(q[r][e], m), q_y = element(q[r][e], m + 1),
                    k_x = element(k[r][e], m), k_y = element(k[r][e], m + 1);
        squares.q[r] = fmaf(q_x, q_x, fmaf(q_y, q_y, squares.q[r]));
        squares.k[r] = fmaf(k_x, k_x, fmaf(k_y, k_y, squares.k[r]));
        const float row_x = exp2_fast(x[m][i]), row_y = exp2_fast(x[m + 1][i]);
        row_q[r + 2 * w] = pack_bf16(q_x * row_x, q_y * row_y);
        row_k[r + 2 * w] = pack_bf16(k_x * row_x, k_y * row_y);
        column[2 * r + w] = pack_bf16(k_x * exp2_fast(-x[m][i]), k_y * exp2_fast(-x[m + 1][i]));
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
      columns[e][at.lane] = make_uint4(far_k[0], far_k[1], far_k[2], far_k[3]);
    } else if constexpr (kEdge == kFirstHalf) {
      const uint4 of_first = columns[e][at.lane];  // the lane's own
      const StepFactor column_factors = {of_first.x, of_first.y, of_first.z, of_first.w};
      multiply(earlier.q, far_q, column_factors);
      multiply(earlier.k, far_k, column_factors);
    }
  }
}

// Scores of block kIndex of kBlocks, before norms and beta. A quarter's gates are on their way
// during the products of the one before, its q and k during those gates.
template <DType kGateType, int kIndex, int kBlocks>
__device__ __forceinline__ void score_block(Scores& own, Scores& earlier, Squares& squares,
                                            Config::Columns& columns, const ForwardParams& p,
                                            const Item& item, const Place& at) {
  constexpr Edge kEdge = kBlocks == 1 ? kNoEdge : kIndex == 0 ? kSecondHalf : kFirstHalf;
  const float span = p.qk_l2norm ? Config::kNormSpan : kLog2DecayHalfSpan;
  const float a = p.A_log != nullptr ? exp2_fast(__ldg(p.A_log + item.gate_row) * kLog2E) : 1.0f;
  const Source<kGateType> source(p, item, kIndex, at);
  RawGate<kGateType> gate;
  source.load(gate, p, 0, at);
#pragma unroll 1
  for (int quarter = 0; quarter < Config::kQuarters; ++quarter) {
    Rows q, k;
    source.load(q, p.q, quarter, at);
    source.load(k, p.k, quarter, at);
    Exponents x;
    float edge[4][2];
    find_decay<kGateType>(x, gate, p, a, item.length - kBlock * kIndex, at);
    sum_from_middle<kEdge>(x, edge, at);
    const bool too_far = is_too_far(x, span);
    if (too_far) add_pairwise(own.q, own.k, x, q, k, at);
    source.load(gate, p, min(quarter + 1, Config::kQuarters - 1), at);
    add_scores<kEdge>(own, earlier, squares, columns[quarter], x, edge, q, k, too_far, at);
  }
}

}  // namespace jax_flashkda::short_segments
