// d_beta of a chunk of one token, which ends its segment. Of U = beta (v - (k exp(g)) S),
//
//   d_beta = <v - (k exp(g)) S, scale <q, k> dO + k dS'>
//
// is one number, a sum over V that may cancel, and R, dR and U come rounded from the scans: an error
// that is lost among the 64 of a whole chunk is all of this one's. So both rows are found once more
// in fp32, from the inputs, the state ahead of the token and the caller's d_final_state.
#pragma once

#include "sm90/chunk_gradient/factors.cuh"

namespace jax_flashkda::chunk_gradient {

// The token's element of a row of bf16.
__device__ __forceinline__ float first_token(const uint8_t* tile, int piece_offset, int channel) {
  return __uint_as_float(
      uint32_t{*reinterpret_cast<const uint16_t*>(tile + piece_offset + 2 * (channel & 7))} << 16);
}

template <DType kGateType>
__device__ __forceinline__ float first_token_decay(const Shared<kGateType>& s,
                                                   const ForwardParams& p, int channel) {
  constexpr int kChannels = Config::kHeadDim / kGatePieces<kGateType>;  // of a piece
  const int piece = gate_piece_offset<kGateType>(0, channel / kChannels);
  const float g = kGateType == DType::kBF16
                      ? first_token(s.g, piece, channel)
                      : *reinterpret_cast<const float*>(s.g + piece + 4 * (channel & 3));
  const GateCoefficients c =
      gate_coefficients(p.gate, s.amplitude, s.dt_bias[channel], p.gate_lower_bound);
  if (p.gate == Gate::kSoftplus) return exp2_fast(log2_decay<Gate::kSoftplus>(g, c));
  if (p.gate == Gate::kBounded) return exp2_fast(log2_decay<Gate::kBounded>(g, c));
  return exp2_fast(log2_decay<Gate::kLogDecay>(g, c));
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

// Its parts to SingleToken::d_beta. All threads; the chunk's values are there, its keys on their way.
// A call, so that whole chunks know nothing of its registers: inlined, it made their loop spill more.
template <DType kGateType>
__device__ __noinline__ void find_single_beta_gradient(Shared<kGateType>& s,
                                                       const BackwardParams& b, const Item& item,
                                                       int64_t head) {
  const ForwardParams& p = b.forward;
  SingleToken& x = s.single_token;
  const int thread = reread_thread(), warp = thread / 32, v = thread % Config::kHeadDim;
  wait_for_async_loads<0>();        // q, k, g
  __syncthreads();                  // all threads' copies
  if (thread < Config::kHeadDim) {  // a channel each
    const int piece = tile_offset(0, thread / 8);
    const float q = first_token(s.q, piece, thread), k = first_token(s.k, piece, thread);
    x.key[thread] = k;
    x.decayed_key[thread] = k * first_token_decay(s, p, thread);
    const float qq = sum_warp(q * q), kk = sum_warp(k * k), qk = sum_warp(q * k);
    if (thread % 32 == 0) x.dots[warp] = make_float3(qq, kk, qk);
  }
  __syncthreads();  // keys and dots
  const CallerStates states = find_caller_states(b, item, head);
  const int quarter = thread / Config::kHeadDim;
  x.projections[quarter][v] = make_float2(
      multiply_quarter(x.decayed_key, states.initial, s.values.state, v, quarter),
      states.d_final == nullptr
          ? 0.0f
          : multiply_quarter(x.key, states.d_final, s.values.state_gradient, v, quarter));
  __syncthreads();                  // all quarters
  if (thread < Config::kHeadDim) {  // a column of V each
    float3 dots = {};
    float2 projected = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dots.x += x.dots[i].x, dots.y += x.dots[i].y, dots.z += x.dots[i].z;
      projected.x += x.projections[i][v].x, projected.y += x.projections[i][v].y;
    }
    const float q_norm = p.qk_l2norm ? l2norm_factor(dots.x) : 1.0f,
                k_norm = p.qk_l2norm ? l2norm_factor(dots.y) : 1.0f;
    const float value = __bfloat162float(static_cast<const __nv_bfloat16*>(
        p.v)[(item.token(p.shape) * p.shape.HV + head) * Config::kHeadDim + v]);
    const float d_o = first_token(s.values.d_o[v / 64], swizzle128(0, v / 8 % 8), v);
    const float residual = fmaf(-k_norm, projected.x, value);
    const float d_u = k_norm * fmaf(p.scale * q_norm * dots.z, d_o, projected.y);
    const float sum = sum_warp(residual * d_u);
    if (thread % 32 == 0) x.d_beta[warp] = sum;
  }
}

}  // namespace jax_flashkda::chunk_gradient
