// Handlers of the short convolution, as those of handlers.cc. Channels are two axes, H and K: only
// their product matters here.
//
// short_conv:          operands  x kernel [bias] [initial_state] [segment_ids]
//                      results   y
// short_conv_backward: operands  those of short_conv, d_y
//                      results   dx d_kernel [d_bias] [d_initial_state] workspace
// short_conv_step:     operands  x kernel [bias] state [state_indices]
//                      results   y state                (the state's memory is the operand's)

#include <string>

#include "dispatch/dispatch.h"
#include "ffi/call.h"
#include "ffi/handlers.h"

namespace jax_flashkda {
namespace {

constexpr char kShortConv[] = "jax_flashkda.short_conv";
constexpr char kShortConvBackward[] = "jax_flashkda.short_conv_backward";
constexpr char kShortConvStep[] = "jax_flashkda.short_conv_step";

// The dimensions that messages name.
struct Dims {
  int64_t B, T, H, K;
};

Dims read_x(const Operand& x) {
  x.expect_rank(4);
  return {x.dim(0), x.dim(1), x.dim(2), x.dim(3)};
}

void expect_like_x(const Operand& operand, const Operand& x, const Dims& d) {
  operand.expect_shape("[B, T, H, K]", {d.B, d.T, d.H, d.K});
  operand.expect_dtype(x.dtype());
}

// The kernel, the bias, the state, or their gradients.
template <typename Pointer>
void read_kernel(const Operand& kernel, const Dims& d, Pointer& pointer) {
  kernel.expect_dtype(ffi::F32);
  kernel.expect_shape("[B, W, H, K]", {d.B, kShortConvWidth, d.H, d.K});
  pointer = kernel.data<float>();
}

template <typename Pointer>
void read_bias(const Operand& bias, const Dims& d, Pointer& pointer) {
  bias.expect_dtype(ffi::F32);
  bias.expect_shape("[B, H, K]", {d.B, d.H, d.K});
  pointer = bias.data<float>();
}

template <typename Pointer>
void read_initial_state(const Operand& state, const Dims& d, int64_t N, Pointer& pointer) {
  state.expect_dtype(ffi::F32);
  state.expect_shape("[B, N, W - 1, H, K]", {d.B, N, kShortConvHistory, d.H, d.K});
  pointer = state.data<float>();
}

struct Inputs {
  Operand x;
  Dims dims;
  bool bias, initial_state;  // an operand without elements may be null
};

Inputs read_inputs(Call& call, ShortConvParams& params) {
  const Operand x = call.operands.next("x");
  const Inputs inputs = {x, read_x(x), call.attributes.get<bool>("has_bias"),
                         call.attributes.get<bool>("has_initial_state")};
  const Dims& d = inputs.dims;
  params.dtype = x.float_dtype();
  params.x = x.data<void>();
  params.shape.B = d.B, params.shape.T = d.T, params.shape.C = d.H * d.K;
  params.silu = call.attributes.get<bool>("silu");
  params.has_padding_segment_id = call.attributes.get<bool>("has_padding_segment_id");
  params.padding_segment_id = call.attributes.get<int32_t>("padding_segment_id");
  params.shape.N = call.attributes.get<int64_t>("max_segments");
  read_kernel(call.operands.next("kernel"), d, params.kernel);
  if (inputs.bias) read_bias(call.operands.next("bias"), d, params.bias);
  if (inputs.initial_state)
    read_initial_state(call.operands.next("initial_state"), d, params.shape.N,
                       params.initial_state);
  if (call.attributes.get<bool>("has_segment_ids")) {
    const Operand segment_ids = call.operands.next("segment_ids");
    segment_ids.expect_dtype(ffi::S32);
    segment_ids.expect_shape("[B, T]", {d.B, d.T});
    params.segment_ids = segment_ids.data<int32_t>();
  }
  return inputs;
}

ShortConvParams read_short_conv(Call call) {
  ShortConvParams params{};
  const Inputs inputs = read_inputs(call, params);
  const Operand y = call.results.next("y");
  expect_like_x(y, inputs.x, inputs.dims);
  params.y = y.data<void>();
  call.expect_end();
  refuse_unless_ok(check_short_conv(params));
  return params;
}

ShortConvBackwardParams read_short_conv_backward(Call call) {
  ShortConvBackwardParams params{};
  ShortConvParams& forward = params.forward;
  const Inputs inputs = read_inputs(call, forward);
  const Dims& d = inputs.dims;
  const Operand d_y = call.operands.next("d_y"), dx = call.results.next("dx");
  expect_like_x(d_y, inputs.x, d);
  expect_like_x(dx, inputs.x, d);
  params.d_y = d_y.data<void>();
  params.dx = dx.data<void>();
  read_kernel(call.results.next("d_kernel"), d, params.d_kernel);
  if (inputs.bias) read_bias(call.results.next("d_bias"), d, params.d_bias);
  if (inputs.initial_state)
    read_initial_state(call.results.next("d_initial_state"), d, forward.shape.N,
                       params.d_initial_state);
  const Operand workspace = call.results.next("workspace");
  workspace.expect_dtype(ffi::U8);
  workspace.expect_rank(1);
  params.workspace = workspace.data<void>();
  call.expect_end();
  check_call(check_short_conv_backward(params), workspace,
             short_conv_workspace_bytes(forward.shape));
  return params;
}

// One kernel and bias for all sequences, or one for each.
void read_step_parameters(Call& call, const Dims& d, ShortConvStepParams& params) {
  params.parameters_per_sequence = call.attributes.get<bool>("parameters_per_sequence");
  const int64_t rows = params.parameters_per_sequence ? d.B : 1;
  const Operand kernel = call.operands.next("kernel");
  kernel.expect_shape("[P, W, H, K]", {rows, kShortConvWidth, d.H, d.K});
  params.kernel_dtype = kernel.float_dtype();
  params.kernel = kernel.data<void>();
  if (call.attributes.get<bool>("has_bias")) {
    const Operand bias = call.operands.next("bias");
    bias.expect_shape("[P, H, K]", {rows, d.H, d.K});
    bias.expect_dtype(kernel.dtype());
    params.bias = bias.data<void>();
  }
}

// Operand and result, which XLA gives one memory because the program asks it to.
void read_step_state(Call& call, const Dims& d, ShortConvStepParams& params) {
  const Operand given = call.operands.next("state"), state = call.results.next("state");
  given.expect_rank(4);
  const int64_t slots = params.shape.slots = given.dim(0);
  given.expect_shape("[slots, W - 1, H, K]", {slots, kShortConvHistory, d.H, d.K});
  params.state_dtype = given.float_dtype();
  state.expect_dtype(given.dtype());
  state.expect_shape("[slots, W - 1, H, K]", {slots, kShortConvHistory, d.H, d.K});
  params.state = state.data<void>();
  expect_in_place(given, state);
}

ShortConvStepParams read_short_conv_step(Call call) {
  ShortConvStepParams params{};
  const Operand x = call.operands.next("x"), y = call.results.next("y");
  const Dims d = read_x(x);
  params.dtype = x.float_dtype();
  params.x = x.data<void>();
  params.shape.N = d.B, params.shape.T = d.T, params.shape.C = d.H * d.K;
  params.silu = call.attributes.get<bool>("silu");
  expect_like_x(y, x, d);
  params.y = y.data<void>();
  read_step_parameters(call, d, params);
  read_step_state(call, d, params);
  if (call.attributes.get<bool>("has_state_indices")) {
    const Operand indices = call.operands.next("state_indices");
    indices.expect_dtype(ffi::S32);
    indices.expect_shape("[N]", {d.B});
    params.state_indices = indices.data<int32_t>();
  }
  call.expect_end();
  refuse_unless_ok(check_short_conv_step(params));
  return params;
}

}  // namespace

std::vector<Handler> short_conv_handlers() {
  return {
      {kShortConv, "execute", executing_handler<kShortConv, read_short_conv, convolve>()},
      {kShortConvBackward, "execute",
       executing_handler<kShortConvBackward, read_short_conv_backward, convolve_backward>()},
      {kShortConvStep, "execute",
       executing_handler<kShortConvStep, read_short_conv_step, convolve_step>()},
  };
}

std::vector<Handler> short_conv_checking_handlers() {
  return {
      {kShortConv, "execute", checking_handler<kShortConv, read_short_conv>()},
      {kShortConvBackward, "execute",
       checking_handler<kShortConvBackward, read_short_conv_backward>()},
      {kShortConvStep, "execute", checking_handler<kShortConvStep, read_short_conv_step>()},
  };
}

}  // namespace jax_flashkda
