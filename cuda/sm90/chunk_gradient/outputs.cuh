// Sums over scores and states to the gradients of the raw inputs.
#pragma once

#include "sm90/chunk_gradient/scores.cuh"

namespace jax_flashkda::chunk_gradient {

// The parts through the states, which come as bare products, under the tokens' references:
//   dq_d = scale dO S^T      dk_d = -dR S^T      dk_r = U dS'^T
// Returns for each channel sum over j of k_j exp(G_C - G_j) dk_r_j: what the chunk's whole decay
// gets from the restored keys.
__device__ __forceinline__ void refer_state_parts(Sums& sums, float (&restored)[2],
                                                  const Factors& f, const Decays& d, float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) restored[h] = 0.0f;
#pragma unroll
  for (int n = 0; n < Config::kGroups; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int block = n >> 1;
      const float row = exp2_fast(d.row_reference[block][h]),
                  column = exp2_fast(d.end_integer[h] - d.column_reference(block, h) +
                                     d.end_fraction[h]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 2 * h + e;
        sums.q_row[n][i] *= scale * row;
        sums.k_row[n][i] *= -row;
        sums.k_column[n][i] *= column;
      }
      const uint32_t k = f.k_column[2 * n + h];
      restored[h] = fmaf(bf16_low(k), sums.k_column[n][2 * h], restored[h]);
      restored[h] = fmaf(bf16_high(k), sums.k_column[n][2 * h + 1], restored[h]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    restored[h] += __shfl_xor_sync(0xffffffffu, restored[h], 1);
    restored[h] += __shfl_xor_sync(0xffffffffu, restored[h], 2);
  }
}

// Sums to gradients of normalised q and k and of G, in their places: q_row becomes dqn, k_row dkn,
// k_column dG. A pair of tokens enters dG with the same rounded factors in its row and its column,
// so that it cancels exactly ahead of both.
template <class Shared>
__device__ __forceinline__ void finish_sums(Sums& sums, const Factors& f, const Shared& s,
                                            const Decays& d, const Place& at) {
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    uint32_t q_raw[4], k_raw[4];
    load_matrices_transposed(q_raw, block_address(s.q, block, at));
    load_matrices_transposed(k_raw, block_address(s.k, block, at));
    float q[2][4], k[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float2 q_norm = load_norms(s, 0, n, at), k_norm = load_norms(s, 1, n, at),
                   diagonal =
                       *reinterpret_cast<const float2*>(&s.d_A_qk_diagonal[8 * n + at.token()]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i >> 1, e = i & 1;
        auto half = [e](uint32_t x) { return e ? bf16_high(x) : bf16_low(x); };
        q[m][i] = half(q_raw[2 * m + h]) * (e ? q_norm.y : q_norm.x);
        k[m][i] = half(k_raw[2 * m + h]) * (e ? k_norm.y : k_norm.x);
        const float own = e ? diagonal.y : diagonal.x;
        const float q_row = sums.q_row[n][i], k_row = sums.k_row[n][i],
                    k_column = sums.k_column[n][i];
        const float down = exp2_fast(d.from_row[n][i]), up = exp2_fast(d.to_column(n, i));
        sums.q_row[n][i] = fmaf(own, k[m][i], down * q_row);
        sums.k_row[n][i] = fmaf(own, q[m][i], fmaf(down, k_row, up * k_column));
        sums.k_column[n][i] =
            fmaf(half(f.q_row[2 * n + h]), q_row,
                 fmaf(half(f.k_row[2 * n + h]), k_row, -half(f.k_column[2 * n + h]) * k_column));
      }
    }
    if (d.far[block]) {
      float dq[2][4], dk[2][4], dG[2][4], G[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dq[m][i] = sums.q_row[2 * block + m][i];
          dk[m][i] = sums.k_row[2 * block + m][i];
          dG[m][i] = sums.k_column[2 * block + m][i];
          G[m][i] = d.from_row[2 * block + m][i];
        }
      add_pairwise_gradients(dq, dk, dG, q, k, G, s, block, at);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums.q_row[2 * block + m][i] = dq[m][i];
          sums.k_row[2 * block + m][i] = dk[m][i];
          sums.k_column[2 * block + m][i] = dG[m][i];
        }
    }
  }
}

// d log decay of token t = sum over i >= t of dG_i, and all of what the chunk's whole decay gets.
__device__ __forceinline__ void sum_from_end(Elements& dG, const float (&end)[2], const Place& at) {
  const int t = at.lane & 3;
  float behind[2] = {end[0], end[1]};
#pragma unroll
  for (int n = Config::kGroups - 1; n >= 0; --n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &x0 = dG[n][2 * h], &x1 = dG[n][2 * h + 1];
      float sum = x0 + x1;
      float other = __shfl_down_sync(0xffffffffu, sum, 1, 4);
      sum += t < 3 ? other : 0.0f;
      other = __shfl_down_sync(0xffffffffu, sum, 2, 4);
      sum += t < 2 ? other : 0.0f;
      other = __shfl_down_sync(0xffffffffu, sum, 1, 4);
      x1 += (t < 3 ? other : 0.0f) + behind[h];
      x0 = sum + behind[h];
      behind[h] += __shfl_sync(0xffffffffu, sum, 0, 4);
    }
  }
}

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
    store_matrices_transposed(block_address(s.g, block, at), r);
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

