// Decodes what XLA hands to a custom call, checks all of it, and calls the dispatch layer.
//
// This is a trust boundary: a program need not come from this version's lowering rules, since
// jax.export artefacts outlive it, and FFI checks no dimension. So each operand is checked for
// dtype, rank and every dimension, each attribute for presence, type and range, before a pointer is
// used.
// No exception leaves a handler: the caller is on the far side of a C ABI.
//
// forward:  operands  q k v g beta [A_log] [dt_bias] [initial_state] [segment_ids]
//           results   o [final_state] [chunk_states] workspace
//                                                          ([..]: told present by an attribute)
// backward: operands  those of the forward, d_o [d_final_state]
//           results   dq dk dv dg d_beta [dA_log] [d_dt_bias] [d_initial_state] workspace
// state_maps:     operands  those of the forward but initial_state
//                 results   factor offset prepared betas decays workspace
// state_gradient: operands  those of the backward, initial_state among them
//                 results   d_initial_state prepared betas decays workspace
// prepared_forward:  operands  those of the forward, prepared betas decays      (of state_maps)
//                    results   o [final_state] workspace
// prepared_backward: operands  those of the backward, prepared betas decays     (of state_gradient)
//                    results   those of the backward
// step:     operands  q k v g beta [A_log] [dt_bias] state [state_indices]
//           results   o state [token_states]               (the state's memory is the operand's)

#include "ffi/handlers.h"

#include <initializer_list>
#include <string>

#include "dispatch/dispatch.h"
#include "ffi/call.h"
#include "problem/workspace.h"

namespace jax_flashkda {
namespace {

constexpr char kForward[] = "jax_flashkda.forward";
constexpr char kBackward[] = "jax_flashkda.backward";
constexpr char kStep[] = "jax_flashkda.step";
constexpr char kStateMaps[] = "jax_flashkda.state_maps";
constexpr char kStateGradient[] = "jax_flashkda.state_gradient";
constexpr char kPreparedForward[] = "jax_flashkda.prepared_forward";
constexpr char kPreparedBackward[] = "jax_flashkda.prepared_backward";

// The options that forward, backward and step share.
template <class Params>
void read_options(AttributeReader& attributes, Params& params) {
  const int32_t gate = attributes.get<int32_t>("gate");
  if (gate < 0 || gate > static_cast<int32_t>(Gate::kBounded)) {
    refuse("attribute gate is " + std::to_string(gate) +
                      ", expected 0 (log_decay), 1 (softplus) or 2 (bounded)");
  }
  params.gate = static_cast<Gate>(gate);
  params.gate_lower_bound = attributes.get<float>("gate_lower_bound");
  params.beta_is_logits = attributes.get<bool>("beta_is_logits");
  params.allow_neg_eigval = attributes.get<bool>("allow_neg_eigval");
  params.qk_l2norm = attributes.get<bool>("qk_l2norm");
  params.scale = attributes.get<float>("scale");
}

void read_attributes(AttributeReader& attributes, ForwardParams& params) {
  read_options(attributes, params);
  params.has_padding_segment_id = attributes.get<bool>("has_padding_segment_id");
  params.padding_segment_id = attributes.get<int32_t>("padding_segment_id");
  params.shape.N = attributes.get<int64_t>("max_segments");
  params.shape.has_segment_ids = attributes.get<bool>("has_segment_ids");
}

// The first axis of an operand, by its letter in messages.
struct Rows {
  const char* letter;
  int64_t count;

