// y = silu(z) or z, z = bias + sum_w kernel[w] x[t - (W - 1) + w] inside segments
// (problem/short_conv.h), zero at padding.
//
// Grid: a CTA for every kChannels channels of every 4 walks of tokens of a row. A thread keeps its
// channels' kernel and the three inputs before a token in registers and moves along the tokens;
// where a run begins the window starts anew, which is all there is of segments: ids are compared,
// no table is needed. Only the three tokens before a walk are read twice, and those come out of L2.
//
// Reads x [B, T, C], writes y: 2 B T C elements and nothing else of size, so the time is their
// bytes at 4.3 TB/s. For B T = 8192 in bf16: 0.281 ms where C is 3 * 96 * 128, 0.094 ms where it is
// 3 * 32 * 128. Two special-function operations an element, 0.16 ms of 0.28, stay below it.
#pragma once

#include "sm90/short_conv/convolution.cuh"

namespace jax_flashkda::short_conv {

// kBatch tokens from `first` on, at x and y. Plain ones: all of them exist, and no run begins.
template <bool kPlain, class Config>
__device__ __forceinline__ void convolve_batch(const ShortConvParams& p, const Part<Config>& part,
                                               const Runs& runs, RowWindow<Config>& window,
                                               int first, const typename Config::Element* x,
                                               typename Config::Element* y) {
  constexpr int kVector = Config::kVector, kBatch = Config::kBatch;
  Packed<Config> batch[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (kPlain || first + i < part.tokens) batch[i].load(x + i * p.shape.C);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (!kPlain && first + i >= part.tokens) break;
    if (!kPlain && runs.begin(first + i)) window.restart(p, part, runs, first + i);
    float now[kVector], out[kVector];
    batch[i].unpack(now);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float z = window.value(j, now[j]);
      out[j] = p.silu ? z * sigmoid(z) : z;
      if (!kPlain && runs.padding(first + i)) out[j] = 0.0f;
    }
    window.push(now);
    Packed<Config> packed;
    packed.pack(out);
    packed.store(y + i * p.shape.C);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    short_conv_kernel(const __grid_constant__ ShortConvParams p, int walk) {
  using Element = typename Config::Element;
  constexpr int kBatch = Config::kBatch;
  const Part<Config> part(p.shape, walk);
  const Runs runs(p, part);  // by whole warps
  if (part.tokens == 0) return;
  RowWindow<Config> window(p, part);
  window.load_history(p, part, runs);

  const Element* x = static_cast<const Element*>(p.x) + part.at(p.shape, 0);
  Element* y = static_cast<Element*>(p.y) + part.at(p.shape, 0);
#pragma unroll 1
  for (int first = 0; first < part.tokens; first += kBatch) {
    if (first + kBatch <= part.tokens && runs.plain(first, kBatch))
      convolve_batch<true>(p, part, runs, window, first, x, y);
    else
      convolve_batch<false>(p, part, runs, window, first, x, y);
    x += kBatch * p.shape.C;
    y += kBatch * p.shape.C;
  }
}

}  // namespace jax_flashkda::short_conv
