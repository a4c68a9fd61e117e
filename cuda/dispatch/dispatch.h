// What the FFI handlers and the native tests call: no XLA types, no CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "problem/params.h"
#include "problem/short_conv.h"

struct CUstream_st;  // cudaStream_t

namespace jax_flashkda {

// One row of the compiled table: what a kernel set supports.
struct Variant {
  int arch;  // compute capability times ten: 90
  int64_t K;
  int64_t V;
  DType qkv_dtype;
  std::vector<DType> g_dtypes;
  std::vector<DType> beta_dtypes;
};

std::vector<Variant> variants();

// The same of the decode step.
struct StepVariant {
  int arch;
  int64_t K;
  int64_t V;
  std::vector<DType> token_dtypes;  // of q, k, v and o, of g, of beta
  std::vector<DType> state_dtypes;
};

std::vector<StepVariant> step_variants();

// The same of the short convolution.
struct ShortConvVariant {
  int arch;
  int64_t width;
  int64_t channel_multiple;        // channels are a multiple of this
  std::vector<DType> dtypes;       // of x
  std::vector<DType> step_dtypes;  // of the step's x, of its kernel, of its state
};

std::vector<ShortConvVariant> short_conv_variants();

const char* name(DType dtype);  // "f32", "bf16", "f16"

// Every refusal that needs no GPU: dimensions, types, alignment, ranges, missing or contradictory
// operands. Reads no memory behind the pointers.
Status check_forward(const ForwardParams& params);
Status check_backward(const BackwardParams& params);
Status check_step(const StepParams& params);
Status check_short_conv(const ShortConvParams& params);
Status check_short_conv_backward(const ShortConvBackwardParams& params);
Status check_short_conv_step(const ShortConvStepParams& params);
Status check_prepared_forward(const ForwardParams& params);
Status check_prepared_backward(const BackwardParams& params);
Status check_state_maps(const StateMapsParams& params);
Status check_state_gradient(const BackwardParams& params);

// Bytes of ForwardParams::workspace for either, zero for shapes that the checks refuse.
int64_t forward_workspace_bytes(const ForwardShape& shape);
int64_t backward_workspace_bytes(const ForwardShape& shape);
// The same without what chunk_prepare leaves; state_maps and state_gradient need that of the forward.
int64_t prepared_forward_workspace_bytes(const ForwardShape& shape);
int64_t prepared_backward_workspace_bytes(const ForwardShape& shape);
// Of ShortConvBackwardParams::workspace.
int64_t short_conv_workspace_bytes(const ShortConvShape& shape);

// Once for every device, outside stream capture: refuses an architecture that nothing was compiled
// for, and raises the kernels' shared-memory limits. Cheap to repeat.
Status initialize(int device);

// Checks, then launches on the stream of the current device: allocates nothing, never waits, may be
// captured.
Status forward(const ForwardParams& params, CUstream_st* stream);
Status backward(const BackwardParams& params, CUstream_st* stream);
Status step(const StepParams& params, CUstream_st* stream);
Status convolve(const ShortConvParams& params, CUstream_st* stream);
Status convolve_backward(const ShortConvBackwardParams& params, CUstream_st* stream);
Status convolve_step(const ShortConvStepParams& params, CUstream_st* stream);
// Of a shard of longer rows, before what comes in is known. What they prepare is an operand of the
// same tokens' forward or backward once it is. With segment_ids all four have ForwardShape::tail_slot.
Status state_maps(const StateMapsParams& params, CUstream_st* stream);
// d_initial_state of the segments that begin their rows; of others nothing, or anything.
Status state_gradient(const BackwardParams& params, CUstream_st* stream);
Status prepared_forward(const ForwardParams& params, CUstream_st* stream);    // of state_maps
Status prepared_backward(const BackwardParams& params, CUstream_st* stream);  // of state_gradient

}  // namespace jax_flashkda
