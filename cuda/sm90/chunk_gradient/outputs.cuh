// Sums over scores and states to the gradients of the raw inputs.
#pragma once

#include "sm90/chunk_gradient/scores.cuh"

namespace jax_flashkda::chunk_gradient {

// From the products with V and the factors to gradients of normalised q and k, in the places of
// q_row and k_row, and of the log decay, in that of k_column.
//
//   d log decay_t = sum over i >= t of dG_i + sum over j < t of k_j exp(G_C - G_j) dk_r_j
//                   + exp(G_C) <S, dS'>
//
// with dG_i from pairs of tokens and the state at the chunk's start alone: where everything decays
// fast it is as small as the result, which a difference of all restored keys and of those behind t
// would not be. A pair of tokens enters dG with the same rounded factors in its row and in its
// column, so that it cancels ahead of both.
template <class Shared>
struct ChannelSums {
  Sums& sums;
  Shared& s;
  const Decays& d;
  const Place& at;
  float restored[2] = {};              // over the tokens so far
  float d_G[Config::kGroups][2] = {};  // of each group of tokens

  static __device__ float half_of(uint32_t pair, int e) {
    return e ? bf16_high(pair) : bf16_low(pair);
  }

  // The parts through the state at the chunk's start, under the rows' references.
  __device__ void refer_rows(float scale) {
#pragma unroll
    for (int block = 0; block < Config::kBlocks; ++block)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row = exp2_fast(
            s.exchange.row_reference[Config::kBlocks * at.half() + block][at.channel() + 8 * h]);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            sums.q_row[2 * block + m][2 * h + e] *= scale * row;
            sums.k_row[2 * block + m][2 * h + e] *= -row;
          }
      }
  }

  // Sums over the tokens of a group: what d log decay gets from its restored keys and its dG.
  __device__ void cumulate(int n, int h, float x0, float x1, float dG0, float dG1) {
    const GroupSums keys = sum_group(x0 + x1, at.lane), decays = sum_group(dG0 + dG1, at.lane);
    const float before = restored[h] + keys.before, behind = decays.behind + dG1;
    sums.k_column[n][2 * h] = before + (behind + dG0);
    sums.k_column[n][2 * h + 1] = (before + x0) + behind;
    restored[h] += keys.all;
    d_G[n][h] = decays.all;
  }

  // `column`: what scores give the block's columns.
  __device__ void finish(int block, const float (&column)[2][4]) {
    const Scratch& scratch = s.scratch;
    const int i = Config::kBlocks * at.half() + block, warp = at.channel_warp();
    uint32_t q_raw[4], k_raw[4];
    load_matrices_transposed(q_raw, key_address(at, kTileQ, block));
    load_matrices_transposed(k_raw, key_address(at, kTileK, block));
    const uint4 q_rows = scratch.q_row[i][warp][at.lane], k_rows = scratch.k_row[i][warp][at.lane],
                k_columns = scratch.k_column[i][warp][at.lane];
    float end[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      end[h] = exp2_fast(
          HalfDecays(s, h, at).end_from(s.exchange.column_reference[i][at.channel() + 8 * h]));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float2 q_norm = load_norms(s, 0, n, at), k_norm = load_norms(s, 1, n, at),
                   own = *reinterpret_cast<const float2*>(&s.d_A_qk_diagonal[8 * n + at.token()]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 decays = scratch.decays[at.warp][n][h][at.lane];
        const uint32_t q_pair = q_raw[2 * m + h], k_pair = k_raw[2 * m + h],
                       q_row_pair = word(q_rows, 2 * m + h), k_row_pair = word(k_rows, 2 * m + h),
                       k_column_pair = word(k_columns, 2 * m + h);
        float dG[2], restored_keys[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at_e = 2 * h + e;
          const float q = half_of(q_pair, e) * (e ? q_norm.y : q_norm.x),
                      k = half_of(k_pair, e) * (e ? k_norm.y : k_norm.x),
                      diagonal = e ? own.y : own.x, down = e ? decays.w : decays.z,
                      up = exp2_fast(d.span[block][h] - (e ? decays.y : decays.x));
          const float q_row = sums.q_row[n][at_e], k_row = sums.k_row[n][at_e],
                      k_column = half_of(k_column_pair, e),
                      through_state = sums.k_column[n][at_e] * end[h];
          sums.q_row[n][at_e] = fmaf(diagonal, k, down * q_row);
          sums.k_row[n][at_e] =
              fmaf(diagonal, q, fmaf(down, k_row, up * (through_state + column[m][at_e])));
          dG[e] = fmaf(half_of(q_row_pair, e), q_row,
                       fmaf(half_of(k_row_pair, e), k_row, -k_column * column[m][at_e]));
          restored_keys[e] = k_column * through_state;
        }
        cumulate(n, h, restored_keys[0], restored_keys[1], dG[0], dG[1]);
      }
    }
    if (d.far[block]) add_pairwise(block);
  }

  static __device__ uint32_t word(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }

  // The pairs of a diagonal block that the products left out.
  __device__ void add_pairwise(int block) {
    uint32_t q_raw[4], k_raw[4];
    load_matrices_transposed(q_raw, key_address(at, kTileQ, block));
    load_matrices_transposed(k_raw, key_address(at, kTileK, block));
    float q[2][4], k[2][4], dq[2][4], dk[2][4], dG[2][4] = {}, G[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float2 q_norm = load_norms(s, 0, n, at), k_norm = load_norms(s, 1, n, at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[m][i] = half_of(q_raw[2 * m + (i >> 1)], i & 1) * (i & 1 ? q_norm.y : q_norm.x);
        k[m][i] = half_of(k_raw[2 * m + (i >> 1)], i & 1) * (i & 1 ? k_norm.y : k_norm.x);
        dq[m][i] = sums.q_row[n][i];
        dk[m][i] = sums.k_row[n][i];
        const float4& decays = s.scratch.decays[at.warp][n][i >> 1][at.lane];
        G[m][i] = i & 1 ? decays.y : decays.x;
      }
    }
    add_pairwise_gradients(dq, dk, dG, q, k, G, s, Config::kBlocks * at.half() + block, at);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.q_row[n][i] = dq[m][i];
        sums.k_row[n][i] = dk[m][i];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float dG0 = dG[m][2 * h], dG1 = dG[m][2 * h + 1];
        const GroupSums decays = sum_group(dG0 + dG1, at.lane);
        sums.k_column[n][2 * h] += (decays.behind + dG1) + dG0;
        sums.k_column[n][2 * h + 1] += decays.behind + dG1;
        d_G[n][h] += decays.all;
      }
    }
  }

  // What lies in other groups, in the other half, and the state's whole decay.
  __device__ void add_other_tokens(bool at_caller_state) {
    float half_d_G[2];
    const int channel = at.channel(), half = at.half();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      half_d_G[h] = (d_G[0][h] + d_G[1][h]) + (d_G[2][h] + d_G[3][h]);
      if ((at.lane & 3) == 0) {
        s.exchange.restored[half][channel + 8 * h] = restored[h];
        s.exchange.d_G[half][channel + 8 * h] = half_d_G[h];
      }
    }
    meet_pair(at);  // both halves' sums, before either warp reads the other's
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = channel + 8 * h;
      const float (&products)[2][Config::kHeadDim] =
          at_caller_state ? s.exchange.caller_product : s.exchange.boundary_product;
      const float S_dS = products[0][c] + products[1][c];
      float rest = fmaf(exp2_fast(HalfDecays(s, h, at).end_from(0.0f)), S_dS,
                        half ? s.exchange.restored[0][c] : s.exchange.d_G[1][c]);
