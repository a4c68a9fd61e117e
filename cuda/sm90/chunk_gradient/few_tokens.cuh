// d_beta of a chunk of at most four tokens, which ends its segment. With R_i = v_i - (k_i exp(G_i)) S -
// sum over j < i of A_ij U_j, U_i = beta_i R_i and A_ij = <k_i exp(G_i - G_j), k_j>,
//
//   d_beta_i = <R_i, dU_i>
//   dU_i = scale sum over l >= i of <q_l exp(G_l - G_i), k_i> dO_l + (k_i exp(G_C - G_i)) dS'
//          - sum over l > i of beta_l A_li dU_l
//
// is one number a token, a sum over V that may cancel, and U and dR come rounded from the scans: an
// error that is lost among the 64 of a whole chunk is all there is here. So both rows are found once
// more in fp32, from the inputs, the state ahead of the tokens and the caller's d_final_state.
#pragma once

#include "sm90/chunk_gradient/factors.cuh"

namespace jax_flashkda::chunk_gradient {

// An element of a row of bf16.
__device__ __forceinline__ float row_element(const uint8_t* tile, int piece_offset, int channel) {
  return __uint_as_float(
      uint32_t{*reinterpret_cast<const uint16_t*>(tile + piece_offset + 2 * (channel & 7))} << 16);
}

template <DType kGateType>
__device__ __forceinline__ float token_log2_decay(const Shared<kGateType>& s,
                                                  const ForwardParams& p, int token, int channel) {
  constexpr int kChannels = Config::kHeadDim / kGatePieces<kGateType>;  // of a piece
  const int piece = gate_piece_offset<kGateType>(token, channel / kChannels);
  const float g = kGateType == DType::kBF16
                      ? row_element(s.g, piece, channel)
                      : *reinterpret_cast<const float*>(s.g + piece + 4 * (channel & 3));
  const GateCoefficients c =
      gate_coefficients(p.gate, s.amplitude, s.dt_bias[channel], p.gate_lower_bound);
  if (p.gate == Gate::kSoftplus) return log2_decay<Gate::kSoftplus>(g, c);
  if (p.gate == Gate::kBounded) return log2_decay<Gate::kBounded>(g, c);
  return log2_decay<Gate::kLogDecay>(g, c);
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Over a quarter of the channels: sum of key[c] state[c, v], the caller's state or the image.
__device__ __forceinline__ float multiply_quarter(const float (&key)[Config::kHeadDim],
                                                  const float* state, const uint8_t* image, int v,
                                                  int quarter) {
  float sum = 0.0f;
#pragma unroll 1
  for (int piece = 4 * quarter; piece < 4 * quarter + 4; ++piece) {
    float x[8];
    if (state != nullptr) {
      load_state_piece(x, state, v, piece);
    } else {
      unpack_boundary(x, image, v, piece);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(key[8 * piece + i], x[i], sum);
  }
  return sum;
}

// The log2 decay of tokens first .. last of a channel.
__device__ __forceinline__ float decay_over(const FewTokens& x, int first, int last, int channel) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = first; i <= last; ++i) sum += x.decay[i][channel];
  return sum;
}

// Sums over channels, one for each warp in turn.
template <class Shared>
__device__ __forceinline__ void sum_channels(Shared& s, int length, int warp, int lane) {
  FewTokens& x = s.few;
#pragma unroll 1
  for (int at = warp; at < FewTokens::kSums * length * length; at += Config::kWarps) {
    const int which = at / (length * length), i = at / length % length, j = at % length;
    if (j > i || (which == FewTokens::kQQ && j < i)) continue;
    const uint8_t* left = which == FewTokens::kKK ? s.k : s.q;
    const uint8_t* right = which == FewTokens::kQQ ? s.q : s.k;
    float sum = 0.0f;
#pragma unroll 1
    for (int channel = lane; channel < Config::kHeadDim; channel += 32)
      sum = fmaf(row_element(left, tile_offset(i, channel / 8), channel) *
                     exp2_fast(decay_over(x, j + 1, i, channel)),
                 row_element(right, tile_offset(j, channel / 8), channel), sum);
    sum = sum_warp(sum);
    if (lane == 0) x.sums[which][i][j] = sum;
  }
}

// A column of V: from the products to R, dU and the warp's share of their products' sums.
template <class Shared>
__device__ __forceinline__ void multiply_column(Shared& s, const ForwardParams& p, const Item& item,
                                                int64_t head, int v) {
  FewTokens& x = s.few;
  const auto norm = [&](FewTokens::Sum which, int i) {
    return p.qk_l2norm ? l2norm_factor(x.sums[which][i][i]) : 1.0f;
  };
  const auto A = [&](int i, int j) {
    return norm(FewTokens::kKK, i) * norm(FewTokens::kKK, j) * x.sums[FewTokens::kKK][i][j];
  };
#pragma unroll 1
  for (int i = 0; i < item.length; ++i) {
    const float value = __bfloat162float(static_cast<const __nv_bfloat16*>(
        p.v)[((item.token(p.shape) + i) * p.shape.HV + head) * Config::kHeadDim + v]);
    float residual = fmaf(-norm(FewTokens::kKK, i), x.rows[i][v].x, value);
#pragma unroll 1
    for (int j = 0; j < i; ++j) residual = fmaf(-A(i, j) * x.beta[j], x.rows[j][v].x, residual);
    x.rows[i][v].x = residual;
  }
#pragma unroll 1
  for (int i = item.length - 1; i >= 0; --i) {
    float of_outputs = 0.0f;
#pragma unroll 1
    for (int l = i; l < item.length; ++l)
      of_outputs = fmaf(norm(FewTokens::kQQ, l) * x.sums[FewTokens::kQK][l][i],
                        row_element(s.values.d_o[v / 64], swizzle128(l, v / 8 % 8), v), of_outputs);
    float d_u = norm(FewTokens::kKK, i) * fmaf(p.scale, of_outputs, x.rows[i][v].y);
#pragma unroll 1
    for (int l = i + 1; l < item.length; ++l)
      d_u = fmaf(-A(l, i) * x.beta[l], x.rows[l][v].y, d_u);
    x.rows[i][v].y = d_u;
    const float sum = sum_warp(x.rows[i][v].x * d_u);
    if (v % 32 == 0) x.d_beta[i][v / 32] = sum;
  }
}

// The tokens' parts to FewTokens::d_beta. All threads; the chunk's values are there, its keys on
// their way. A call, so that whole chunks know nothing of its registers: inlined, it made their loop
// spill more.
template <DType kGateType>
__device__ __noinline__ void find_few_beta_gradients(Shared<kGateType>& s, const BackwardParams& b,
                                                     const Item& item, int64_t head) {
  const ForwardParams& p = b.forward;
  FewTokens& x = s.few;
  const int thread = reread_thread(), v = thread % Config::kHeadDim;
  wait_for_async_loads<0>();  // q, k, g
  __syncthreads();            // all threads' copies
  static_assert(Config::kThreads == FewTokens::kMost * Config::kHeadDim);
  x.decay[thread / Config::kHeadDim][v] =
      token_log2_decay(s, p, thread / Config::kHeadDim, v);
  if (thread < item.length)
    x.beta[thread] = beta_from_word(
        p, load_beta_word(p, (item.token(p.shape) + thread) * p.shape.HV + head));
  __syncthreads();  // decays
  sum_channels(s, item.length, thread / 32, thread % 32);
#pragma unroll 1
  for (int i = 0; i < item.length; ++i) {
    if (thread < Config::kHeadDim) {
      const float k = row_element(s.k, tile_offset(i, thread / 8), thread);
      x.decayed_key[thread] = k * exp2_fast(decay_over(x, 0, i, thread));
      x.restored_key[thread] = k * exp2_fast(decay_over(x, i + 1, item.length - 1, thread));
    }
    __syncthreads();  // the token's keys
    const CallerStates states = find_caller_states(b, item, head);
    const int quarter = thread / Config::kHeadDim;
    x.parts[quarter][v] = make_float2(
        multiply_quarter(x.decayed_key, states.initial, s.values.state, v, quarter),
        states.d_final == nullptr ? 0.0f
                                  : multiply_quarter(x.restored_key, states.d_final,
                                                     s.values.state_gradient, v, quarter));
    __syncthreads();  // all quarters
    if (thread < Config::kHeadDim) {
      const float2 parts[4] = {x.parts[0][v], x.parts[1][v], x.parts[2][v], x.parts[3][v]};
      x.rows[i][v] = make_float2((parts[0].x + parts[1].x) + (parts[2].x + parts[3].x),
                                 (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y));
    }
  }
  // The sums and beta came before barriers, the rows are the thread's own.
  if (thread < Config::kHeadDim) multiply_column(s, p, item, head, thread);
}

}  // namespace jax_flashkda::chunk_gradient
