// Raw inputs to the decays of a warp's channels, and to the factors that the scores were made of.
//
// A block of 16 tokens has two reference points a channel, in powers of two: as a row a token
// carries x exp(G_i - row reference), as a column k exp(column reference - G_j). Both are the
// block's middle, so that factors grow by the decay of 8 tokens at most; where that is too much for
// a channel of the warp, its blocks' row reference is the block's start and the column reference
// its end, all exponents are <= 0, and only the block's own scores need pairwise exponents. The
// references are integers: factors meet across blocks after multiplication by an exact power of
// two, and a pair's term in the gate gradient is the same product in its row and in its column.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "sm90/chunk_gradient/inputs.cuh"
#include "sm90/chunk_gradient/products.cuh"

namespace jax_flashkda::chunk_gradient {

// Shared memory of a 16-channel, 16-token piece of q, k or a 16-bit g as operand registers:
// register 2 m + h holds two tokens of group 2 block + m.
__device__ __forceinline__ uint32_t block_address(const uint8_t* tile, int block, const Place& at) {
  return shared_address(tile) + tile_offset(16 * block + 8 * (at.lane >> 4) + (at.lane & 7),
                                            2 * at.warp + ((at.lane >> 3) & 1));
}

// Raw gates of one block, [m][2 h + e].
template <DType kGateType>
__device__ __forceinline__ void load_gates(float (&g)[2][4], const Shared<kGateType>& s, int block,
                                           const Place& at) {
  if constexpr (kGateType == DType::kBF16) {
    uint32_t r[4];
    load_matrices_transposed(r, block_address(s.g, block, at));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      g[i >> 1][2 * (i & 1)] = bf16_low(r[i]);
      g[i >> 1][2 * (i & 1) + 1] = bf16_high(r[i]);
    }
  } else {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        g[m][i] = *reinterpret_cast<const float*>(
            s.g +
            wide_offset(16 * block + 8 * m + at.token() + (i & 1), at.channel() + 8 * (i >> 1)));
  }
}

// Two tokens' norms of q or k.
template <class Shared>
__device__ __forceinline__ float2 load_norms(const Shared& s, int of_k, int group,
                                             const Place& at) {
  return *reinterpret_cast<const float2*>(&s.norms[of_k][8 * group + at.token()]);
}

// The factor of every token: a warp takes eight.
template <class Shared>
__device__ __forceinline__ void find_norms(Shared& s, bool qk_l2norm, const Place& at) {
  float squares[16];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const uint32_t from = tile_offset(8 * at.warp + r, at.lane >> 1) + 8 * (at.lane & 1);
    squares[r] = sum_of_squares(*reinterpret_cast<const uint2*>(s.q + from));
    squares[8 + r] = sum_of_squares(*reinterpret_cast<const uint2*>(s.k + from));
  }
  const float factor = qk_l2norm ? l2norm_factor(sum_over_lanes(squares, at.lane)) : 1.0f;
  if (at.lane < 16) s.norms[at.lane >> 3][8 * at.warp + (at.lane & 7)] = factor;
}

// Per channel of the thread: the gate's constants.
struct ChannelGate {
  GateCoefficients c;
  float dt_bias;
};

struct HeadGate {
  ChannelGate channels[2];
  float a;  // exp(A_log)
};

__device__ __forceinline__ HeadGate load_head_gate(const ForwardParams& p, int64_t row,
                                                   int64_t head, const Place& at) {
  const int64_t gate_head = row * p.shape.HV + head;
  HeadGate gate;
  gate.a = p.A_log != nullptr ? expf(__ldg(p.A_log + gate_head)) : 1.0f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float dt_bias =
        p.dt_bias != nullptr
            ? __ldg(p.dt_bias + gate_head * Config::kHeadDim + at.channel() + 8 * h)
            : 0.0f;
    gate.channels[h] = {gate_coefficients(p.gate, gate.a, dt_bias, p.gate_lower_bound), dt_bias};
  }
  return gate;
}

// Log2 decays of the thread's elements, summed over tokens.
struct Decays {
  float from_row[Config::kGroups][4];       // G - row reference of the token's block
  float row_reference[Config::kBlocks][2];  // integers, of channel h
  float span[Config::kBlocks][2];           // column reference - row reference: an integer <= 0
  float end_integer[2], end_fraction[2];    // G_C, in two parts
  bool far[Config::kBlocks];                // pairwise exponents: one answer for the warp

  __device__ float column_reference(int block, int h) const {
    return row_reference[block][h] + span[block][h];
  }
  __device__ float to_column(int n, int i) const { return span[n >> 1][i >> 1] - from_row[n][i]; }
};