// Hands half of the remaining values to the lane that differs in the mask and takes its share of
// the others.
template <int kMask, int kHalf, int kCount>
__device__ __forceinline__ void fold_values(float (&values)[kCount], int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = values[i + kHalf];
    values[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kMask);
  }
}

// <qn, dqn> and <kn, dkn> of every token, over all channels: what normalisation takes away.
template <class Shared>
__device__ __forceinline__ void find_dots(Shared& s, const Sums& sums, const Place& at) {
  float parts[4 * Config::kGroups];  // of q, then of k: tokens 8 n + 2 (lane % 4) + e
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    uint32_t q[4], k[4];
    load_matrices_transposed(q, block_address(s.q, block, at));
    load_matrices_transposed(k, block_address(s.k, block, at));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = 2 * block + m;
      const float (&dq)[4] = sums.q_row[n];
      const float (&dk)[4] = sums.k_row[n];
      const uint32_t q0 = q[2 * m], q1 = q[2 * m + 1], k0 = k[2 * m], k1 = k[2 * m + 1];
      parts[2 * n] = fmaf(bf16_low(q0), dq[0], bf16_low(q1) * dq[2]);
      parts[2 * n + 1] = fmaf(bf16_high(q0), dq[1], bf16_high(q1) * dq[3]);
      parts[16 + 2 * n] = fmaf(bf16_low(k0), dk[0], bf16_low(k1) * dk[2]);
      parts[16 + 2 * n + 1] = fmaf(bf16_high(k0), dk[1], bf16_high(k1) * dk[3]);
    }
  }
  fold_values<16, 16>(parts, at.lane);
  fold_values<8, 8>(parts, at.lane);
  fold_values<4, 4>(parts, at.lane);
  const int row = at.lane >> 2, group = 2 * (row & 3);
  float (&to)[kChunk] = s.dot_parts[at.warp][row >> 2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
    *reinterpret_cast<float2*>(&to[8 * (group + m) + at.token()]) =
        make_float2(parts[2 * m], parts[2 * m + 1]);
  __syncthreads();  // every warp's parts, before they are summed
  if (threadIdx.x < 2 * kChunk) {
    const int of_k = threadIdx.x / kChunk, token = threadIdx.x % kChunk;
    const float norm = s.norms[of_k][token];
    float dot = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Config::kWarps; ++warp) dot += s.dot_parts[warp][of_k][token];
    // Of normalised rows, and once more their factor, which stands before each raw element.
    s.dots[of_k][token] = dot * norm * norm;
  }
  __syncthreads();  // the sums, before everybody reads them
}

// dx = f (dxn - xn <xn, dxn>) with xn = f x, in the place of x, or for a group of heads in fp32 to
// the workspace.
template <class Shared>
__device__ __forceinline__ void write_key_gradients(uint8_t* tile, const Shared& s, int of_k,
                                                    const Elements& d, bool qk_l2norm,
                                                    float* head_gradients, int64_t stride,
                                                    int length, const Place& at) {
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    float dx[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) dx[m][i] = d[2 * block + m][i];
    const uint32_t place = block_address(tile, block, at);
    if (qk_l2norm) {
      uint32_t raw[4];
      load_matrices_transposed(raw, place);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int n = 2 * block + m;
        const float2 norm = load_norms(s, of_k, n, at),
                     dot = *reinterpret_cast<const float2*>(&s.dots[of_k][8 * n + at.token()]);
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

// Of U = Ainv R with Ainv = (..)^-1 Diag(beta): sum over v of (dR / beta) (U / beta), and through
// the sigmoid.
__device__ __forceinline__ void write_beta_gradient(const BackwardParams& b, int64_t at,
                                                    float d_r_times_u) {
  const ForwardParams& p = b.forward;
  const bool bf16 = p.beta_dtype == DType::kBF16;
  const float raw = bf16 ? bf16_low(static_cast<const uint16_t*>(p.beta)[at])
                         : static_cast<const float*>(p.beta)[at];
  const float value = beta_value(raw, p.beta_is_logits, p.allow_neg_eigval);
  const float divisor = nonzero_beta(value);
  float d = d_r_times_u / divisor / divisor;
  if (p.beta_is_logits) d *= value * (1.0f - (p.allow_neg_eigval ? 0.5f : 1.0f) * value);
  if (bf16) {
    static_cast<uint16_t*>(b.d_beta)[at] = static_cast<uint16_t>(pack_bf16(d, 0.0f));
  } else {
    static_cast<float*>(b.d_beta)[at] = d;
  }
}

// Adds a row's sums to the CTA's partial of that row.
template <class Shared>
__device__ __forceinline__ void add_partial(Shared& s, float* partial, GateSums& sums,
                                            const Place& at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sums.dt_bias[h] += __shfl_xor_sync(0xffffffffu, sums.dt_bias[h], 1);
    sums.dt_bias[h] += __shfl_xor_sync(0xffffffffu, sums.dt_bias[h], 2);
    if ((at.lane & 3) == 0) partial[at.channel() + 8 * h] += sums.dt_bias[h];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    sums.A_log += __shfl_xor_sync(0xffffffffu, sums.A_log, lanes);
  if (at.lane == 0) s.A_sums[at.warp] = sums.A_log;
  __syncthreads();  // every warp's sum, before they are summed
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
