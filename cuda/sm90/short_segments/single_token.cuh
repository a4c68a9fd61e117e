// Segments of one token: o = scale <q, k> beta v, in fp32. A half warp each.
#pragma once

#include "chunk/l2norm.cuh"
#include "sm90/short_segments/items.cuh"

namespace jax_flashkda::short_segments {

// Eight channels of the half warp's token. The decay meets nothing, but a NaN in it must show.
template <DType kGateType>
struct Token {
  Item item;
  uint4 q, k, v, g[kGateType == DType::kF32 ? 2 : 1];
  uint32_t beta;

  // Where there is no more token, the last one again.
  __device__ __forceinline__ void load(const ForwardParams& p, int lane) {
    q = load_early(static_cast<const uint4*>(p.q) + item.qk_row * 16 + lane);
    k = load_early(static_cast<const uint4*>(p.k) + item.qk_row * 16 + lane);
    v = load_early(static_cast<const uint4*>(p.v) + item.value_row * 16 + lane);
    constexpr int kParts = kGateType == DType::kF32 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      g[i] = load_early(static_cast<const uint4*>(p.g) + (item.value_row * 16 + lane) * kParts + i);
    beta = load_beta_word(p, item.value_row);
  }

  // 0, or NaN: whose bits are, but for the sign, greater than those of all other numbers.
  __device__ __forceinline__ float poison() const {
    if constexpr (kGateType == DType::kF32) {
      const auto largest = [](const uint4& x) {
        return max(max(x.x & 0x7fffffffu, x.y & 0x7fffffffu),
                   max(x.z & 0x7fffffffu, x.w & 0x7fffffffu));
      };
      return max(largest(g[0]), largest(g[1])) > 0x7f800000u ? NAN : 0.0f;
    } else {
      const uint32_t largest = __vmaxu2(__vmaxu2(g[0].x & 0x7fff7fffu, g[0].y & 0x7fff7fffu),
                                        __vmaxu2(g[0].z & 0x7fff7fffu, g[0].w & 0x7fff7fffu));
      return max(largest >> 16, largest & 0xffffu) > 0x7f80u ? NAN : 0.0f;
    }
  }

  __device__ __forceinline__ void store(const ForwardParams& p, int lane) const {
    const auto dot = [](const uint4& x, const uint4& y) {
      const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fmaf(bf16_low(a[i]), bf16_low(b[i]), sum);
        sum = fmaf(bf16_high(a[i]), bf16_high(b[i]), sum);
      }
      return sum;
    };
    float score = dot(q, k) + poison(), of_q = dot(q, q), of_k = dot(k, k);
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) {
      score += __shfl_xor_sync(0xffffffffu, score, distance);
      of_q += __shfl_xor_sync(0xffffffffu, of_q, distance);
      of_k += __shfl_xor_sync(0xffffffffu, of_k, distance);
    }
    if (p.qk_l2norm) score = score * l2norm_factor(of_q) * l2norm_factor(of_k);
    const float factor = p.scale * score * beta_from_word(p, beta);
    const auto scaled = [&](uint32_t pair) {
      return pack_bf16(factor * bf16_low(pair), factor * bf16_high(pair));
    };
    if (item.length > 0)
      static_cast<uint4*>(p.o)[item.value_row * 16 + lane] =
          make_uint4(scaled(v.x), scaled(v.y), scaled(v.z), scaled(v.w));
  }
};

template <DType kGateType>
__device__ __forceinline__ void walk_single_tokens(const ForwardParams& p,
                                                   const ForwardWorkspace& w) {
  const int lane = lane_index();
  Walk walk = start_walk(p, w, kOneToken, 2 * warp_number() + lane / 16, 2 * warps());
  for (bool more = walk.count > 0; more;) {
    Token<kGateType> tokens[Config::kSingleTokens];
#pragma unroll
    for (auto& token : tokens) {
      token.item = item_at(walk, p);
      advance(walk, p);
    }
#pragma unroll
    for (auto& token : tokens) token.load(p, lane % 16);
    more = __any_sync(0xffffffffu, tokens[Config::kSingleTokens - 1].item.length > 0);
#pragma unroll
    for (auto& token : tokens) token.store(p, lane % 16);
  }
}

}  // namespace jax_flashkda::short_segments
