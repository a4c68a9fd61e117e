// Every launch function of this architecture: what dispatch sees of it. Plain host C++.
#pragma once

#include "core/status.h"
#include "problem/params.h"
#include "problem/workspace.h"

struct CUstream_st;

namespace jax_flashkda {
struct ShortConvParams;
struct ShortConvBackwardParams;
struct ShortConvStepParams;
}  // namespace jax_flashkda

namespace jax_flashkda::sm90 {

// Refuses a device of another architecture; raises the kernels' shared-memory limits on this one.
Status initialize(int device);

// The limits of one stage, on the current device.
Status initialize_short_segments();
Status initialize_chunk_prepare();
Status initialize_chunk_state_output();
Status initialize_chunk_state_pieces();
Status initialize_chunk_state_gradient();
Status initialize_chunk_gradient();

// Segments and chunks of every row, from segment_ids; short runs apart where workspace.short_runs.
Status launch_segment_table(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
// Final states of slots that no segment uses: the initial state, or zero.
Status launch_unused_states(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
// Goes before everything else where workspace.overlap says that the stages overlap.
Status clear_progress(const ForwardParams& params, const ForwardWorkspace& workspace,
                      CUstream_st* stream);
// Goes before the other launches where chunk_states are wanted of rows with segment_ids, which may
// leave some of them out.
Status clear_chunk_states(const ForwardParams& params, CUstream_st* stream);
// Where there are segment_ids, directly behind launch_segment_table.
Status launch_chunk_prepare(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
// The states between the pieces of a row, where workspace.pieces says that there are several;
// directly behind launch_chunk_prepare.
Status launch_chunk_state_pieces(const ForwardParams& params, const ForwardWorkspace& workspace,
                                 CUstream_st* stream);
// The maps of the segment that ends each row; directly behind launch_chunk_prepare of params.forward.
Status launch_state_maps(const StateMapsParams& params, const ForwardWorkspace& workspace,
                         CUstream_st* stream);
// Directly behind launch_chunk_prepare, or launch_chunk_state_pieces where there are pieces.
Status launch_chunk_state_output(const ForwardParams& params, const ForwardWorkspace& workspace,
                                 CUstream_st* stream);
// Zeros to all of o: for padding, which chunk_prepare clears where it runs.
Status clear_output(const ForwardParams& params, CUstream_st* stream);

// Outputs of short runs, where workspace.short_runs: all that these have. Behind
// launch_segment_table where there are segment_ids, or the stages that follow it.
Status launch_short_segments(const ForwardParams& params, const ForwardWorkspace& workspace,
                             CUstream_st* stream);

// The backward, behind segment_table and chunk_prepare of params.forward.
// Walks each segment forwards, for the states at its boundaries and the corrected values, and
// backwards, for the state gradients at its boundaries, dv and d_initial_state.
Status launch_chunk_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                                   CUstream_st* stream);
// Backwards alone, the segment that begins each row: nothing is kept but its d_initial_state.
Status launch_state_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream);
// All chunks at once: dq, dk (of each value head where HV > H), dg, d_beta, partial sums of dA_log
// and d_dt_bias; and zeros for padding, in dv too.
Status launch_chunk_gradient(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream);
// The sums left over, in a fixed order: dA_log and d_dt_bias (zero without tokens); dq and dk where
// HV > H.
Status launch_gradient_reduce(const BackwardParams& params, const BackwardWorkspace& workspace,
                              CUstream_st* stream);

// The decode step.
Status launch_decode_step(const StepParams& params, CUstream_st* stream);

// The short convolution, its gradients (of the kernel and the bias also without tokens), its step.
Status launch_short_conv(const ShortConvParams& params, CUstream_st* stream);
Status launch_short_conv_backward(const ShortConvBackwardParams& params, CUstream_st* stream);
Status launch_short_conv_step(const ShortConvStepParams& params, CUstream_st* stream);

}  // namespace jax_flashkda::sm90
