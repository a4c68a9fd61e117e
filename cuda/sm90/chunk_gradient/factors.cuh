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

namespace jax_flashkda::chunk_gradient {

// Tiles of raw inputs, one behind the other.
enum KeyTile { kTileQ, kTileK, kTileG };

// The lane's row in the 16-channel, 16-token piece of a tile. As operand registers, register
// 2 m + h holds two tokens of group 2 block + m.
__device__ __forceinline__ uint32_t key_address(const Place& at, KeyTile tile, int block) {
  return at.keys + static_cast<int>(kChunk) * Config::kRowBytes * tile +
         16 * Config::kRowBytes * block;
}

// Raw gates of one block, [m][2 h + e].
template <DType kGateType>
__device__ __forceinline__ void load_gates(float (&g)[2][4], const Shared<kGateType>& s, int block,
                                           const Place& at) {
  if constexpr (kGateType == DType::kBF16) {
    uint32_t r[4];
    load_matrices_transposed(r, key_address(at, kTileG, block));
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

// The factor of every token: a warp takes four.
template <class Shared>
__device__ __forceinline__ void find_norms(Shared& s, bool qk_l2norm, const Place& at) {
  float squares[8];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t from = tile_offset(4 * at.warp + r, at.lane >> 1) + 8 * (at.lane & 1);
    squares[r] = sum_of_squares(*reinterpret_cast<const uint2*>(s.q + from));
    squares[4 + r] = sum_of_squares(*reinterpret_cast<const uint2*>(s.k + from));
  }
  fold_values<4, 4>(squares, at.lane);
  fold_values<2, 2>(squares, at.lane);
  fold_values<1, 1>(squares, at.lane);
  float sum = squares[0] + __shfl_xor_sync(0xffffffffu, squares[0], 8);
  sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  if (at.lane < 8)
    s.norms[at.lane >> 2][4 * at.warp + (at.lane & 3)] = qk_l2norm ? l2norm_factor(sum) : 1.0f;
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

template <class Shared>
__device__ __forceinline__ HeadGate find_head_gate(const Shared& s, const ForwardParams& p,
                                                   const Place& at) {
  HeadGate gate;
  gate.a = s.amplitude;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float dt_bias = s.dt_bias[at.channel() + 8 * h];
    gate.channels[h] = {gate_coefficients(p.gate, gate.a, dt_bias, p.gate_lower_bound), dt_bias};
  }
  return gate;
}

template <Gate kGate>
__device__ __forceinline__ void gates_to_decays(float (&g)[2][4], const HeadGate& gate) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) g[m][i] = log2_decay<kGate>(g[m][i], gate.channels[i >> 1].c);
}

// What the row's other three lanes hold ahead of and behind this one's x, and all four: sums over
// the 8 tokens of a group, two a lane.
struct GroupSums {
  float before, behind, all;
};
__device__ __forceinline__ GroupSums sum_group(float x, int lane) {
  const float beside = __shfl_xor_sync(0xffffffffu, x, 1), pair = x + beside,
              other = __shfl_xor_sync(0xffffffffu, pair, 2);
  const bool odd = lane & 1, upper = lane & 2;
  return {(odd ? beside : 0.0f) + (upper ? other : 0.0f),
          (odd ? 0.0f : beside) + (upper ? 0.0f : other), pair + other};
}

// Waits for the other warp of the same channels.
__device__ __forceinline__ void meet_pair(const Place& at) {
  named_barrier(kPairBarrier + at.channel_warp(), 64);
}

// Decays between the halves of the chunk, for channel h, once the pair has met over them.
struct HalfDecays {
  float lower, upper;

  template <class Shared>
  __device__ HalfDecays(const Shared& s, int h, const Place& at)
      : lower(s.exchange.log2_decay[0][at.channel() + 8 * h]),
        upper(s.exchange.log2_decay[1][at.channel() + 8 * h]) {}
  __device__ float border() const { return rintf(lower); }  // a reference point: an integer
  // G_C - an integer reference.
  __device__ float end_from(float reference) const {
    return (border() - reference + rintf(upper)) + ((lower - border()) + (upper - rintf(upper)));
  }
};

// Log2 decays of the thread's elements since their block's row reference, [n][2 h + e], and what
// of the references others need not know.
struct Decays {
  Elements from_row;
  float span[Config::kBlocks][2];  // column reference - row reference: an integer <= 0
  bool far[Config::kBlocks];       // pairwise exponents: one answer for the warp
};