template <Gate kGate>
__device__ __forceinline__ void gates_to_decays(float (&g)[2][4], const HeadGate& gate) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) g[m][i] = log2_decay<kGate>(g[m][i], gate.channels[i >> 1].c);
}

// Sums over the 8 tokens that a row's four lanes hold, two each: x becomes the sum up to and with
// each token; returns the whole.
__device__ __forceinline__ float cumulate_group(float& x0, float& x1, int lane) {
  const int t = lane & 3;
  float sum = x0 + x1;
  float other = __shfl_up_sync(0xffffffffu, sum, 1, 4);
  sum += t >= 1 ? other : 0.0f;
  other = __shfl_up_sync(0xffffffffu, sum, 2, 4);
  sum += t >= 2 ? other : 0.0f;
  other = __shfl_up_sync(0xffffffffu, sum, 1, 4);
  x0 += t >= 1 ? other : 0.0f;
  x1 = sum;
  return __shfl_sync(0xffffffffu, sum, 3, 4);
}

template <DType kGateType>
__device__ __forceinline__ void find_decays(Decays& d, const Shared<kGateType>& s, Gate kind,
                                            const HeadGate& gate, int length, const Place& at) {
  float integer[2] = {}, fraction[2] = {};  // G at the block's start: integers are exact
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    float g[2][4];
    load_gates<kGateType>(g, s, block, at);
    if (kind == Gate::kSoftplus) {
      gates_to_decays<Gate::kSoftplus>(g, gate);
    } else if (kind == Gate::kBounded) {
      gates_to_decays<Gate::kBounded>(g, gate);
    } else {
      gates_to_decays<Gate::kLogDecay>(g, gate);
    }
    if (length < 16 * (block + 1)) {  // missing tokens decay nothing
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          g[m][i] = 16 * block + 8 * m + at.token() + (i & 1) < length ? g[m][i] : 0.0f;
    }
    float middle[2], end[2];
    bool far = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      middle[h] = cumulate_group(g[0][2 * h], g[0][2 * h + 1], at.lane);
      const float upper = cumulate_group(g[1][2 * h], g[1][2 * h + 1], at.lane);
      far |= !(middle[h] >= -kLog2DecayHalfSpan) || !(upper >= -kLog2DecayHalfSpan);
      end[h] = middle[h] + upper;
    }
    far = __any_sync(0xffffffffu, far);
    d.far[block] = far;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float row = rintf(fraction[h] + (far ? 0.0f : middle[h]));
      const float next = rintf(fraction[h] + end[h]);
      d.row_reference[block][h] = integer[h] + row;
      d.span[block][h] = far ? next - row : 0.0f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        d.from_row[2 * block][2 * h + e] = g[0][2 * h + e] + (fraction[h] - row);
        d.from_row[2 * block + 1][2 * h + e] = middle[h] + g[1][2 * h + e] + (fraction[h] - row);
      }
      fraction[h] = fraction[h] + end[h] - next;
      integer[h] += next;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    d.end_integer[h] = integer[h];
    d.end_fraction[h] = fraction[h];
  }
}

// The rounded factors, two tokens a register: [2 n + h].
struct Factors {
  uint32_t q_row[2 * Config::kGroups], k_row[2 * Config::kGroups], k_column[2 * Config::kGroups];
};

template <class Shared>
__device__ __forceinline__ void find_factors(Factors& f, const Shared& s, const Decays& d,
                                             const Place& at) {
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    uint32_t q[4], k[4];
    load_matrices_transposed(q, block_address(s.q, block, at));
    load_matrices_transposed(k, block_address(s.k, block, at));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float2 q_norm = load_norms(s, 0, n, at), k_norm = load_norms(s, 1, n, at);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float q0 = bf16_low(q[2 * m + h]) * q_norm.x, q1 = bf16_high(q[2 * m + h]) * q_norm.y;
        const float k0 = bf16_low(k[2 * m + h]) * k_norm.x, k1 = bf16_high(k[2 * m + h]) * k_norm.y;
        const float down0 = exp2_fast(d.from_row[n][2 * h]),
                    down1 = exp2_fast(d.from_row[n][2 * h + 1]);
        f.q_row[2 * n + h] = pack_bf16(q0 * down0, q1 * down1);
        f.k_row[2 * n + h] = pack_bf16(k0 * down0, k1 * down1);
        f.k_column[2 * n + h] = pack_bf16(k0 * exp2_fast(d.to_column(n, 2 * h)),
                                          k1 * exp2_fast(d.to_column(n, 2 * h + 1)));
      }
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
