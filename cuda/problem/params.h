// What one call computes, as plain data: filled by the FFI handler (or the native tests), read by
// dispatch and the launch functions. Compiles as host C++ without CUDA, so that validation and
// workspace arithmetic are tested on machines with no GPU.
#pragma once

#include <cstdint>

namespace jax_flashkda {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

enum class Gate : int32_t {
  kLogDecay = 0,  // g is the natural-log decay itself
  kSoftplus = 1,  // log decay = -exp(A_log) * softplus(g + dt_bias)
  kBounded = 2,   // log decay = gate_lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
};

// Sizes of a call. Everything that decides launch shapes and workspace bytes is here and nothing
// else does: both must follow from what is known while tracing.
struct ForwardShape {
  int64_t B;   // batch rows
  int64_t T;   // tokens in a row
  int64_t H;   // query/key heads
  int64_t HV;  // value heads, a multiple of H: value head h reads query/key head h / (HV / H)
  int64_t K;   // key dim
  int64_t V;   // value dim
  int64_t N;   // state slots of a row (1 without segment_ids)
  bool has_segment_ids;
};

struct ForwardParams {
  ForwardShape shape;

  DType qkv_dtype;  // q, k, v, o
  DType g_dtype;
  DType beta_dtype;

  const void* q;               // [B, T, H, K]
  const void* k;               // [B, T, H, K]
  const void* v;               // [B, T, HV, V]
  const void* g;               // [B, T, HV, K]
  const void* beta;            // [B, T, HV]
  const float* A_log;          // [B, HV]            may be null
  const float* dt_bias;        // [B, HV, K]         may be null
  const float* initial_state;  // [B, N, HV, K, V]   may be null: zero
  const int32_t* segment_ids;  // [B, T]             may be null: one segment a row
  void* o;                     // [B, T, HV, V]
  float* final_state;          // [B, N, HV, K, V]   may be null: not wanted
  void* workspace;  // workspace_bytes(shape) bytes, uninitialised, 1024-byte aligned by the launch
                    // layer

  Gate gate;
  float gate_lower_bound;
  bool beta_is_logits;
  bool allow_neg_eigval;
  bool qk_l2norm;
  float scale;
  bool has_padding_segment_id;
  int32_t padding_segment_id;
};

}  // namespace jax_flashkda
