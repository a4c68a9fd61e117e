// Decodes what XLA hands to a custom call, checks all of it, and calls the dispatch layer.
//
// This is a trust boundary: a program need not come from this version's lowering rules, since
// jax.export artefacts outlive it, and FFI checks no dimension. So each operand is checked for
// dtype, rank and every dimension, each attribute for presence, type and range, before a pointer is
// used.
// No exception leaves a handler: the caller is on the far side of a C ABI.
//
// forward:  operands  q k v g beta [A_log] [dt_bias] [initial_state] [segment_ids]
//           results   o [final_state] workspace            ([..]: told present by an attribute)
// backward: operands  those of the forward, d_o [d_final_state]
//           results   dq dk dv dg d_beta [dA_log] [d_dt_bias] [d_initial_state] workspace
// state_maps:     operands  those of the forward but initial_state
//                 results   factor offset workspace
// state_gradient: operands  those of the backward, initial_state among them
//                 results   d_initial_state workspace
// step:     operands  q k v g beta [A_log] [dt_bias] state [state_indices]
//           results   o state [token_states]               (the state's memory is the operand's)

#include "ffi/handlers.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "dispatch/dispatch.h"
#include "xla/ffi/api/ffi.h"

struct CUstream_st;

// Headers of a newer JAX would compile too, and the oldest JAX supported would refuse the module.
static_assert(XLA_FFI_API_MAJOR == 0 && XLA_FFI_API_MINOR == 3,
              "build against the XLA FFI headers of jaxlib 0.9.2");

namespace jax_flashkda {
namespace {

namespace ffi = xla::ffi;

constexpr char kForward[] = "jax_flashkda.forward";
constexpr char kBackward[] = "jax_flashkda.backward";
constexpr char kStep[] = "jax_flashkda.step";
constexpr char kStateMaps[] = "jax_flashkda.state_maps";
constexpr char kStateGradient[] = "jax_flashkda.state_gradient";

// A call whose operands, results or attributes are not what the target takes.
struct InvalidCall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The same, found by the dispatch layer, whose message names the target.
struct RefusedCall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void refuse(const std::string& problem) { throw InvalidCall(problem); }

template <typename T>
T value_or_refuse(ffi::ErrorOr<T> decoded, const std::string& what) {
  if (decoded.has_error()) refuse(what + ": " + decoded.error().message());
  return *decoded;
}

std::string to_string(ffi::Span<const int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string to_string(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F64: return "float64";
    case ffi::F32: return "float32";
    case ffi::F16: return "float16";
    case ffi::BF16: return "bfloat16";
    case ffi::S32: return "int32";
    case ffi::U8: return "uint8";
    default: return "XLA element type " + std::to_string(static_cast<int>(dtype));
  }
}

// A buffer under the name that messages give it. Its methods either return or throw InvalidCall.
class Operand {
 public:
  Operand(std::string name, ffi::AnyBuffer buffer) : name_(std::move(name)), buffer_(buffer) {}

  void expect_rank(size_t rank) const {
    if (buffer_.dimensions().size() != rank) {
      refuse(name_ + " has shape " + to_string(buffer_.dimensions()) + ", expected " +
                        std::to_string(rank) + " dimensions");
    }
  }

  // `meaning` spells the expected dimensions as letters, for the message.
  void expect_shape(const char* meaning, std::initializer_list<int64_t> dims) const {
    const ffi::Span<const int64_t> got = buffer_.dimensions();
    if (got.size() != dims.size() || !std::equal(dims.begin(), dims.end(), got.begin())) {
      refuse(name_ + " has shape " + to_string(got) + ", expected " + meaning + " = " +
                        to_string(ffi::Span<const int64_t>(dims.begin(), dims.size())));
    }
  }

  void expect_dtype(ffi::DataType dtype) const {
    if (buffer_.element_type() != dtype) {
      refuse(name_ + " is " + to_string(buffer_.element_type()) + ", expected " +
                        to_string(dtype));
    }
  }

  DType float_dtype() const {
    switch (buffer_.element_type()) {
      case ffi::F32: return DType::kF32;
      case ffi::BF16: return DType::kBF16;
      case ffi::F16: return DType::kF16;
      default:
        refuse(name_ + " is " + to_string(buffer_.element_type()) +
                          ", expected float32, bfloat16 or float16");
    }
  }

  int64_t dim(size_t axis) const { return buffer_.dimensions()[axis]; }
  int64_t bytes() const { return static_cast<int64_t>(buffer_.size_bytes()); }
  ffi::DataType dtype() const { return buffer_.element_type(); }
  template <typename T>
  T* data() const { return static_cast<T*>(buffer_.untyped_data()); }

