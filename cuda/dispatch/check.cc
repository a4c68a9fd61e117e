// Checks and sizes: plain host C++, tested on machines without CUDA.
#include <cmath>
#include <sstream>
#include <string>

#include "dispatch/dispatch.h"
#include "dispatch/problems.h"
#include "dispatch/variants.h"
#include "problem/workspace.h"

namespace jax_flashkda {
namespace {

// The step's grid has up to eight CTAs for a state.
constexpr int64_t kMaxStepStates = int64_t{1} << 28;

void check_shape(const ForwardShape& s, Problems& problems) {
  auto not_negative = [&](const char* what, int64_t value) {
    if (value < 0) problems.add(what, " is ", value, ", must not be negative");
  };
  not_negative("B", s.B);
  not_negative("T", s.T);
  not_negative("N", s.N);
  if (s.H <= 0) problems.add("H is ", s.H, ", must be positive");
  if (s.HV <= 0 || (s.H > 0 && s.HV % s.H != 0))
    problems.add("HV is ", s.HV, ", must be a positive multiple of H = ", s.H);
  if (!s.has_segment_ids && s.N != 1) problems.add("N is ", s.N, ", must be 1 without segment_ids");
  if (s.B > 0 && s.T > kMaxTokens / s.B)
    problems.add("B * T is ", s.B, " * ", s.T, ", must be below 2^31: split the batch");
  if (s.B > 0 && s.HV > kMaxTokens / s.B)
    problems.add("B * HV is ", s.B, " * ", s.HV, ", must be below 2^31: split the batch");
  if (s.B > 0 && s.HV > 0 && s.N > kMaxTokens / s.B / s.HV)
    problems.add("B * N * HV is ", s.B, " * ", s.N, " * ", s.HV,
                 ", must be below 2^31: lower max_segments");
}

void check_variant(const ForwardParams& p, Problems& problems) {
  std::string supported;
  for (const Variant& v : compiled_variants()) {
    if (v.K == p.shape.K && v.V == p.shape.V && v.qkv_dtype == p.qkv_dtype) {
      if (!contains(v.g_dtypes, p.g_dtype))
        problems.add("g is ", name(p.g_dtype), ", the kernels take ", names(v.g_dtypes));
      if (!contains(v.beta_dtypes, p.beta_dtype))
        problems.add("beta is ", name(p.beta_dtype), ", the kernels take ", names(v.beta_dtypes));
      return;
    }
    std::ostringstream row;
    row << "K = " << v.K << ", V = " << v.V << " with q, k, v in " << name(v.qkv_dtype);
    supported += (supported.empty() ? "" : " or ") + row.str();
  }
  problems.add("K = ", p.shape.K, ", V = ", p.shape.V, " with q, k, v in ", name(p.qkv_dtype),
               " has no kernel (compiled: ", supported, "); the XLA implementation takes it");
}

// Of a ForwardParams or a StepParams; `rows` is how many rows of gate parameters there are.
template <class Params>
void check_options(const Params& p, int64_t rows, Problems& problems) {
  switch (p.gate) {
    case Gate::kLogDecay:
      if (p.A_log != nullptr) problems.add("A_log was given, but gate log_decay reads none");
      if (p.dt_bias != nullptr) problems.add("dt_bias was given, but gate log_decay reads none");
      break;
    case Gate::kSoftplus:
      if (p.A_log == nullptr && rows > 0) problems.add("A_log is missing: gate softplus needs it");
      break;
    case Gate::kBounded:
      if (!(p.gate_lower_bound >= -5.0f && p.gate_lower_bound < 0.0f))
        problems.add("gate_lower_bound is ", p.gate_lower_bound, ", must lie in [-5, 0)");
      break;
    default:
      problems.add("gate is ", static_cast<int32_t>(p.gate),
                   ", must be 0 (log_decay), 1 (softplus) or 2 (bounded)");
  }
  if (p.allow_neg_eigval && !p.beta_is_logits)
    problems.add("allow_neg_eigval needs beta_is_logits");
  if (!std::isfinite(p.scale)) problems.add("scale is ", p.scale, ", must be finite");
}

bool has_tokens(const ForwardShape& s) { return s.B > 0 && s.T > 0; }

// What every call reads. Of a ForwardParams or a StepParams.
template <class Params>
void check_data_pointers(const Params& p, bool tokens, Problems& problems) {
  check_pointer("q", p.q, tokens, 16, problems);
  check_pointer("k", p.k, tokens, 16, problems);
  check_pointer("v", p.v, tokens, 16, problems);
  check_pointer("g", p.g, tokens, 16, problems);
  check_pointer("beta", p.beta, tokens, 4, problems);
  check_pointer("A_log", p.A_log, false, 4, problems);
  check_pointer("dt_bias", p.dt_bias, false, 16, problems);
}

// Inputs and workspace: what forward and backward both read.
void check_input_pointers(const ForwardParams& p, Problems& problems) {
  const ForwardShape& s = p.shape;
  const bool tokens = has_tokens(s);
  check_data_pointers(p, tokens, problems);
  check_pointer("initial_state", p.initial_state, false, 16, problems);
  check_pointer("segment_ids", p.segment_ids, tokens && s.has_segment_ids, 4, problems);
  if (!s.has_segment_ids && p.segment_ids != nullptr)
    problems.add("segment_ids was given, but the shape says there are none");
  check_pointer("workspace", p.workspace, tokens, 16, problems);
}

void check_output_pointers(const ForwardParams& p, Problems& problems) {
  check_pointer("o", p.o, has_tokens(p.shape), 16, problems);
  check_pointer("final_state", p.final_state, false, 16, problems);
  check_pointer("chunk_states", p.chunk_states, false, 16, problems);
}

// What chunk_prepare leaves, where it has places of its own.
void check_prepared_pointers(const ForwardParams& p, Problems& problems) {
  check_pointer("prepared", p.prepared, has_tokens(p.shape), 16, problems);
  check_pointer("betas", p.betas, has_tokens(p.shape), 16, problems);
  check_pointer("decays", p.decays, has_tokens(p.shape), 16, problems);
}

// The cotangents, and a gradient for each float operand of the call and no other.
void check_gradient_pointers(const BackwardParams& p, Problems& problems) {
  const ForwardShape& s = p.forward.shape;
  const bool tokens = has_tokens(s);
  check_pointer("d_o", p.d_o, tokens, 16, problems);
  check_pointer("d_final_state", p.d_final_state, false, 16, problems);
  check_pointer("dq", p.dq, tokens, 16, problems);
  check_pointer("dk", p.dk, tokens, 16, problems);
  check_pointer("dv", p.dv, tokens, 16, problems);
  check_pointer("dg", p.dg, tokens, 16, problems);
  check_pointer("d_beta", p.d_beta, tokens, 4, problems);
  auto check_optional = [&](const char* what, const void* operand, const void* gradient,
                            bool elements, uintptr_t alignment) {
    check_pointer(what, gradient, elements && operand != nullptr, alignment, problems);
    if (elements && operand == nullptr && gradient != nullptr)
      problems.add(what, " was asked for, but the call has no such operand");
  };
  check_optional("dA_log", p.forward.A_log, p.dA_log, s.B > 0, 4);
  check_optional("d_dt_bias", p.forward.dt_bias, p.d_dt_bias, s.B > 0, 16);
  check_optional("d_initial_state", p.forward.initial_state, p.d_initial_state, s.B > 0 && s.N > 0,
                 16);
}

// What every stage but the step takes.
void check_inputs(const ForwardParams& p, Problems& problems) {
  check_shape(p.shape, problems);
  check_variant(p, problems);
  check_options(p, p.shape.B, problems);
  check_input_pointers(p, problems);
}

void check_step_shape(const StepShape& s, Problems& problems) {
  if (s.N < 0) problems.add("N is ", s.N, ", must not be negative");
  if (s.T < 1 || s.T > kMostStepTokens)
    problems.add("T is ", s.T, ", must lie in [1, ", kMostStepTokens, "]");
  if (s.H <= 0) problems.add("H is ", s.H, ", must be positive");
  if (s.HV <= 0 || (s.H > 0 && s.HV % s.H != 0))
    problems.add("HV is ", s.HV, ", must be a positive multiple of H = ", s.H);
  if (s.slots < 0) problems.add("slots is ", s.slots, ", must not be negative");
  if (s.N > 0 && s.HV > (kMaxStepStates - 1) / s.N)
    problems.add("N * HV is ", s.N, " * ", s.HV, ", must be below 2^28: split the batch");
}

void check_step_variant(const StepParams& p, Problems& problems) {
  std::string supported;
  for (const StepVariant& v : compiled_step_variants()) {
    if (v.K == p.shape.K && v.V == p.shape.V) {
      const auto check = [&](const char* what, DType dtype, const std::vector<DType>& taken) {
        if (!contains(taken, dtype))
          problems.add(what, " ", name(dtype), ", the kernels take ", names(taken));
      };
      check("q, k, v are", p.qkv_dtype, v.token_dtypes);
      check("g is", p.g_dtype, v.token_dtypes);
      check("beta is", p.beta_dtype, v.token_dtypes);
      check("state is", p.state_dtype, v.state_dtypes);
      return;
    }
    std::ostringstream row;
    row << "K = " << v.K << ", V = " << v.V;
    supported += (supported.empty() ? "" : " or ") + row.str();
  }
  problems.add("K = ", p.shape.K, ", V = ", p.shape.V, " has no kernel (compiled: ", supported,
               "); the XLA implementation takes it");
}

void check_step_pointers(const StepParams& p, Problems& problems) {
  const bool tokens = p.shape.N > 0;
  check_data_pointers(p, tokens, problems);
  check_pointer("state_indices", p.state_indices, false, 4, problems);
  if (p.state_indices == nullptr && p.shape.slots != p.shape.N)
    problems.add("slots is ", p.shape.slots, ", must be N = ", p.shape.N, " without state_indices");
  check_pointer("state", p.state, tokens && p.shape.slots > 0, 16, problems);
  check_pointer("o", p.o, tokens, 16, problems);
  check_pointer("token_states", p.token_states, false, 16, problems);
}

// Zero for shapes that are refused.
template <class Layout>
int64_t workspace_bytes(const ForwardShape& shape, Layout layout) {
  Problems problems;
  check_shape(shape, problems);
  if (!problems.ok() || shape.K <= 0 || shape.V <= 0) return 0;
  return layout(shape).bytes + kWorkspaceAlignment;  // the launch layer rounds the pointer up
}

}  // namespace

const char* name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
  }
  return "unknown type";
}