  std::string axes(const char* rest) const { return std::string("[") + letter + ", " + rest + "]"; }
};
Rows rows_of(const ForwardShape& s) { return {"B", s.B}; }
Rows rows_of(const StepShape& s) { return {"N", s.N}; }
int64_t& row_count(ForwardShape& s) { return s.B; }
int64_t& row_count(StepShape& s) { return s.N; }

// q, k, v, g, beta, which every call has. q and v give the sizes; all else is held against them.
template <class Params>
void read_data(OperandReader& operands, Params& params) {
  const Operand q = operands.next("q"), k = operands.next("k"), v = operands.next("v");
  const Operand g = operands.next("g"), beta = operands.next("beta");
  q.expect_rank(4);
  v.expect_rank(4);
  auto& s = params.shape;
  row_count(s) = q.dim(0), s.T = q.dim(1), s.H = q.dim(2), s.K = q.dim(3);
  s.HV = v.dim(2), s.V = v.dim(3);
  const Rows rows = rows_of(s);
  k.expect_shape(rows.axes("T, H, K"), {rows.count, s.T, s.H, s.K});
  v.expect_shape(rows.axes("T, HV, V"), {rows.count, s.T, s.HV, s.V});
  g.expect_shape(rows.axes("T, HV, K"), {rows.count, s.T, s.HV, s.K});
  beta.expect_shape(rows.axes("T, HV"), {rows.count, s.T, s.HV});
  params.qkv_dtype = q.float_dtype();
  k.expect_dtype(q.dtype());
  v.expect_dtype(q.dtype());
  params.g_dtype = g.float_dtype();
  params.beta_dtype = beta.float_dtype();
  params.q = q.data<void>();
  params.k = k.data<void>();
  params.v = v.data<void>();
  params.g = g.data<void>();
  params.beta = beta.data<void>();
}

// The optional operands and their gradients are read alike.
template <typename Pointer>
void read_A_log(const Operand& A_log, const Rows& rows, int64_t HV, Pointer& pointer) {
  A_log.expect_dtype(ffi::F32);
  A_log.expect_shape(rows.axes("HV"), {rows.count, HV});
  pointer = A_log.data<float>();
}

template <typename Pointer>
void read_dt_bias(const Operand& dt_bias, const Rows& rows, int64_t HV, int64_t K,
                  Pointer& pointer) {
  dt_bias.expect_dtype(ffi::F32);
  dt_bias.expect_shape(rows.axes("HV, K"), {rows.count, HV, K});
  pointer = dt_bias.data<float>();
}

template <typename Pointer>
void read_state(const Operand& state, const ForwardShape& s, Pointer& pointer) {
  state.expect_dtype(ffi::F32);
  state.expect_shape("[B, N, HV, K, V]", {s.B, s.N, s.HV, s.K, s.V});
  pointer = state.data<float>();
}

void read_chunk_states(const Operand& states, ForwardParams& params) {
  const ForwardShape& s = params.shape;
  states.expect_dtype(ffi::F32);
  states.expect_shape("[B, T / 64, HV, K, V]", {s.B, s.T / kChunk, s.HV, s.K, s.V});
  params.chunk_states = states.data<float>();
}

// o or its cotangent.
template <class Params, typename Pointer>
void read_output(const Operand& o, const char* name, const Params& params, Pointer& pointer) {
  const auto& s = params.shape;
  const Rows rows = rows_of(s);
  o.expect_shape(rows.axes("T, HV, V"), {rows.count, s.T, s.HV, s.V});
  if (o.float_dtype() != params.qkv_dtype) refuse(std::string(name) + " has another dtype than v");
  pointer = o.data<void>();
}

// Which of the optional operands with a gradient there are: one without elements may be null.
struct Present {
  bool A_log, dt_bias, initial_state;
};

Present read_optional_operands(OperandReader& operands, AttributeReader& attributes,
                               ForwardParams& params) {
  const ForwardShape& s = params.shape;
  const Present present = {attributes.get<bool>("has_A_log"), attributes.get<bool>("has_dt_bias"),
                           attributes.get<bool>("has_initial_state")};
  const Rows rows = rows_of(s);
  if (present.A_log) read_A_log(operands.next("A_log"), rows, s.HV, params.A_log);
  if (present.dt_bias) read_dt_bias(operands.next("dt_bias"), rows, s.HV, s.K, params.dt_bias);
  if (present.initial_state) read_state(operands.next("initial_state"), s, params.initial_state);
  if (s.has_segment_ids) {
    const Operand segment_ids = operands.next("segment_ids");
    segment_ids.expect_dtype(ffi::S32);
    segment_ids.expect_shape("[B, T]", {s.B, s.T});
    params.segment_ids = segment_ids.data<int32_t>();
  }
  return present;
}

Present read_inputs(Call& call, ForwardParams& params) {
  read_attributes(call.attributes, params);
  read_data(call.operands, params);
  return read_optional_operands(call.operands, call.attributes, params);
}

// Its size is checked last, once the shape is known to be a valid one.
Operand read_workspace(Call& call, ForwardParams& params) {
  const Operand workspace = call.results.next("workspace");
  workspace.expect_dtype(ffi::U8);
  workspace.expect_rank(1);
  params.workspace = workspace.data<void>();
  return workspace;
}

// What chunk_prepare leaves: results of one stage, operands of another.
template <class Reader>
void read_prepared(Reader& reader, ForwardParams& params) {
  const ForwardShape& s = params.shape;
  const Operand prepared = reader.next("prepared"), betas = reader.next("betas");
  const Operand decays = reader.next("decays");
  prepared.expect_dtype(ffi::U8);
  prepared.expect_shape("[B, HV, T, " + std::to_string(kOperandBytes) + "]",
                        {s.B, s.HV, s.T, kOperandBytes});
  betas.expect_dtype(ffi::F32);
  betas.expect_shape("[B, HV, T, 4]", {s.B, s.HV, s.T, kBetaBytes / 4});
  decays.expect_dtype(ffi::F32);
  decays.expect_shape("[B, HV, ceil(T / 64) + N, K]", {s.B, s.HV, decay_slots(s), s.K});
  params.prepared = prepared.data<void>();
  params.betas = betas.data<float>();
  params.decays = decays.data<float>();
}

void read_results(Call& call, ForwardParams& params) {
  read_output(call.results.next("o"), "o", params, params.o);
  if (call.attributes.get<bool>("return_final_state"))
    read_state(call.results.next("final_state"), params.shape, params.final_state);
}

ForwardParams read_forward(Call call) {
  ForwardParams params{};
  read_inputs(call, params);
  read_results(call, params);
  if (call.attributes.get<bool>("return_chunk_states"))
    read_chunk_states(call.results.next("chunk_states"), params);
  const Operand workspace = read_workspace(call, params);
  call.expect_end();
  check_call(check_forward(params), workspace, forward_workspace_bytes(params.shape));
  return params;
}

ForwardParams read_prepared_forward(Call call) {
  ForwardParams params{};
  read_inputs(call, params);
  read_prepared(call.operands, params);
  read_results(call, params);
  const Operand workspace = read_workspace(call, params);
  call.expect_end();
  check_call(check_prepared_forward(params), workspace,
             prepared_forward_workspace_bytes(params.shape));
  return params;
}

StateMapsParams read_state_maps(Call call) {
  StateMapsParams params{};
  ForwardParams& forward = params.forward;
  if (read_inputs(call, forward).initial_state) refuse("initial_state is not an operand of it");
  if (call.attributes.get<bool>("return_final_state")) refuse("final_state is not a result of it");
  const ForwardShape& s = forward.shape;
  const auto next = [&](const char* name, const char* meaning, int64_t columns) {
    const Operand map = call.results.next(name);
    map.expect_dtype(ffi::F32);
    map.expect_shape(meaning, {s.B, s.HV, s.K, columns});
    return map.data<float>();
  };
  params.factor = next("factor", "[B, HV, K, K]", s.K);
  params.offset = next("offset", "[B, HV, K, V]", s.V);
  read_prepared(call.results, forward);
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_state_maps(params), workspace, prepared_forward_workspace_bytes(s));
  return params;
}

// A gradient has shape and dtype of its operand.
void read_gradients(ResultReader& results, const Present& present, BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const ForwardShape& s = p.shape;
  const auto next = [&](const char* name, DType dtype, const char* meaning,
                        std::initializer_list<int64_t> dims) {
    const Operand gradient = results.next(name);
    gradient.expect_shape(meaning, dims);
    if (gradient.float_dtype() != dtype)
      refuse(std::string(name) + " has another dtype than what it is the gradient of");
    return gradient.data<void>();
  };
  params.dq = next("dq", p.qkv_dtype, "[B, T, H, K]", {s.B, s.T, s.H, s.K});
  params.dk = next("dk", p.qkv_dtype, "[B, T, H, K]", {s.B, s.T, s.H, s.K});
  params.dv = next("dv", p.qkv_dtype, "[B, T, HV, V]", {s.B, s.T, s.HV, s.V});
  params.dg = next("dg", p.g_dtype, "[B, T, HV, K]", {s.B, s.T, s.HV, s.K});
  params.d_beta = next("d_beta", p.beta_dtype, "[B, T, HV]", {s.B, s.T, s.HV});
  const Rows rows = rows_of(s);
  if (present.A_log) read_A_log(results.next("dA_log"), rows, s.HV, params.dA_log);
  if (present.dt_bias)
    read_dt_bias(results.next("d_dt_bias"), rows, s.HV, s.K, params.d_dt_bias);
  if (present.initial_state)
    read_state(results.next("d_initial_state"), s, params.d_initial_state);
}

void read_cotangents(Call& call, BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  read_output(call.operands.next("d_o"), "d_o", forward, params.d_o);
  if (call.attributes.get<bool>("return_final_state"))
    read_state(call.operands.next("d_final_state"), forward.shape, params.d_final_state);
}

BackwardParams read_state_gradient(Call call) {
  BackwardParams params{};
  ForwardParams& forward = params.forward;
  if (!read_inputs(call, forward).initial_state) refuse("initial_state is missing");
  read_cotangents(call, params);
  read_state(call.results.next("d_initial_state"), forward.shape, params.d_initial_state);
  read_prepared(call.results, forward);
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_state_gradient(params), workspace,
             prepared_forward_workspace_bytes(forward.shape));
  return params;
}