 private:
  std::string name_;
  ffi::AnyBuffer buffer_;
};

// Hands out operands, or results, in order; the caller says which is next.
class OperandReader {
 public:
  explicit OperandReader(ffi::RemainingArgs args) : args_(args) {}

  Operand next(const char* name) {
    if (next_ == args_.size()) refuse(std::string(name) + " is missing from the operands");
    return Operand(name, value_or_refuse(args_.get<ffi::AnyBuffer>(next_++), name));
  }
  void expect_end() const {
    if (next_ != args_.size()) {
      refuse("got " + std::to_string(args_.size()) + " operands, expected " +
                        std::to_string(next_));
    }
  }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
};

class ResultReader {
 public:
  explicit ResultReader(ffi::RemainingRets rets) : rets_(rets) {}

  Operand next(const char* name) {
    if (next_ == rets_.size()) refuse(std::string(name) + " is missing from the results");
    return Operand(name, *value_or_refuse(rets_.get<ffi::AnyBuffer>(next_++), name));
  }
  void expect_end() const {
    if (next_ != rets_.size()) {
      refuse("got " + std::to_string(rets_.size()) + " results, expected " +
                        std::to_string(next_));
    }
  }

 private:
  ffi::RemainingRets rets_;
  size_t next_ = 0;
};

// Reads attributes by name and counts them, so that one nobody reads is refused, not ignored.
class AttributeReader {
 public:
  explicit AttributeReader(ffi::Dictionary attributes) : attributes_(attributes) {}

  template <typename T>
  T get(const char* name) {
    ++read_;
    return value_or_refuse(attributes_.get<T>(name), std::string("attribute ") + name);
  }
  void expect_end() const {
    if (attributes_.size() != read_) {
      refuse("got " + std::to_string(attributes_.size()) + " attributes, expected " +
                        std::to_string(read_));
    }
  }

