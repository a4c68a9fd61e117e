// What forward and backward of the short convolution share: who works where, where runs begin, and
// the window that moves along the tokens.
#pragma once

#include <cstring>
#include <type_traits>

#include "problem/elements.cuh"
#include "problem/numerics.cuh"
#include "sm90/short_conv/config.h"

namespace jax_flashkda::short_conv {

// kVector consecutive elements as they are in memory.
template <class Config>
struct Packed {
  using Element = typename Config::Element;
  static constexpr int kBytes = sizeof(Element) * Config::kVector, kWords = kBytes / 4;
  using Piece = std::conditional_t<kBytes == 16, uint4, uint2>;
  static_assert(sizeof(Piece) == kBytes);

  __device__ __forceinline__ void load(const Element* from) {
    piece = load_early(reinterpret_cast<const Piece*>(from));
  }
  __device__ __forceinline__ void store(Element* to) const {
    store_whole(reinterpret_cast<Piece*>(to), piece);
  }
  __device__ __forceinline__ void unpack(float (&x)[Config::kVector]) const {
    uint32_t words[kWords];
    memcpy(words, &piece, kBytes);
#pragma unroll
    for (int i = 0; i < Config::kVector; ++i) {
      if constexpr (sizeof(Element) == 4)
        x[i] = __uint_as_float(words[i]);
      else
        x[i] = i % 2 == 0 ? bf16_low(words[i / 2]) : bf16_high(words[i / 2]);
    }
  }
  __device__ __forceinline__ void pack(const float (&x)[Config::kVector]) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(Element) == 4)
        words[i] = __float_as_uint(x[i]);
      else
        words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    }
    memcpy(&piece, words, kBytes);
  }

  Piece piece = {};
};

template <int kVector>
__device__ __forceinline__ void load_floats(const float* from, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4)
    *reinterpret_cast<float4*>(&x[i]) = __ldg(reinterpret_cast<const float4*>(from + i));
}

// Where a thread works. The CTAs of a tile's channels are next to each other, so that those that
// run together read whole rows.
template <class Config>
struct Part {
  __device__ Part(const ShortConvShape& s, int walk) {
    const uint32_t groups =
        static_cast<uint32_t>((s.C + Config::kChannels - 1) / Config::kChannels);
    const uint32_t tiles =
        static_cast<uint32_t>((s.T + Config::kWarps * walk - 1) / (Config::kWarps * walk));
    tile = blockIdx.x / groups;
    row = tile / tiles;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first_channel = int64_t{blockIdx.x % groups} * Config::kChannels;
    channel = first_channel + lane * Config::kVector;
    first = (int64_t{tile % tiles} * Config::kWarps + warp) * walk;
    const int64_t left = s.T - first;
    tokens = channel >= s.C || left <= 0 ? 0 : static_cast<int>(left < walk ? left : walk);
  }
  // Elements before this thread's channels of token `first` + i.
  __device__ int64_t at(const ShortConvShape& s, int i) const {
    return (row * s.T + first + i) * s.C + channel;
  }

  uint32_t tile;  // of all rows
  int64_t row, first_channel, channel;
  int64_t first;  // the warp's first token
  int tokens;     // of the warp; 0 where a thread has no channels
};

// Of the tokens around a warp's: bit i + kHistory belongs to token first + i. A run begins at the
// start of a row, where the id changes, and behind the last token.
struct Runs {
  template <class Part>
  __device__ Runs(const ShortConvParams& p, const Part& part) {
    const int32_t* ids = p.segment_ids != nullptr ? p.segment_ids + part.row * p.shape.T : nullptr;
    const int64_t T = p.shape.T;
    uint32_t begin_words[2], padding_words[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t t = part.first - kHistory + threadIdx.x % 32 + 32 * half;
      bool begin = t == 0 || t >= T, is_padding = false;
      if (ids != nullptr && t >= 0 && t < T) {
        const int32_t id = ids[t];
        begin |= id != ids[t > 0 ? t - 1 : 0];
        is_padding = id < 0 || (p.has_padding_segment_id && id == p.padding_segment_id);
      }
      begin_words[half] = __ballot_sync(0xffffffffu, begin);
      padding_words[half] = __ballot_sync(0xffffffffu, is_padding);
    }
    begins = begin_words[0] | uint64_t{begin_words[1]} << 32;
    paddings = padding_words[0] | uint64_t{padding_words[1]} << 32;
  }
  __device__ bool begin(int i) const { return begins >> (i + kHistory) & 1; }
  __device__ bool padding(int i) const { return paddings >> (i + kHistory) & 1; }
  // Whether no run begins and nothing is padding from token first + i on.
  __device__ bool plain(int i, int count) const {
    return ((begins | paddings) >> (i + kHistory) & ((uint64_t{1} << count) - 1)) == 0;
  }

