// The gradients of the short convolution: with dz = d_y silu'(z), z recomputed, zero at padding,
//   dx[t] = sum_a kernel[W - 1 - a] dz[t + a]           over the tokens of t's segment,
//   d_kernel[w] = sum_t dz[t] tap_w(t),  d_bias = sum_t dz[t],
//   d_initial_state[j] = sum_o kernel[j - o] dz[start + o], 0 <= o <= j.
//
// Grid and walk as the forward's. A thread computes dz of its tokens and of the three behind them,
// and carries the dx of three tokens that later ones still add to: a token adds to those of its run
// alone. Sums over a thread's tokens are added over the CTA's warps in a fixed order and left in
// the workspace [tile, W + 1, C]; short_conv_reduce_kernel adds the tiles of a row, again in a
// fixed order, so there are no atomics and the bits repeat.
//
// Reads x and d_y, writes dx: 3 B T C elements, at 4.3 TB/s and B T = 8192 in bf16 0.421 ms where C
// is 3 * 96 * 128, 0.140 ms where it is 3 * 32 * 128; the tiles' sums add 5 %.
#pragma once

#include "sm90/short_conv/convolution.cuh"

namespace jax_flashkda::short_conv {

// From z to the factor of d_y.
__device__ __forceinline__ float silu_derivative(float z) {
  const float s = sigmoid(z);
  return s * fmaf(z, 1.0f - s, 1.0f);
}

// The sums over a thread's tokens: rows of the kernel, and the bias.
template <class Config>
struct Sums {
  __device__ __forceinline__ void add(const Window<Config::kVector>& window,
                                      const float (&x)[Config::kVector],
                                      const float (&dz)[Config::kVector]) {
#pragma unroll
    for (int j = 0; j < Config::kVector; ++j) {
#pragma unroll
      for (int w = 0; w < kHistory; ++w)
        values[w][j] = fmaf(dz[j], window.before[w][j], values[w][j]);
      values[kHistory][j] = fmaf(dz[j], x[j], values[kHistory][j]);
      values[kWidth][j] += dz[j];
    }
  }

  // Over the CTA's warps, in order.
  __device__ void store(const ShortConvBackwardParams& p, const Part<Config>& part,
                        float (&shared)[Config::kWarps][Config::kSums][Config::kChannels]) const {
    const int warp = threadIdx.x / 32, own = threadIdx.x % 32 * Config::kVector;
#pragma unroll
    for (int w = 0; w < Config::kSums; ++w)
#pragma unroll
      for (int j = 0; j < Config::kVector; ++j) shared[warp][w][own + j] = values[w][j];
    __syncthreads();  // all warps' sums, before any thread adds them
    const int64_t C = p.forward.shape.C;
    float* sums = static_cast<float*>(p.workspace) + int64_t{part.tile} * Config::kSums * C;
    for (int i = threadIdx.x; i < Config::kSums * Config::kChannels; i += Config::kThreads) {
      const int w = i / Config::kChannels, c = i % Config::kChannels;
      if (part.first_channel + c >= C) continue;
      float sum = shared[0][w][c];
#pragma unroll
      for (int other = 1; other < Config::kWarps; ++other) sum += shared[other][w][c];
      sums[w * C + part.first_channel + c] = sum;
    }
  }

