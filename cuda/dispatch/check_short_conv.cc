// Checks and sizes of the short convolution: plain host C++, as check.cc.
#include <string>
#include <vector>

#include "dispatch/dispatch.h"
#include "dispatch/problems.h"
#include "dispatch/variants.h"

namespace jax_flashkda {
namespace {

// The grids have at most a CTA for every so many channels of every token, that of the backward's
// last stage one for those of each sum.
constexpr int64_t kChannelsOfCta = 128;

void check_channels(int64_t C, Problems& problems) {
  if (C <= 0 || C % kShortConvChannelMultiple != 0)
    problems.add("there are ", C, " channels, must be a positive multiple of ",
                 kShortConvChannelMultiple);
}

// `rows` and `tokens` by their names in the call.
void check_ctas(const char* what, int64_t rows, int64_t tokens, int64_t C, Problems& problems) {
  if (rows <= 0 || tokens <= 0 || C <= 0) return;
  const int64_t groups = (C - 1) / kChannelsOfCta + 1;
  if (tokens > kMaxTokens / rows || groups > kMaxTokens / (rows * tokens))
    problems.add(what, " is ", rows, " * ", tokens, " * ", groups,
                 ", must be below 2^31: split the batch");
}

void check_shape(const ShortConvShape& s, Problems& problems) {
  const auto not_negative = [&](const char* what, int64_t value) {
    if (value < 0) problems.add(what, " is ", value, ", must not be negative");
  };
  not_negative("B", s.B);
  not_negative("T", s.T);
  not_negative("N", s.N);
  check_channels(s.C, problems);
  check_ctas("B * max(T, 5) * ceil(channels / 128)", s.B, std::max(s.T, kShortConvSums), s.C,
             problems);
}

void check_dtype(const char* what, DType dtype, const std::vector<DType>& taken,
                 Problems& problems) {
  if (!contains(taken, dtype))
    problems.add(what, " is ", name(dtype), ", the kernels take ", names(taken));
}

bool has_elements(const ShortConvShape& s) { return s.B > 0 && s.T > 0; }

void check_inputs(const ShortConvParams& p, Problems& problems) {
  const ShortConvShape& s = p.shape;
  check_shape(s, problems);
  check_dtype("x", p.dtype, compiled_short_conv_variants()[0].dtypes, problems);
  check_pointer("x", p.x, has_elements(s), 16, problems);
  check_pointer("kernel", p.kernel, s.B > 0, 16, problems);
  check_pointer("bias", p.bias, false, 16, problems);
  check_pointer("initial_state", p.initial_state, false, 16, problems);
  check_pointer("segment_ids", p.segment_ids, false, 4, problems);
  if (p.initial_state != nullptr && p.segment_ids == nullptr && s.N != 1)
    problems.add("N is ", s.N, ", must be 1 without segment_ids");
}

// A gradient for each operand of the call and no other.
void check_optional_gradient(const char* what, const void* operand, const void* gradient,
                             Problems& problems) {
  check_pointer(what, gradient, operand != nullptr, 16, problems);
  if (operand == nullptr && gradient != nullptr)
    problems.add(what, " was asked for, but the call has no such operand");
}

}  // namespace

std::vector<ShortConvVariant> short_conv_variants() { return compiled_short_conv_variants(); }

Status check_short_conv(const ShortConvParams& params) {
  Problems problems;
  check_inputs(params, problems);
  check_pointer("y", params.y, has_elements(params.shape), 16, problems);
  return problems.status("jax_flashkda.short_conv");
}

Status check_short_conv_backward(const ShortConvBackwardParams& params) {
  Problems problems;
  const ShortConvParams& forward = params.forward;
  const bool elements = has_elements(forward.shape);
  check_inputs(forward, problems);
  check_pointer("d_y", params.d_y, elements, 16, problems);
  check_pointer("dx", params.dx, elements, 16, problems);
  check_pointer("d_kernel", params.d_kernel, forward.shape.B > 0, 16, problems);
  check_optional_gradient("d_bias", forward.bias, params.d_bias, problems);
  check_optional_gradient("d_initial_state", forward.initial_state, params.d_initial_state,
                          problems);
  check_pointer("workspace", params.workspace, elements, 16, problems);
  return problems.status("jax_flashkda.short_conv_backward");
}

Status check_short_conv_step(const ShortConvStepParams& params) {
  Problems problems;
  const ShortConvStepShape& s = params.shape;
  const std::vector<DType> taken = compiled_short_conv_variants()[0].step_dtypes;
  if (s.N < 0) problems.add("N is ", s.N, ", must not be negative");
  if (s.T < 1 || s.T > kMostStepTokens)
    problems.add("T is ", s.T, ", must lie in [1, ", kMostStepTokens, "]");
  if (s.slots < 0) problems.add("slots is ", s.slots, ", must not be negative");
  check_channels(s.C, problems);
  check_ctas("N * ceil(channels / 128)", s.N, 1, s.C, problems);
  check_dtype("x", params.dtype, taken, problems);
  check_dtype("kernel", params.kernel_dtype, taken, problems);
  check_dtype("state", params.state_dtype, taken, problems);
  const bool tokens = s.N > 0;
  check_pointer("x", params.x, tokens, 16, problems);
  check_pointer("kernel", params.kernel, tokens, 16, problems);
  check_pointer("bias", params.bias, false, 16, problems);
  check_pointer("state_indices", params.state_indices, false, 4, problems);
  if (params.state_indices == nullptr && s.slots != s.N)
    problems.add("slots is ", s.slots, ", must be N = ", s.N, " without state_indices");
  check_pointer("state", params.state, tokens && s.slots > 0, 16, problems);
  check_pointer("y", params.y, tokens, 16, problems);
  return problems.status("jax_flashkda.short_conv_step");
}

int64_t short_conv_workspace_bytes(const ShortConvShape& shape) {
  Problems problems;
  check_shape(shape, problems);
  if (!problems.ok()) return 0;
  const int64_t tiles = shape.B * short_conv_tiles(shape, short_conv_walk(shape));
  return tiles * kShortConvSums * shape.C * static_cast<int64_t>(sizeof(float));
}

}  // namespace jax_flashkda