BackwardParams read_backward(Call call) {
  BackwardParams params{};
  ForwardParams& forward = params.forward;
  const Present present = read_inputs(call, forward);
  read_cotangents(call, params);
  read_gradients(call.results, present, params);
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_backward(params), workspace, backward_workspace_bytes(forward.shape));
  return params;
}

BackwardParams read_prepared_backward(Call call) {
  BackwardParams params{};
  ForwardParams& forward = params.forward;
  const Present present = read_inputs(call, forward);
  read_cotangents(call, params);
  read_prepared(call.operands, forward);
  read_gradients(call.results, present, params);
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_prepared_backward(params), workspace,
             prepared_backward_workspace_bytes(forward.shape));
  return params;
}

// One row of gate parameters for all sequences, or one for each.
void read_step_parameters(Call& call, StepParams& params) {
  const StepShape& s = params.shape;
  const bool has_A_log = call.attributes.get<bool>("has_A_log");
  const bool has_dt_bias = call.attributes.get<bool>("has_dt_bias");
  params.parameters_per_sequence = call.attributes.get<bool>("parameters_per_sequence");
  const Rows rows = {"P", params.parameters_per_sequence ? s.N : 1};
  if (has_A_log) read_A_log(call.operands.next("A_log"), rows, s.HV, params.A_log);
  if (has_dt_bias) read_dt_bias(call.operands.next("dt_bias"), rows, s.HV, s.K, params.dt_bias);
}