std::vector<Variant> variants() { return compiled_variants(); }

std::vector<StepVariant> step_variants() { return compiled_step_variants(); }

Status check_forward(const ForwardParams& params) {
  Problems problems;
  check_inputs(params, problems);
  check_output_pointers(params, problems);
  return problems.status("jax_flashkda.forward");
}

Status check_backward(const BackwardParams& params) {
  Problems problems;
  check_inputs(params.forward, problems);
  check_gradient_pointers(params, problems);
  return problems.status("jax_flashkda.backward");
}

Status check_prepared_forward(const ForwardParams& params) {
  Problems problems;
  check_inputs(params, problems);
  check_prepared_pointers(params, problems);
  check_output_pointers(params, problems);
  if (params.chunk_states != nullptr) problems.add("chunk_states are not a result of it");
  return problems.status("jax_flashkda.prepared_forward");
}

Status check_prepared_backward(const BackwardParams& params) {
  Problems problems;
  check_inputs(params.forward, problems);
  check_prepared_pointers(params.forward, problems);
  check_gradient_pointers(params, problems);
  return problems.status("jax_flashkda.prepared_backward");
}

Status check_state_gradient(const BackwardParams& params) {
  Problems problems;
  const ForwardShape& s = params.forward.shape;
  check_inputs(params.forward, problems);
  check_prepared_pointers(params.forward, problems);
  check_pointer("d_o", params.d_o, has_tokens(s), 16, problems);
  check_pointer("d_final_state", params.d_final_state, false, 16, problems);
  check_pointer("d_initial_state", params.d_initial_state, s.B > 0 && s.N > 0, 16, problems);
  return problems.status("jax_flashkda.state_gradient");
}

