// Every launch function of this architecture: what dispatch sees of it. Plain host C++.
#pragma once

#include "core/status.h"
#include "problem/params.h"
#include "problem/workspace.h"

struct CUstream_st;

namespace jax_flashkda::sm90 {

// Refuses a device of another architecture; raises the kernels' shared-memory limits on this one.
Status initialize(int device);

// The limits of one stage, on the current device.
Status initialize_chunk_prepare();
Status initialize_chunk_state_output();

// Segments and chunks of every row, from segment_ids.
Status launch_segment_table(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
// Final states of slots that no segment uses: the initial state, or zero.
Status launch_unused_states(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
Status launch_chunk_prepare(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream);
Status launch_chunk_state_output(const ForwardParams& params, const ForwardWorkspace& workspace,
                                 CUstream_st* stream);

}  // namespace jax_flashkda::sm90