// The operand and the result, which XLA gives one memory because the program asks it to. States
// that the kernel does not write would be lost if it had not.
void read_step_state(Call& call, const Operand& given, StepParams& params) {
  StepShape& s = params.shape;
  given.expect_rank(4);
  s.slots = given.dim(0);
  given.expect_shape("[slots, HV, K, V]", {s.slots, s.HV, s.K, s.V});
  params.state_dtype = given.float_dtype();
  const Operand state = call.results.next("state");
  state.expect_dtype(given.dtype());
  state.expect_shape("[slots, HV, K, V]", {s.slots, s.HV, s.K, s.V});
  params.state = state.data<void>();
  expect_in_place(given, state);
}

StepParams read_step(Call call) {
  StepParams params{};
  read_options(call.attributes, params);
  read_data(call.operands, params);
  read_step_parameters(call, params);
  const StepShape& s = params.shape;
  read_output(call.results.next("o"), "o", params, params.o);
  const Operand state = call.operands.next("state");
  read_step_state(call, state, params);
  if (call.attributes.get<bool>("has_state_indices")) {
    const Operand indices = call.operands.next("state_indices");
    indices.expect_dtype(ffi::S32);
    indices.expect_shape("[N]", {s.N});
    params.state_indices = indices.data<int32_t>();
  }
  if (call.attributes.get<bool>("return_token_states")) {
    const Operand token_states = call.results.next("token_states");
    token_states.expect_dtype(state.dtype());
    token_states.expect_shape("[N, T, HV, K, V]", {s.N, s.T, s.HV, s.K, s.V});
    params.token_states = token_states.data<void>();
  }
  call.expect_end();
  refuse_unless_ok(check_step(params));
  return params;
}