  float values[Config::kSums][Config::kVector] = {};
};

// dz of a token: x and d_y are replaced by what counts of them, nothing at padding.
template <class Config>
__device__ __forceinline__ void differentiate(const ShortConvParams& p,
                                              const Window<Config::kVector>& window, bool padding,
                                              float (&x)[Config::kVector],
                                              float (&dz)[Config::kVector]) {
#pragma unroll
  for (int j = 0; j < Config::kVector; ++j) {
    if (p.silu) dz[j] *= silu_derivative(window.value(j, x[j]));
    if (padding) x[j] = dz[j] = 0.0f;
  }
}

// d_initial_state of the segment that begins at token first + start.
template <class Config>
__device__ __forceinline__ void state_gradient(const ShortConvBackwardParams& p,
                                               const Part<Config>& part, const Runs& runs,
                                               int start) {
  using Element = typename Config::Element;
  constexpr int kVector = Config::kVector;
  const ShortConvParams& f = p.forward;
  const int64_t slot = slot_of(f, part, runs, start);
  if (slot < 0) return;
  RowWindow<Config> window(f, part);
  window.restart(f, part, runs, start);
  float gradient[kHistory][kVector] = {};
#pragma unroll
  for (int o = 0; o < kHistory; ++o) {
    if (o > 0 && runs.begin(start + o)) break;
    Packed<Config> packed_x, packed_dz;
    packed_x.load(static_cast<const Element*>(f.x) + part.at(f.shape, start + o));
    packed_dz.load(static_cast<const Element*>(p.d_y) + part.at(f.shape, start + o));
    float x[kVector], dz[kVector];
    packed_x.unpack(x);
    packed_dz.unpack(dz);
    differentiate<Config>(f, window, false, x, dz);
    window.push(x);
#pragma unroll
    for (int j = o; j < kHistory; ++j)
#pragma unroll
      for (int c = 0; c < kVector; ++c)
        gradient[j][c] = fmaf(window.kernel[j - o][c], dz[c], gradient[j][c]);
  }
#pragma unroll
  for (int j = 0; j < kHistory; ++j)
    store_elements(p.d_initial_state, DType::kF32, state_at(f.shape, part, slot) + j * f.shape.C,
                   gradient[j]);
}

// dx of the last three tokens, oldest first, so far.
template <int kVector>
struct Pending {
  // A token adds to those before it in its run. begins(a): a run begins a tokens before it.
  template <class Begins>
  __device__ __forceinline__ void add(const Window<kVector>& window, const float (&dz)[kVector],
                                      Begins begins) {
#pragma unroll
    for (int age = 1; age <= kHistory; ++age) {
      if (begins(age - 1)) return;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float& dx = values[kHistory - age][j];
        dx = fmaf(window.kernel[kHistory - age][j], dz[j], dx);
      }
    }
  }
  __device__ __forceinline__ void push(const Window<kVector>& window, const float (&dz)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
#pragma unroll
      for (int w = 0; w + 1 < kHistory; ++w) values[w][j] = values[w + 1][j];
      values[kHistory - 1][j] = window.kernel[kHistory][j] * dz[j];
    }
  }

  float values[kHistory][kVector] = {};
};

// What a thread reads and writes, from the warp's first token on.
template <class Config>
struct Operands {
  using Element = typename Config::Element;

  __device__ Operands(const ShortConvBackwardParams& p, const Part<Config>& part) {
    const ShortConvShape& s = p.forward.shape;
    const int64_t start = part.at(s, 0), left = s.T - part.first;
    x = static_cast<const Element*>(p.forward.x) + start;
    d_y = static_cast<const Element*>(p.d_y) + start;
    dx = static_cast<Element*>(p.dx) + start;
    const int wanted = part.tokens + kHistory;
    existing = static_cast<int>(left < wanted ? left : wanted);
  }
  const Element *x, *d_y;
  Element* dx;
  int existing;  // tokens: the warp's own and at most three behind them
};

