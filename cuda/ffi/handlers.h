// The XLA FFI handlers, as plain pointers: only this folder sees XLA's headers.
#pragma once

#include <vector>

namespace jax_flashkda {

struct Handler {
  const char* target;  // the custom call's name
  const char* stage;   // "initialize" or "execute"
  void* function;      // an XLA_FFI_Handler
};

// What JAX registers for the platform CUDA.
std::vector<Handler> handlers();

// The same targets' execute stage stopped before the launch: operands, results and attributes are
// decoded and checked, no memory is read or written. Needs neither a GPU nor a stream, so that the
// checks are tested through XLA on a CPU.
std::vector<Handler> checking_handlers();

// Those of the short convolution among them, without initialize.
std::vector<Handler> short_conv_handlers();
std::vector<Handler> short_conv_checking_handlers();

}  // namespace jax_flashkda