// Runs before execution and outside of command buffer capture, on each device of the program.
ffi::Error initialize_device(int32_t device, ffi::RemainingArgs, ffi::RemainingRets,
                             ffi::Dictionary) {
  return guarded("jax_flashkda", [&] {
    const Status status = initialize(device);
    if (status.ok()) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message);
  });
}

XLA_FFI_DEFINE_HANDLER(kInitializeHandler, initialize_device,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

}  // namespace

std::vector<Handler> handlers() {
  void* initialize = reinterpret_cast<void*>(kInitializeHandler);
  std::vector<Handler> all = {
      {kForward, "initialize", initialize},
      {kForward, "execute", executing_handler<kForward, read_forward, forward>()},
      {kBackward, "initialize", initialize},
      {kBackward, "execute", executing_handler<kBackward, read_backward, backward>()},
      {kStateMaps, "initialize", initialize},
      {kStateMaps, "execute", executing_handler<kStateMaps, read_state_maps, state_maps>()},
      {kStateGradient, "initialize", initialize},
      {kStateGradient, "execute",
       executing_handler<kStateGradient, read_state_gradient, state_gradient>()},
      {kPreparedForward, "initialize", initialize},
      {kPreparedForward, "execute",
       executing_handler<kPreparedForward, read_prepared_forward, prepared_forward>()},
      {kPreparedBackward, "initialize", initialize},
      {kPreparedBackward, "execute",
       executing_handler<kPreparedBackward, read_prepared_backward, prepared_backward>()},
      {kStep, "initialize", initialize},
      {kStep, "execute", executing_handler<kStep, read_step, step>()},
  };
  for (const Handler& handler : short_conv_handlers()) {
    all.push_back({handler.target, "initialize", initialize});
    all.push_back(handler);
  }
  return all;
}

std::vector<Handler> checking_handlers() {
  std::vector<Handler> all = {
      {kForward, "execute", checking_handler<kForward, read_forward>()},
      {kBackward, "execute", checking_handler<kBackward, read_backward>()},
      {kStateMaps, "execute", checking_handler<kStateMaps, read_state_maps>()},
      {kStateGradient, "execute", checking_handler<kStateGradient, read_state_gradient>()},
      {kPreparedForward, "execute", checking_handler<kPreparedForward, read_prepared_forward>()},
      {kPreparedBackward, "execute", checking_handler<kPreparedBackward, read_prepared_backward>()},
      {kStep, "execute", checking_handler<kStep, read_step>()},
  };
  for (const Handler& handler : short_conv_checking_handlers()) all.push_back(handler);
  return all;
}

}  // namespace jax_flashkda