// kBatch tokens from `first` on. Plain ones: all are the warp's own, as are the three before them,
// and in none of these does a run begin.
template <bool kPlain, class Config>
__device__ __forceinline__ void differentiate_batch(const ShortConvParams& p,
                                                    const Part<Config>& part, const Runs& runs,
                                                    const Operands<Config>& operands, int first,
                                                    RowWindow<Config>& window, Sums<Config>& sums,
                                                    Pending<Config::kVector>& pending) {
  constexpr int kVector = Config::kVector, kBatch = Config::kBatch;
  const int64_t C = p.shape.C, start = first * C;
  Packed<Config> batch_x[kBatch], batch_d_y[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (!kPlain && first + i >= operands.existing) continue;  // zeros, a run of their own
    batch_x[i].load(operands.x + start + i * C);
    batch_d_y[i].load(operands.d_y + start + i * C);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int at = first + i;
    if (!kPlain && at >= part.tokens + kHistory) break;
    if (!kPlain && runs.begin(at) && at < operands.existing) window.restart(p, part, runs, at);
    float x[kVector], dz[kVector];
    batch_x[i].unpack(x);
    batch_d_y[i].unpack(dz);
    differentiate<Config>(p, window, !kPlain && runs.padding(at), x, dz);
    if (kPlain || at < part.tokens) sums.add(window, x, dz);
    pending.add(window, dz, [&](int age) { return !kPlain && runs.begin(at - age); });
    if (kPlain || at >= kHistory) {
      float dx[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        dx[j] = !kPlain && runs.padding(at - kHistory) ? 0.0f : pending.values[0][j];
      Packed<Config> packed;
      packed.pack(dx);
      packed.store(operands.dx + start + (i - kHistory) * C);
    }
    pending.push(window, dz);
    window.push(x);
  }
}

template <class Config>
__device__ __forceinline__ void differentiate_tokens(const ShortConvBackwardParams& p,
                                                     const Part<Config>& part, const Runs& runs,
                                                     Sums<Config>& sums) {
  constexpr int kBatch = Config::kBatch;
  static_assert(kBatch >= kHistory, "only the first batch lacks tokens before it");
  const Operands<Config> operands(p, part);
  RowWindow<Config> window(p.forward, part);
  window.load_history(p.forward, part, runs);
  Pending<Config::kVector> pending;
#pragma unroll 1
  for (int first = 0; first < part.tokens + kHistory; first += kBatch) {
    if (first > 0 && first + kBatch <= part.tokens &&
        runs.plain(first - kHistory, kBatch + kHistory))
      differentiate_batch<true>(p.forward, part, runs, operands, first, window, sums, pending);
    else
      differentiate_batch<false>(p.forward, part, runs, operands, first, window, sums, pending);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    short_conv_backward_kernel(const __grid_constant__ ShortConvBackwardParams p, int walk) {
  __shared__ float shared[Config::kWarps][Config::kSums][Config::kChannels];
  let_next_kernel_start();
  const Part<Config> part(p.forward.shape, walk);
  const Runs runs(p.forward, part);  // by whole warps
  Sums<Config> sums;
  if (part.tokens > 0) {
    if (p.d_initial_state != nullptr) {
#pragma unroll 1
      for (int i = 0; i < part.tokens; ++i)
        if (runs.begin(i)) state_gradient(p, part, runs, i);
    }
    differentiate_tokens(p, part, runs, sums);
  }
  sums.store(p, part, shared);
}

// d_kernel and d_bias: the sums of a row's tiles. Grid: a CTA for every kChannels channels of every
// sum of every row; its warps take every eighth tile each, and then warp 0 adds up the warps.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    short_conv_reduce_kernel(const __grid_constant__ ShortConvBackwardParams p, int64_t tiles) {
  constexpr int kWarps = Config::kWarps;
  __shared__ float4 shared[kWarps][32];
  const int64_t C = p.forward.shape.C;
  const uint32_t groups = static_cast<uint32_t>((C + Config::kChannels - 1) / Config::kChannels);
  const uint32_t sums = static_cast<uint32_t>(p.d_bias != nullptr ? kWidth + 1 : kWidth);
  const uint32_t w = blockIdx.x / groups % sums;
  const int64_t row = blockIdx.x / groups / sums;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel = int64_t{blockIdx.x % groups} * Config::kChannels + lane * Config::kVector;
  const bool exists = channel < C;
  const auto add = [](float4& sum, const float4& more) {
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  };
  wait_for_earlier_kernel();  // the sums of the tiles
  float4 sum = {};
  const float* from =
      static_cast<const float*>(p.workspace) + (row * tiles * kShortConvSums + w) * C + channel;
  if (exists) {
#pragma unroll 8
    for (int64_t tile = warp; tile < tiles; tile += kWarps)
      add(sum, __ldcg(reinterpret_cast<const float4*>(from + tile * kShortConvSums * C)));
  }
  shared[warp][lane] = sum;
  __syncthreads();  // all warps' sums, before warp 0 adds them
  if (warp > 0 || !exists) return;
  for (int other = 1; other < kWarps; ++other) add(sum, shared[other][lane]);
  float* to = w < kWidth ? p.d_kernel + (row * kWidth + w) * C : p.d_bias + row * C;
  store_elements(to, DType::kF32, channel, {sum.x, sum.y, sum.z, sum.w});
}

}  // namespace jax_flashkda::short_conv