Status check_state_maps(const StateMapsParams& params) {
  Problems problems;
  const ForwardShape& s = params.forward.shape;
  check_inputs(params.forward, problems);
  check_prepared_pointers(params.forward, problems);
  check_pointer("factor", params.factor, s.B > 0, 16, problems);
  check_pointer("offset", params.offset, s.B > 0, 16, problems);
  return problems.status("jax_flashkda.state_maps");
}

Status check_step(const StepParams& params) {
  Problems problems;
  check_step_shape(params.shape, problems);
  check_step_variant(params, problems);
  check_options(params, params.shape.N, problems);
  check_step_pointers(params, problems);
  return problems.status("jax_flashkda.step");
}

int64_t forward_workspace_bytes(const ForwardShape& shape) {
  return workspace_bytes(shape, [](const ForwardShape& s) { return forward_workspace(s); });
}

int64_t backward_workspace_bytes(const ForwardShape& shape) {
  return workspace_bytes(shape, [](const ForwardShape& s) { return backward_workspace(s); });
}

int64_t prepared_forward_workspace_bytes(const ForwardShape& shape) {
  return workspace_bytes(shape, prepared_workspace);
}

int64_t prepared_backward_workspace_bytes(const ForwardShape& shape) {
  return workspace_bytes(shape, [](const ForwardShape& s) { return backward_workspace(s, true); });
}

}  // namespace jax_flashkda