#pragma unroll
      for (int n = Config::kGroups - 1; n >= 0; --n) {
        sums.k_column[n][2 * h] += rest;
        sums.k_column[n][2 * h + 1] += rest;
        rest += d_G[n][h];
      }
    }
  }
};

// A thread's sums over its elements of the row's chunks.
struct GateSums {
  float dt_bias[2], A_log;
};

template <DType kGateType>
__device__ __forceinline__ void store_gate_gradients(Shared<kGateType>& s, const float (&dg)[2][4],
                                                     int block, const Place& at) {
  if constexpr (kGateType == DType::kBF16) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = pack_bf16(dg[i >> 1][2 * (i & 1)], dg[i >> 1][2 * (i & 1) + 1]);
    store_matrices_transposed(key_address(at, kTileG, block), r);
  } else {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<float*>(s.g + wide_offset(16 * block + 8 * m + at.token() + (i & 1),
                                                    at.channel() + 8 * (i >> 1))) = dg[m][i];
  }
}

// Through the gate, block by block, each in the place of its raw gates.
template <Gate kGate, DType kGateType>
__device__ __forceinline__ void write_gate_gradients(Shared<kGateType>& s, GateSums& total,
                                                     const Elements& d_log_decay,
                                                     const HeadGate& gate, int length,
                                                     const Place& at) {
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    float g[2][4];
    load_gates<kGateType>(g, s, block, at);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * block + m, h = i >> 1;
        const ChannelGate& channel = gate.channels[h];
        const bool exists = 8 * n + at.token() + (i & 1) < length;
        const GateGradient gradient =
            gate_gradient<kGate>(g[m][i], channel.c, gate.a, g[m][i] + channel.dt_bias);
        const float d = exists ? d_log_decay[n][i] : 0.0f;
        g[m][i] = d * gradient.raw;
        if constexpr (kGate != Gate::kLogDecay) {
          total.dt_bias[h] += g[m][i];
          total.A_log = fmaf(d, gradient.A_log, total.A_log);
        }
      }
    store_gate_gradients<kGateType>(s, g, block, at);
  }
}