  uint64_t begins, paddings;
};
static_assert(kLongestShortConvWalk + 2 * kHistory <= 64, "bits of Runs");

// The slot of the initial state of token first + i's segment; negative where there is none.
template <class Part>
__device__ __forceinline__ int64_t slot_of(const ShortConvParams& p, const Part& part,
                                           const Runs& runs, int i) {
  if (p.initial_state == nullptr || runs.padding(i)) return -1;
  const int64_t slot =
      p.segment_ids != nullptr ? p.segment_ids[part.row * p.shape.T + part.first + i] : 0;
  return slot < p.shape.N ? slot : -1;
}

// Elements before row 0 of this slot, at the thread's channels.
template <class Part>
__device__ __forceinline__ int64_t state_at(const ShortConvShape& s, const Part& part,
                                            int64_t slot) {
  return (part.row * s.N + slot) * kHistory * s.C + part.channel;
}

__device__ __forceinline__ float sigmoid(float z) {
  return reciprocal_fast(1.0f + exp2_fast(-kLog2E * z));
}

// The kernel, and the inputs before a token, oldest first, as the token's segment sees them.
template <int kVector>
struct Window {
  // Before the first token of a segment lies its initial state, or nothing: what was there is
  // dropped and not multiplied by zero, so that a NaN stays where it is.
  template <class Part>
  __device__ __forceinline__ void restart(const ShortConvParams& p, const Part& part,
                                          const Runs& runs, int i) {
    const int64_t slot = slot_of(p, part, runs, i);
#pragma unroll
    for (int w = 0; w < kHistory; ++w) {
      if (slot >= 0) {
        load_floats(p.initial_state + state_at(p.shape, part, slot) + w * p.shape.C, before[w]);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) before[w][j] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ float value(int j, float x) const {
    float z = fmaf(kernel[kWidth - 1][j], x, bias[j]);
#pragma unroll
    for (int w = kHistory - 1; w >= 0; --w) z = fmaf(kernel[w][j], before[w][j], z);
    return z;
  }

  __device__ __forceinline__ void push(const float (&x)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
#pragma unroll
      for (int w = 0; w + 1 < kHistory; ++w) before[w][j] = before[w + 1][j];
      before[kHistory - 1][j] = x[j];
    }
  }

  float kernel[kWidth][kVector], bias[kVector] = {}, before[kHistory][kVector] = {};
};

template <class Config>
struct RowWindow : Window<Config::kVector> {
  using Element = typename Config::Element;

  __device__ __forceinline__ RowWindow(const ShortConvParams& p, const Part<Config>& part) {
    const ShortConvShape& s = p.shape;
#pragma unroll
    for (int w = 0; w < kWidth; ++w)
      load_floats(p.kernel + (part.row * kWidth + w) * s.C + part.channel, this->kernel[w]);
    if (p.bias != nullptr) load_floats(p.bias + part.row * s.C + part.channel, this->bias);
  }

  // The inputs before the warp's first token, zeros for padding.
  __device__ __forceinline__ void load_history(const ShortConvParams& p, const Part<Config>& part,
                                               const Runs& runs) {
    const Element* x = static_cast<const Element*>(p.x);
    Packed<Config> history[kHistory];
#pragma unroll
    for (int i = -kHistory; i < 0; ++i)
      if (part.first + i >= 0) history[i + kHistory].load(x + part.at(p.shape, i));
#pragma unroll
    for (int i = -kHistory; i < 0; ++i) {
      if (part.first + i < 0) continue;
      if (runs.begin(i)) this->restart(p, part, runs, i);
      float values[Config::kVector];
      (runs.padding(i) ? Packed<Config>{} : history[i + kHistory]).unpack(values);
      this->push(values);
    }
  }
};

}  // namespace jax_flashkda::short_conv