template <DType kGateType>
__device__ __forceinline__ void find_decays(Decays& d, Shared<kGateType>& s, Gate kind,
                                            const HeadGate& gate, int length, const Place& at) {
  float middle[Config::kBlocks][2], end[Config::kBlocks][2];  // of a block, from its start
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
    if (length < kChunk) {  // missing tokens decay nothing
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          g[m][i] = 16 * block + 8 * m + at.token() + (i & 1) < length ? g[m][i] : 0.0f;
    }
    bool far = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float start = 0.0f;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float x0 = g[m][2 * h], x1 = g[m][2 * h + 1];
        const GroupSums sums = sum_group(x0 + x1, at.lane);
        const float first = start + (sums.before + x0);
        d.from_row[2 * block + m][2 * h] = first;
        d.from_row[2 * block + m][2 * h + 1] = first + x1;
        far |= !(sums.all >= -kLog2DecayHalfSpan);
        start += sums.all;
        if (m == 0) middle[block][h] = start;
      }
      end[block][h] = start;
    }
    d.far[block] = __any_sync(0xffffffffu, far);
  }
  const bool writes = (at.lane & 3) == 0;  // one of the four lanes that know a channel
  if (writes) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      s.exchange.log2_decay[at.half()][at.channel() + 8 * h] = end[0][h] + end[1][h];
  }
  meet_pair(at);  // both halves' decays, before either warp reads the other's
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const HalfDecays halves(s, h, at);
    // G at the block's start in two parts, of which the integer is exact.
    float integer = at.half() ? halves.border() : 0.0f,
          fraction = at.half() ? halves.lower - halves.border() : 0.0f;
#pragma unroll
    for (int block = 0; block < Config::kBlocks; ++block) {
      const bool far = d.far[block];
      const float row = rintf(fraction + (far ? 0.0f : middle[block][h])),
                  next = rintf(fraction + end[block][h]), column = far ? next : row;
      d.span[block][h] = column - row;
      if (writes) {
        const int i = Config::kBlocks * at.half() + block, c = at.channel() + 8 * h;
        s.exchange.row_reference[i][c] = integer + row;
        s.exchange.column_reference[i][c] = integer + column;
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) d.from_row[2 * block + m][2 * h + e] += fraction - row;
      fraction = fraction + end[block][h] - next;
      integer += next;
    }
  }
}

// The factors of all blocks to shared memory, rounded, as left operands: 16 channels by the 16
// tokens of a block, register 2 m + h holds two tokens of group m.
template <class Shared>
__device__ __forceinline__ void write_factors(Shared& s, const Decays& d, const Place& at) {
  Scratch& to = s.scratch;
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    uint32_t q_raw[4], k_raw[4], q_row[4], k_row[4], k_column[4];
    load_matrices_transposed(q_raw, key_address(at, kTileQ, block));
    load_matrices_transposed(k_raw, key_address(at, kTileK, block));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float2 q_norm = load_norms(s, 0, n, at), k_norm = load_norms(s, 1, n, at);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t q = q_raw[2 * m + h], k = k_raw[2 * m + h];
        const float from0 = d.from_row[n][2 * h], from1 = d.from_row[n][2 * h + 1],
                    down0 = exp2_fast(from0), down1 = exp2_fast(from1), k0 = bf16_low(k) * k_norm.x,
                    k1 = bf16_high(k) * k_norm.y;
        q_row[2 * m + h] =
            pack_bf16(bf16_low(q) * q_norm.x * down0, bf16_high(q) * q_norm.y * down1);
        k_row[2 * m + h] = pack_bf16(k0 * down0, k1 * down1);
        k_column[2 * m + h] = pack_bf16(k0 * exp2_fast(d.span[block][h] - from0),
                                        k1 * exp2_fast(d.span[block][h] - from1));
        to.decays[at.warp][n][h][at.lane] = make_float4(from0, from1, down0, down1);
      }
    }
    const int i = Config::kBlocks * at.half() + block, warp = at.channel_warp();
    to.q_row[i][warp][at.lane] = make_uint4(q_row[0], q_row[1], q_row[2], q_row[3]);
    to.k_row[i][warp][at.lane] = make_uint4(k_row[0], k_row[1], k_row[2], k_row[3]);
    to.k_column[i][warp][at.lane] = make_uint4(k_column[0], k_column[1], k_column[2], k_column[3]);
  }
}

}  // namespace jax_flashkda::chunk_gradient
