// Answers one line of input, a stage and a call of it as numbers, with one line: the bytes of its
// workspace and what check_forward or check_backward has to say about it. For the stage "pieces":
// into how many its rows are cut, and how many tokens each has. For "overlap": how many
// multiprocessors the state stage has beside chunk_prepare, for how many tracks, and whether in
// half heads. For the stage "step": 0 bytes and what check_step says. For "short_conv",
// "short_conv_backward" and "short_conv_step": the bytes and what their checks say.
// tests/test_native_host.py writes the lines. Needs no CUDA.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

#include "dispatch/dispatch.h"
#include "problem/workspace.h"

using namespace jax_flashkda;

namespace {

template <typename T>
T number(std::istream& line) {
  T value;
  line >> value;
  return value;
}

float real(std::istream& line) { return std::strtof(number<std::string>(line).c_str(), nullptr); }

template <typename T>
T* address(std::istream& line) { return reinterpret_cast<T*>(number<uintptr_t>(line)); }

// Options and operands of every call.
template <class Params>
void parse_data(std::istream& line, Params& p) {
  p.gate = Gate(number<int32_t>(line));
  p.gate_lower_bound = real(line);
  p.beta_is_logits = number<bool>(line);
  p.allow_neg_eigval = number<bool>(line);
  p.scale = real(line);
  for (const void** operand : {&p.q, &p.k, &p.v, &p.g, &p.beta}) *operand = address<void>(line);
  p.A_log = address<float>(line);
  p.dt_bias = address<float>(line);
}

// Of a forward call the gradients are ignored, of a backward call the forward's results.
BackwardParams parse(std::istream& line) {
  BackwardParams backward{};
  ForwardParams& p = backward.forward;
  ForwardShape& s = p.shape;
  for (int64_t* size : {&s.B, &s.T, &s.H, &s.HV, &s.K, &s.V, &s.N}) *size = number<int64_t>(line);
  s.has_segment_ids = number<bool>(line);
  for (DType* dtype : {&p.qkv_dtype, &p.g_dtype, &p.beta_dtype}) {
    *dtype = DType(number<int32_t>(line));
  }
  parse_data(line, p);
  p.initial_state = address<float>(line);
  p.segment_ids = address<int32_t>(line);
  p.o = address<void>(line);
  p.final_state = address<float>(line);
  p.chunk_states = address<float>(line);
  p.workspace = address<void>(line);
  backward.d_o = address<void>(line);
  backward.d_final_state = address<float>(line);
  for (void** gradient :
       {&backward.dq, &backward.dk, &backward.dv, &backward.dg, &backward.d_beta}) {
    *gradient = address<void>(line);
  }
  for (float** gradient : {&backward.dA_log, &backward.d_dt_bias, &backward.d_initial_state}) {
    *gradient = address<float>(line);
  }
  return backward;
}

StepParams parse_step(std::istream& line) {
  StepParams p{};
  StepShape& s = p.shape;
  for (int64_t* size : {&s.N, &s.T, &s.H, &s.HV, &s.K, &s.V, &s.slots}) {
    *size = number<int64_t>(line);
  }
  for (DType* dtype : {&p.qkv_dtype, &p.g_dtype, &p.beta_dtype, &p.state_dtype}) {
    *dtype = DType(number<int32_t>(line));
  }
  parse_data(line, p);
  p.state_indices = address<int32_t>(line);
  for (void** pointer : {&p.state, &p.o, &p.token_states}) *pointer = address<void>(line);
  return p;
}

// Of a forward call y is the address after those of the inputs.
ShortConvBackwardParams parse_short_conv(std::istream& line) {
  ShortConvBackwardParams p{};
  ShortConvParams& f = p.forward;
  for (int64_t* size : {&f.shape.B, &f.shape.T, &f.shape.C, &f.shape.N}) {
    *size = number<int64_t>(line);
  }
  f.dtype = DType(number<int32_t>(line));
  f.x = address<void>(line);
  for (const float** operand : {&f.kernel, &f.bias, &f.initial_state}) {
    *operand = address<float>(line);
  }
  f.segment_ids = address<int32_t>(line);
  f.y = address<void>(line);
  p.d_y = address<void>(line);
  p.dx = address<void>(line);
  for (float** gradient : {&p.d_kernel, &p.d_bias, &p.d_initial_state}) {
    *gradient = address<float>(line);
  }
  p.workspace = address<void>(line);
  return p;
}

ShortConvStepParams parse_short_conv_step(std::istream& line) {
  ShortConvStepParams p{};
  for (int64_t* size : {&p.shape.N, &p.shape.T, &p.shape.C, &p.shape.slots}) {
    *size = number<int64_t>(line);
  }
  for (DType* dtype : {&p.dtype, &p.kernel_dtype, &p.state_dtype}) {
    *dtype = DType(number<int32_t>(line));
  }
  for (const void** operand : {&p.x, &p.kernel, &p.bias}) *operand = address<void>(line);
  p.state_indices = address<int32_t>(line);
  for (void** pointer : {&p.state, &p.y}) *pointer = address<void>(line);
  return p;
}

// Whether the stage is one of the short convolution's, and the line could be read.
bool answer_short_conv(const std::string& stage, std::istream& line) {
  if (stage == "short_conv_step") {
    const ShortConvStepParams params = parse_short_conv_step(line);
    std::cout << "0 " << check_short_conv_step(params).message << std::endl;
  } else if (stage == "short_conv" || stage == "short_conv_backward") {
    const ShortConvBackwardParams params = parse_short_conv(line);
    const bool forward = stage == "short_conv";
    std::cout << (forward ? 0 : short_conv_workspace_bytes(params.forward.shape)) << ' '
              << (forward ? check_short_conv(params.forward) : check_short_conv_backward(params))
                     .message
              << std::endl;
  } else {
    return false;
  }
  return static_cast<bool>(line);
}

}  // namespace

int main() {
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    const auto stage = number<std::string>(line);
    if (stage == "step") {
      const StepParams params = parse_step(line);
      if (!line) return EXIT_FAILURE;
      std::cout << "0 " << check_step(params).message << std::endl;
      continue;
    }
    if (stage.rfind("short_conv", 0) == 0) {
      if (!answer_short_conv(stage, line)) return EXIT_FAILURE;
      continue;
    }
    const BackwardParams params = parse(line);
    if (!line) return EXIT_FAILURE;
    const ForwardShape& shape = params.forward.shape;
    if (stage == "forward") {
      std::cout << forward_workspace_bytes(shape) << ' ' << check_forward(params.forward).message;
    } else if (stage == "backward") {
      std::cout << backward_workspace_bytes(shape) << ' ' << check_backward(params).message;
    } else if (stage == "pieces") {
      const StatePieces pieces = state_pieces(shape);
      std::cout << pieces.count << ' ' << pieces.tokens;
    } else if (stage == "overlap") {
      const StageOverlap overlap = forward_workspace(shape).overlap;
      std::cout << overlap.processors << ' ' << overlap.tracks << ' ' << overlap.half_heads;
    } else {
      return EXIT_FAILURE;
    }
    std::cout << std::endl;
  }
}