// <qn, dqn> and <kn, dkn> of every token, over the warp's channels.
template <class Shared>
__device__ __forceinline__ void find_dot_parts(Shared& s, const Sums& sums, const Place& at) {
  constexpr int kTokens = 2 * Config::kGroups;
  float parts[2 * kTokens];  // of q, then of k: tokens 8 n + 2 (lane % 4) + e
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    uint32_t q[4], k[4];
    load_matrices_transposed(q, key_address(at, kTileQ, block));
    load_matrices_transposed(k, key_address(at, kTileK, block));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float (&dq)[4] = sums.q_row[n];
      const float (&dk)[4] = sums.k_row[n];
      const uint32_t q0 = q[2 * m], q1 = q[2 * m + 1], k0 = k[2 * m], k1 = k[2 * m + 1];
      parts[2 * n] = fmaf(bf16_low(q0), dq[0], bf16_low(q1) * dq[2]);
      parts[2 * n + 1] = fmaf(bf16_high(q0), dq[1], bf16_high(q1) * dq[3]);
      parts[kTokens + 2 * n] = fmaf(bf16_low(k0), dk[0], bf16_low(k1) * dk[2]);
      parts[kTokens + 2 * n + 1] = fmaf(bf16_high(k0), dk[1], bf16_high(k1) * dk[3]);
    }
  }
  fold_values<16, 8>(parts, at.lane);
  fold_values<8, 4>(parts, at.lane);
  fold_values<4, 2>(parts, at.lane);
  const int row = at.lane >> 2;  // of q for 0 .. 3, else of k; groups row % 4
  *reinterpret_cast<float2*>(&s.dots[at.channel_warp()][row >> 2][8 * (row & 3) + at.token()]) =
      make_float2(parts[0], parts[1]);
}

// Over all channels: what normalisation takes away.
template <class Shared>
__device__ __forceinline__ void sum_dots(Shared& s) {
  if (threadIdx.x >= 2 * kChunk) return;
  const int of_k = threadIdx.x / kChunk, token = threadIdx.x % kChunk;
  const float norm = s.norms[of_k][token];
  float dot = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Config::kChannelWarps; ++warp) dot += s.dots[warp][of_k][token];
  // Of normalised rows, and once more their factor, which stands before each raw element.
  s.dots[0][of_k][token] = dot * norm * norm;
}

// dx = f (dxn - xn <xn, dxn>) with xn = f x, in the place of x, or for a group of heads in fp32 to
// the workspace.
template <class Shared>
__device__ __forceinline__ void write_key_gradients(const Shared& s, int of_k, const Elements& d,
                                                    bool qk_l2norm, float* head_gradients,
                                                    int64_t stride, int length, const Place& at) {
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    float dx[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) dx[m][i] = d[2 * block + m][i];
    const uint32_t place = key_address(at, of_k ? kTileK : kTileQ, block);
    if (qk_l2norm) {
      uint32_t raw[4];
      load_matrices_transposed(raw, place);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int n = 2 * block + m;
        const float2 norm = load_norms(s, of_k, n, at),
                     dot = *reinterpret_cast<const float2*>(&s.dots[0][of_k][8 * n + at.token()]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t x = raw[2 * m + h];
          dx[m][2 * h] = norm.x * fmaf(-bf16_low(x), dot.x, dx[m][2 * h]);
          dx[m][2 * h + 1] = norm.y * fmaf(-bf16_high(x), dot.y, dx[m][2 * h + 1]);
        }
      }
    }
    if (head_gradients == nullptr) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        r[i] = pack_bf16(dx[i >> 1][2 * (i & 1)], dx[i >> 1][2 * (i & 1) + 1]);
      store_matrices_transposed(place, r);
    } else {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 16 * block + 8 * m + at.token() + (i & 1);
          if (token < length)
            head_gradients[token * stride + at.channel() + 8 * (i >> 1)] = dx[m][i];
        }
    }
  }
}

