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
  // Of packed shards of longer rows: the last slot is that of the segment that ends its row, whatever
  // its number; the slots before it are those of the first N - 1 others.
  bool tail_slot = false;
};

// When the state stage runs. The results are the same bits.
enum class StageOrder : int32_t {
  kByShape = 0,  // as a cost model of the shape says
  kSerial = 1,
  kOverlapped = 2,  // but for rows that are cut into pieces
  kWholeRows = 3,   // serial, and no row is cut: other bits where it would have been
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
  float* chunk_states;  // [B, T / 64, HV, K, V]     may be null: not wanted. The state after a
                        // whole chunk, at the chunk's first token / 64; the others zero
  void* workspace;  // workspace_bytes(shape) bytes, uninitialised, 1024-byte aligned by the launch
                    // layer

  // What chunk_prepare leaves, where it outlives the call: written by state_maps and state_gradient,
  // read by prepared_forward and prepared_backward. All others have it in the workspace.
  void* prepared;  // [B, HV, T] rows of kOperandBytes: see OperandTile
  float* betas;    // [B, HV, T] pieces of kBetaBytes
  float* decays;   // [B, HV, decay_slots(shape), K]  exp(G_C)

  Gate gate;
  float gate_lower_bound;
  bool beta_is_logits;
  bool allow_neg_eigval;
  bool qk_l2norm;
  float scale;
  bool has_padding_segment_id;
  int32_t padding_segment_id;
  StageOrder stage_order;
  bool nonzero_beta;  // the backward divides by beta: |beta| < 2^-60 counts as 2^-60 of its sign
};

// The gradients of one forward call. Everything is recomputed from the forward's inputs.
struct BackwardParams {
  ForwardParams forward;  // without results, nonzero_beta set; workspace is that of
                          // backward_workspace(shape)

  const void* d_o;             // [B, T, HV, V]     type of v
  const float* d_final_state;  // [B, N, HV, K, V]  may be null: zero

  void* dq;                // [B, T, H, K]
  void* dk;                // [B, T, H, K]
  void* dv;                // [B, T, HV, V]
  void* dg;                // [B, T, HV, K]     type of g
  void* d_beta;            // [B, T, HV]        type of beta
  float* dA_log;           // [B, HV]           null where the call has no A_log
  float* d_dt_bias;        // [B, HV, K]        null where the call has no dt_bias
  float* d_initial_state;  // [B, N, HV, K, V]  null where the call has no initial_state
};

// How the segment that ends each row moves its state: S -> M S + B. Of a shard of longer rows, what
// the others have to know of it.
struct StateMapsParams {
  ForwardParams forward;  // initial_state, o and final_state null; prepared and decays not

  float* factor;  // M [B, HV, K, K]  not written for a row that ends in padding
  float* offset;  // B [B, HV, K, V]  likewise
};

struct StepShape {
  int64_t N;      // sequences
  int64_t T;      // tokens of each, 1 to kMostStepTokens
  int64_t H;      // query/key heads
  int64_t HV;     // value heads, a multiple of H
  int64_t K;      // key dim
  int64_t V;      // value dim
  int64_t slots;  // states in the pool; N without state_indices
};

inline constexpr int64_t kMostStepTokens = 8;

// One decode step: a few tokens of every sequence, token by token, the states in place.
struct StepParams {
  StepShape shape;

  DType qkv_dtype;  // q, k, v, o
  DType g_dtype;
  DType beta_dtype;
  DType state_dtype;  // state, token_states: f32 or bf16

  const void* q;                 // [N, T, H, K]
  const void* k;                 // [N, T, H, K]
  const void* v;                 // [N, T, HV, V]
  const void* g;                 // [N, T, HV, K]
  const void* beta;              // [N, T, HV]
  const float* A_log;            // [P, HV]              may be null
  const float* dt_bias;          // [P, HV, K]           may be null
  const int32_t* state_indices;  // [N]                  may be null: sequence n has state n
  void* state;                   // [slots, HV, K, V]    read and written
  void* o;                       // [N, T, HV, V]
  void* token_states;            // [N, T, HV, K, V]     may be null: not wanted

  Gate gate;
  float gate_lower_bound;
  bool beta_is_logits;
  bool allow_neg_eigval;
  bool qk_l2norm;
  bool parameters_per_sequence;  // P is N; else 1
  float scale;
};

}  // namespace jax_flashkda
