// What one call of the short convolution computes, as plain data, and how its tokens are divided.
// Host C++ without CUDA, like params.h.
//
//   z[b, t, c] = bias[b, c] + sum_w kernel[b, w, c] x[b, t - (W - 1) + w, c],   y = silu(z) or z
//
// where a tap is zero unless all tokens from it to t carry one id: in place of those before the
// first token of a segment stand the rows of its initial state, if there is one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem/params.h"

namespace jax_flashkda {

inline constexpr int64_t kShortConvWidth = 4;                      // W
inline constexpr int64_t kShortConvHistory = kShortConvWidth - 1;  // rows of a state
// Channels come in whole 16-byte pieces of the narrowest type.
inline constexpr int64_t kShortConvChannelMultiple = 8;

struct ShortConvShape {
  int64_t B;  // batch rows
  int64_t T;  // tokens in a row
  int64_t C;  // channels
  int64_t N;  // segments of a row that have an initial state
};

struct ShortConvParams {
  ShortConvShape shape;

  DType dtype;  // x, y: f32 or bf16

  const void* x;               // [B, T, C]
  const float* kernel;         // [B, W, C]         the last row multiplies the token itself
  const float* bias;           // [B, C]            may be null: zero
  const float* initial_state;  // [B, N, W - 1, C]  may be null: zero
  const int32_t*
      segment_ids;  // [B, T]  may be null: one segment a row. With initial_state an id is
                    // the slot of its segment, and the initial state of ids past N zero
  void* y;          // [B, T, C]

  bool silu;
  bool has_padding_segment_id;
  int32_t padding_segment_id;
};

// The gradients of one call. Everything is recomputed from the forward's inputs.
struct ShortConvBackwardParams {
  ShortConvParams forward;  // y null

  const void* d_y;         // [B, T, C]         type of x
  void* dx;                // [B, T, C]
  float* d_kernel;         // [B, W, C]
  float* d_bias;           // [B, C]            null where the call has no bias
  float* d_initial_state;  // [B, N, W - 1, C]  null where the call has no initial_state
  void* workspace;         // short_conv_workspace_bytes(shape) bytes, uninitialised
};

struct ShortConvStepShape {
  int64_t N;      // sequences
  int64_t T;      // tokens of each, 1 to kMostStepTokens
  int64_t C;      // channels
  int64_t slots;  // states in the pool; N without state_indices
};

// The next tokens of every sequence, the inputs before them kept in place.
struct ShortConvStepParams {
  ShortConvStepShape shape;

  DType dtype;         // x, y
  DType kernel_dtype;  // kernel, bias
  DType state_dtype;

  const void* x;                 // [N, T, C]
  const void* kernel;            // [P, W, C]
  const void* bias;              // [P, C]             may be null: zero
  const int32_t* state_indices;  // [N]                may be null: sequence n has state n
  void* state;                   // [slots, W - 1, C]  read and written
  void* y;                       // [N, T, C]

  bool silu;
  bool parameters_per_sequence;  // P is N; else 1
};

// A warp walks along this many consecutive tokens, a CTA of kShortConvWarps along those of all its
// warps, and where channels and tokens are few the walks are short, so that all multiprocessors
// work. The backward leaves a sum over each CTA's tokens.
inline constexpr int64_t kShortConvWarps = 4;
inline constexpr int64_t kLongestShortConvWalk = 32;
inline constexpr int64_t kShortConvSums = kShortConvWidth + 1;  // of the kernel's rows and the bias

inline int64_t short_conv_tiles(const ShortConvShape& s, int64_t walk) {
  return (s.T + kShortConvWarps * walk - 1) / (kShortConvWarps * walk);
}

inline int64_t short_conv_walk(const ShortConvShape& s) {
  constexpr int64_t kShortest = 8, kChannelsOfCta = 128, kEnoughCtas = 4 * 132;
  const int64_t groups = (s.C + kChannelsOfCta - 1) / kChannelsOfCta;
  int64_t walk = kLongestShortConvWalk;
  while (walk > kShortest && s.B * short_conv_tiles(s, walk) * groups < kEnoughCtas) walk /= 2;
  return walk;
}

}  // namespace jax_flashkda