// d_beta of a token. Of U = (..)^-1 Diag(beta) (V - ..): sum over v of (dR / beta) (U / beta).
template <class Shared>
__device__ __forceinline__ float find_beta_gradient(const Shared& s, const Item& item, int token,
                                                    float beta) {
  if (item.length > Config::kFewTokens) return s.d_r_times_u[token] / beta / beta;
  const float (&parts)[4] = s.few.d_beta[token];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Through the sigmoid.
__device__ __forceinline__ void write_beta_gradient(const BackwardParams& b, int64_t at, float beta,
                                                    float d) {
  const ForwardParams& p = b.forward;
  if (p.beta_is_logits) d *= beta * (1.0f - (p.allow_neg_eigval ? 0.5f : 1.0f) * beta);
  if (p.beta_dtype == DType::kBF16) {
    static_cast<uint16_t*>(b.d_beta)[at] = static_cast<uint16_t>(pack_bf16(d, 0.0f));
  } else {
    static_cast<float*>(b.d_beta)[at] = d;
  }
}

// A token whose beta is zero writes nothing to the state. Its U and dR are there for d_beta alone,
// on the scale of the beta that was taken instead: once that has been read, they are zeros, and so
// are what came of them and dv. All threads; rare.
template <class Shared>
__device__ __forceinline__ void clear_tokens_without_beta(Shared& s, Sums& sums,
                                                          const BackwardParams& b, const Item& item,
                                                          int64_t head, const Place& at) {
  const uint64_t without = uint64_t{s.without_beta[1]} << 32 | s.without_beta[0];
#pragma unroll
  for (int n = 0; n < Config::kGroups; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (without >> (8 * n + at.token() + (i & 1)) & 1)
        sums.k_row[n][i] = sums.k_column[n][i] = 0.0f;
  for (int element = reread_thread(); element < kChunk * kChunk; element += Config::kThreads) {
    const int i = element / kChunk, j = element % kChunk;
    const int place = swizzle128(i, j >> 3) + 2 * (j & 7);
    const bool column = without >> j & 1;
    if (column) *reinterpret_cast<uint16_t*>(s.d_A_qk + place) = 0;
    if (column || (without >> i & 1)) *reinterpret_cast<uint16_t*>(s.d_L + place) = 0;
    if (column && i == j) s.d_A_qk_diagonal[i] = 0.0f;
    if (column && i < 16 && item.length > j)  // 16 pieces of dv's row
      static_cast<uint4*>(
          b.dv)[((item.token(b.forward.shape) + j) * b.forward.shape.HV + head) * 16 + i] =
          make_uint4(0, 0, 0, 0);
  }
  __syncthreads();  // the scores' gradients without them, before they are multiplied
}

// Adds a row's sums to the CTA's partial of that row.
template <class Shared>
__device__ __forceinline__ void add_partial(Shared& s, float* partial, GateSums& sums,
                                            const Place& at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sums.dt_bias[h] += __shfl_xor_sync(0xffffffffu, sums.dt_bias[h], 1);
    sums.dt_bias[h] += __shfl_xor_sync(0xffffffffu, sums.dt_bias[h], 2);
    if ((at.lane & 3) == 0) s.exchange.restored[at.half()][at.channel() + 8 * h] = sums.dt_bias[h];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    sums.A_log += __shfl_xor_sync(0xffffffffu, sums.A_log, lanes);
  if (at.lane == 0) s.A_sums[at.warp] = sums.A_log;
  __syncthreads();  // every warp's sums, before they are summed
  if (threadIdx.x < Config::kHeadDim)
    partial[threadIdx.x] +=
        s.exchange.restored[0][threadIdx.x] + s.exchange.restored[1][threadIdx.x];
  if (threadIdx.x == 0) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Config::kWarps; ++warp) sum += s.A_sums[warp];
    partial[Config::kHeadDim] += sum;
  }
  __syncthreads();  // they have been read, before the next row's
  sums = {};
}

}  // namespace jax_flashkda::chunk_gradient