 private:
  ffi::Dictionary attributes_;
  size_t read_ = 0;
};

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

// q, k, v, g, beta, which every call has. q and v give the sizes; all else is held against them.
void read_data(OperandReader& operands, ForwardParams& params) {
  const Operand q = operands.next("q"), k = operands.next("k"), v = operands.next("v");
  const Operand g = operands.next("g"), beta = operands.next("beta");
  q.expect_rank(4);
  v.expect_rank(4);
  ForwardShape& s = params.shape;
  s.B = q.dim(0), s.T = q.dim(1), s.H = q.dim(2), s.K = q.dim(3);
  s.HV = v.dim(2), s.V = v.dim(3);
  k.expect_shape("[B, T, H, K]", {s.B, s.T, s.H, s.K});
  v.expect_shape("[B, T, HV, V]", {s.B, s.T, s.HV, s.V});
  g.expect_shape("[B, T, HV, K]", {s.B, s.T, s.HV, s.K});
  beta.expect_shape("[B, T, HV]", {s.B, s.T, s.HV});
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
void read_A_log(const Operand& A_log, const ForwardShape& s, Pointer& pointer) {
  A_log.expect_dtype(ffi::F32);
  A_log.expect_shape("[B, HV]", {s.B, s.HV});
  pointer = A_log.data<float>();
}

template <typename Pointer>
void read_dt_bias(const Operand& dt_bias, const ForwardShape& s, Pointer& pointer) {
  dt_bias.expect_dtype(ffi::F32);
  dt_bias.expect_shape("[B, HV, K]", {s.B, s.HV, s.K});
  pointer = dt_bias.data<float>();
}

template <typename Pointer>
void read_state(const Operand& state, const ForwardShape& s, Pointer& pointer) {
  state.expect_dtype(ffi::F32);
  state.expect_shape("[B, N, HV, K, V]", {s.B, s.N, s.HV, s.K, s.V});
  pointer = state.data<float>();
}

// o or its cotangent.
template <typename Pointer>
void read_output(const Operand& o, const char* name, const ForwardParams& params,
                 Pointer& pointer) {
  const ForwardShape& s = params.shape;
  o.expect_shape("[B, T, HV, V]", {s.B, s.T, s.HV, s.V});
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
  if (present.A_log) read_A_log(operands.next("A_log"), s, params.A_log);
  if (present.dt_bias) read_dt_bias(operands.next("dt_bias"), s, params.dt_bias);
  if (present.initial_state) read_state(operands.next("initial_state"), s, params.initial_state);
  if (s.has_segment_ids) {
    const Operand segment_ids = operands.next("segment_ids");
    segment_ids.expect_dtype(ffi::S32);
    segment_ids.expect_shape("[B, T]", {s.B, s.T});
    params.segment_ids = segment_ids.data<int32_t>();
  }
  return present;
}

// The parts of a call, read in order; expect_end() refuses what nobody has read.
struct Call {
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary dictionary)
      : operands(args), results(rets), attributes(dictionary) {}

  void expect_end() const {
    operands.expect_end();
    results.expect_end();
    attributes.expect_end();
  }

  OperandReader operands;
  ResultReader results;
  AttributeReader attributes;
};

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

void check_call(const Status& status, const Operand& workspace, int64_t needed) {
  if (!status.ok()) throw RefusedCall(status.message);
  if (workspace.bytes() < needed) {
    refuse("workspace has " + std::to_string(workspace.bytes()) + " bytes, expected " +
                      std::to_string(needed) + ": was the program lowered by another version?");
  }
}

ForwardParams read_forward(Call call) {
  ForwardParams params{};
  read_inputs(call, params);
  read_output(call.results.next("o"), "o", params, params.o);
  if (call.attributes.get<bool>("return_final_state"))
    read_state(call.results.next("final_state"), params.shape, params.final_state);
  const Operand workspace = read_workspace(call, params);
  call.expect_end();
  check_call(check_forward(params), workspace, forward_workspace_bytes(params.shape));
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
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_state_maps(params), workspace, forward_workspace_bytes(s));
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
  if (present.A_log) read_A_log(results.next("dA_log"), s, params.dA_log);
  if (present.dt_bias) read_dt_bias(results.next("d_dt_bias"), s, params.d_dt_bias);
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
  const Operand workspace = read_workspace(call, forward);
  call.expect_end();
  check_call(check_state_gradient(params), workspace, backward_workspace_bytes(forward.shape));
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

// q, k, v, g, beta of a step, and its sizes.
void read_step_data(OperandReader& operands, StepParams& params) {
  const Operand q = operands.next("q"), k = operands.next("k"), v = operands.next("v");
  const Operand g = operands.next("g"), beta = operands.next("beta");
  q.expect_rank(4);
  v.expect_rank(4);
  StepShape& s = params.shape;
  s.N = q.dim(0), s.T = q.dim(1), s.H = q.dim(2), s.K = q.dim(3);
  s.HV = v.dim(2), s.V = v.dim(3);
  k.expect_shape("[N, T, H, K]", {s.N, s.T, s.H, s.K});
  v.expect_shape("[N, T, HV, V]", {s.N, s.T, s.HV, s.V});
  g.expect_shape("[N, T, HV, K]", {s.N, s.T, s.HV, s.K});
  beta.expect_shape("[N, T, HV]", {s.N, s.T, s.HV});
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

// One row of gate parameters for all sequences, or one for each.
void read_step_parameters(Call& call, StepParams& params) {
  const StepShape& s = params.shape;
  const bool has_A_log = call.attributes.get<bool>("has_A_log");
  const bool has_dt_bias = call.attributes.get<bool>("has_dt_bias");
  params.parameters_per_sequence = call.attributes.get<bool>("parameters_per_sequence");
  const int64_t rows = params.parameters_per_sequence ? s.N : 1;
  if (has_A_log) {
    const Operand A_log = call.operands.next("A_log");
    A_log.expect_dtype(ffi::F32);
    A_log.expect_shape("[P, HV]", {rows, s.HV});
    params.A_log = A_log.data<float>();
  }
  if (has_dt_bias) {
    const Operand dt_bias = call.operands.next("dt_bias");
    dt_bias.expect_dtype(ffi::F32);
    dt_bias.expect_shape("[P, HV, K]", {rows, s.HV, s.K});
    params.dt_bias = dt_bias.data<float>();
  }
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
  if (given.data<void>() != params.state)
    refuse("state is not updated in place: operand and result have different memory");
}

StepParams read_step(Call call) {
  StepParams params{};
  read_options(call.attributes, params);
  read_step_data(call.operands, params);
  read_step_parameters(call, params);
  const StepShape& s = params.shape;
  const Operand o = call.results.next("o");
  o.expect_shape("[N, T, HV, V]", {s.N, s.T, s.HV, s.V});
  if (o.float_dtype() != params.qkv_dtype) refuse("o has another dtype than v");
  params.o = o.data<void>();
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
  const Status status = check_step(params);
  if (!status.ok()) throw RefusedCall(status.message);
  return params;
}

// Runs `body` and turns whatever it throws into an error that names the target.
template <typename Body>
ffi::Error guarded(const char* target, Body body) {
  const auto named = [&](const char* text) { return std::string(target) + ": " + text; };
  try {
    return body();
  } catch (const RefusedCall& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const InvalidCall& error) {
    return ffi::Error::InvalidArgument(named(error.what()));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(named(error.what()));
  } catch (...) {
    return ffi::Error::Internal(named("unknown exception"));
  }
}

ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::Internal(status.message);
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

ffi::Error execute_forward(CUstream_st* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Dictionary attributes) {
  return guarded(kForward, [&] {
    return to_error(forward(read_forward({args, rets, attributes}), stream));
  });
}

ffi::Error execute_backward(CUstream_st* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                            ffi::Dictionary attributes) {
  return guarded(kBackward, [&] {
    return to_error(backward(read_backward({args, rets, attributes}), stream));
  });
}

ffi::Error execute_step(CUstream_st* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes) {
  return guarded(kStep, [&] {
    return to_error(step(read_step({args, rets, attributes}), stream));
  });
}

ffi::Error execute_state_maps(CUstream_st* stream, ffi::RemainingArgs args,
                              ffi::RemainingRets rets, ffi::Dictionary attributes) {
  return guarded(kStateMaps, [&] {
    return to_error(state_maps(read_state_maps({args, rets, attributes}), stream));
  });
}

ffi::Error execute_state_gradient(CUstream_st* stream, ffi::RemainingArgs args,
                                  ffi::RemainingRets rets, ffi::Dictionary attributes) {
  return guarded(kStateGradient, [&] {
    return to_error(state_gradient(read_state_gradient({args, rets, attributes}), stream));
  });
}

ffi::Error only_check_state_maps(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                 ffi::Dictionary attributes) {
  return guarded(kStateMaps, [&] {
    read_state_maps({args, rets, attributes});
    return ffi::Error::Success();
  });
}

ffi::Error only_check_state_gradient(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                     ffi::Dictionary attributes) {
  return guarded(kStateGradient, [&] {
    read_state_gradient({args, rets, attributes});
    return ffi::Error::Success();
  });
}

ffi::Error only_check_forward(ffi::RemainingArgs args, ffi::RemainingRets rets,
                              ffi::Dictionary attributes) {
  return guarded(kForward, [&] {
    read_forward({args, rets, attributes});
    return ffi::Error::Success();
  });
}

ffi::Error only_check_backward(ffi::RemainingArgs args, ffi::RemainingRets rets,
                               ffi::Dictionary attributes) {
  return guarded(kBackward, [&] {
    read_backward({args, rets, attributes});
    return ffi::Error::Success();
  });
}

ffi::Error only_check_step(ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Dictionary attributes) {
  return guarded(kStep, [&] {
    read_step({args, rets, attributes});
    return ffi::Error::Success();
  });
}

XLA_FFI_DEFINE_HANDLER(kInitializeHandler, initialize_device,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

// Command buffer compatible: they launch and do nothing else (no allocation, no query of the
// stream), and the launches follow from the operands' shapes.
XLA_FFI_DEFINE_HANDLER(kForwardHandler, execute_forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<CUstream_st*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kBackwardHandler, execute_backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<CUstream_st*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kStepHandler, execute_step,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<CUstream_st*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kStateMapsHandler, execute_state_maps,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<CUstream_st*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kStateGradientHandler, execute_state_gradient,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<CUstream_st*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kStateMapsCheckingHandler, only_check_state_maps,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER(kStateGradientCheckingHandler, only_check_state_gradient,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER(kStepCheckingHandler, only_check_step,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER(kForwardCheckingHandler, only_check_forward,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER(kBackwardCheckingHandler, only_check_backward,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

}  // namespace

std::vector<Handler> handlers() {
  return {
      {kForward, "initialize", reinterpret_cast<void*>(kInitializeHandler)},
      {kForward, "execute", reinterpret_cast<void*>(kForwardHandler)},
      {kBackward, "initialize", reinterpret_cast<void*>(kInitializeHandler)},
      {kBackward, "execute", reinterpret_cast<void*>(kBackwardHandler)},
      {kStateMaps, "initialize", reinterpret_cast<void*>(kInitializeHandler)},
      {kStateMaps, "execute", reinterpret_cast<void*>(kStateMapsHandler)},
      {kStateGradient, "initialize", reinterpret_cast<void*>(kInitializeHandler)},
      {kStateGradient, "execute", reinterpret_cast<void*>(kStateGradientHandler)},
      {kStep, "initialize", reinterpret_cast<void*>(kInitializeHandler)},
      {kStep, "execute", reinterpret_cast<void*>(kStepHandler)},
  };
}

std::vector<Handler> checking_handlers() {
  return {
      {kForward, "execute", reinterpret_cast<void*>(kForwardCheckingHandler)},
      {kBackward, "execute", reinterpret_cast<void*>(kBackwardCheckingHandler)},
      {kStateMaps, "execute", reinterpret_cast<void*>(kStateMapsCheckingHandler)},
      {kStateGradient, "execute", reinterpret_cast<void*>(kStateGradientCheckingHandler)},
      {kStep, "execute", reinterpret_cast<void*>(kStepCheckingHandler)},
  };
}

}  // namespace jax_flashkda
