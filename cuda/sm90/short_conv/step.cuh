// The short convolution of the next 1 to 8 tokens of N sequences, and the inputs to go on from, in
// place: state <- the last W - 1 of (state, x).
//
// Grid: a CTA for every kThreads * kVector channels of kSequences sequences, which share the loads
// of the kernel: its four rows in fp32 are twice the bytes of all else that a token reads. All that a
// thread needs is loaded at once, so a step takes one latency of memory where all CTAs run together:
// reads x [N, T, C], the kernel and the state [slots, W - 1, C], writes y and the state. The 12.6 MB
// of N = 64, T = 1, C = 3 * 32 * 128 in bf16 would be 2.9 us at 4.3 TB/s; what is in L2 comes faster,
// and a launch costs about as much.
//
// A sequence without a slot writes zeros to y and nothing else. Two sequences with one slot both
// read and write it, in bounds and in no order.
#pragma once

#include "sm90/short_conv/convolution.cuh"

namespace jax_flashkda::short_conv {

// Four consecutive elements of a type known when the kernel runs, in the registers that a load puts
// them in until all loads are on their way. Nothing branches around a load, and no two loads write
// the same register: the second would wait for the first even where only one of them takes place.
class FourElements {
 public:
  __device__ __forceinline__ void load(const void* from, DType dtype, int64_t first, bool wanted) {
    const bool wide = dtype == DType::kF32;
    const char* address = static_cast<const char*>(from) + first * (wide ? 4 : 2);
    asm volatile(
        "{\n.reg .pred wanted, wide;\n"
        "setp.ne.s32 wanted, %5, 0;\n"
        "setp.ne.s32 wide, %6, 0;\n"
        "@wanted ld.global.v2.u32 {%0, %1}, [%4];\n"
        "@wide ld.global.v2.u32 {%2, %3}, [%4 + 8];\n}"
        : "+r"(words_[0]), "+r"(words_[1]), "+r"(words_[2]), "+r"(words_[3])
        : "l"(address), "r"(int{wanted}), "r"(int{wanted && wide})
        : "memory");
  }
  __device__ __forceinline__ void convert(DType dtype, float (&x)[4]) const {
    if (dtype == DType::kF32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(words_[i]);
    } else if (dtype == DType::kBF16) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = i % 2 == 0 ? bf16_low(words_[i / 2]) : bf16_high(words_[i / 2]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = __half2float(
            __ushort_as_half(static_cast<unsigned short>(words_[i / 2] >> i % 2 * 16)));
    }
  }

 private:
  uint32_t words_[4] = {};
};

// One sequence's tokens and inputs before them, at a thread's channels.
template <class Config>
class StepSequence {
 public:
  __device__ __forceinline__ void load_slot(const ShortConvStepParams& p, int64_t n,
                                            int64_t channel) {
    is_there_ = n < p.shape.N;
    n = is_there_ ? n : 0;
    first_ = n * p.shape.T * p.shape.C + channel;
    slot_ = p.state_indices != nullptr ? p.state_indices[n] : n;
  }
  __device__ __forceinline__ void load_tokens(const ShortConvStepParams& p) {
#pragma unroll
    for (int t = 0; t < Config::kTokens; ++t)
      tokens_[t].load(p.x, p.dtype, first_ + t * p.shape.C, is_there_ && t < p.shape.T);
  }
  __device__ __forceinline__ void load_state(const ShortConvStepParams& p, int64_t channel) {
    has_slot_ = is_there_ && slot_ >= 0 && slot_ < p.shape.slots;
    state_ = slot_ * kHistory * p.shape.C + channel;
#pragma unroll
    for (int w = 0; w < kHistory; ++w)
      before_[w].load(p.state, p.state_dtype, state_ + w * p.shape.C, has_slot_);
  }

  // The window holds the kernel.
  __device__ __forceinline__ void step(const ShortConvStepParams& p,
                                       Window<Config::kVector>& window) const {
    if (!is_there_) return;
#pragma unroll
    for (int w = 0; w < kHistory; ++w) before_[w].convert(p.state_dtype, window.before[w]);
#pragma unroll
    for (int t = 0; t < Config::kTokens; ++t) {
      if (t >= p.shape.T) break;
      float x[Config::kVector], y[Config::kVector];
      tokens_[t].convert(p.dtype, x);
#pragma unroll
      for (int j = 0; j < Config::kVector; ++j) {
        const float z = window.value(j, x[j]);
        y[j] = !has_slot_ ? 0.0f : p.silu ? z * sigmoid(z) : z;
      }
      window.push(x);
      store_elements(p.y, p.dtype, first_ + t * p.shape.C, y);
    }
    if (!has_slot_) return;
#pragma unroll
    for (int w = 0; w < kHistory; ++w)
      store_elements(p.state, p.state_dtype, state_ + w * p.shape.C, window.before[w]);
  }

 private:
  FourElements tokens_[Config::kTokens], before_[kHistory];
  int64_t first_, slot_, state_;  // first_, state_: elements before those of x and y, of the state
  bool is_there_, has_slot_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    short_conv_step_kernel(const __grid_constant__ ShortConvStepParams p) {
  constexpr int kVector = Config::kVector, kSequences = Config::kSequences;
  const int64_t C = p.shape.C;
  const auto groups =
      static_cast<uint32_t>((C + Config::kThreads * kVector - 1) / (Config::kThreads * kVector));
  const int64_t n = int64_t{blockIdx.x / groups} * kSequences;
  const int64_t channel = (int64_t{blockIdx.x % groups} * Config::kThreads + threadIdx.x) * kVector;
  if (channel >= C) return;
  const int64_t parameters = p.parameters_per_sequence ? n : 0;  // then kSequences is 1

  StepSequence<Config> sequences[kSequences];
  FourElements kernel[kWidth], bias;
#pragma unroll
  for (int i = 0; i < kSequences; ++i) sequences[i].load_slot(p, n + i, channel);
#pragma unroll
  for (int w = 0; w < kWidth; ++w)
    kernel[w].load(p.kernel, p.kernel_dtype, (parameters * kWidth + w) * C + channel, true);
  bias.load(p.bias, p.kernel_dtype, parameters * C + channel, p.bias != nullptr);
#pragma unroll
  for (int i = 0; i < kSequences; ++i) sequences[i].load_tokens(p);
#pragma unroll
  for (int i = 0; i < kSequences; ++i) sequences[i].load_state(p, channel);

  Window<kVector> window;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) kernel[w].convert(p.kernel_dtype, window.kernel[w]);
  bias.convert(p.kernel_dtype, window.bias);
#pragma unroll
  for (int i = 0; i < kSequences; ++i) sequences[i].step(p, window);
}

}  // namespace jax_flashkda::short_conv
