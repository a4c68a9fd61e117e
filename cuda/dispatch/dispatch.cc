// The order of the stages. Plain host C++: the CUDA runtime is behind the launch functions.
#include "dispatch/dispatch.h"

#include "problem/workspace.h"
#include "sm90/launch.h"

namespace jax_flashkda {
namespace {

void* aligned_workspace(void* workspace) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
                                 kWorkspaceAlignment);
}

bool has_tokens(const ForwardShape& shape) { return shape.B > 0 && shape.T > 0; }

// Whether there are state slots that no segment may use.
bool may_leave_slots(const ForwardShape& shape) {
  return shape.B > 0 && shape.N > 0 && (shape.has_segment_ids || shape.T == 0);
}

// The tables, which nobody keeps.
Status find_segments(const ForwardParams& params, const ForwardWorkspace& workspace,
                     CUstream_st* stream) {
  return params.shape.has_segment_ids ? sm90::launch_segment_table(params, workspace, stream)
                                      : Status{};
}

// What a call begins with that nobody has prepared.
Status prepare_chunks(const ForwardParams& params, const ForwardWorkspace& workspace,
                      CUstream_st* stream) {
  if (workspace.overlap.processors > 0) {
    if (Status status = sm90::clear_progress(params, workspace, stream); !status.ok())
      return status;
  }
  if (Status status = find_segments(params, workspace, stream); !status.ok()) return status;
  return sm90::launch_chunk_prepare(params, workspace, stream);
}

// Rows in which every run is short: no chunks.
Status short_rows(const ForwardParams& params, const ForwardWorkspace& workspace,
                  CUstream_st* stream) {
  if (Status status = find_segments(params, workspace, stream); !status.ok()) return status;
  return sm90::launch_short_segments(params, workspace, stream);
}

// What the backward's stages take.
BackwardParams for_backward(const BackwardParams& given) {
  BackwardParams params = given;
  params.forward.workspace = aligned_workspace(given.forward.workspace);
  params.forward.o = nullptr;
  params.forward.final_state = nullptr;
  params.forward.chunk_states = nullptr;
  params.forward.nonzero_beta = true;
  return params;
}

// Of a shard of longer rows, which a segment may go on behind.
ForwardParams for_shard(const ForwardParams& given) {
  ForwardParams params = given;
  params.workspace = aligned_workspace(given.workspace);
  params.nonzero_beta = false;
  params.shape.tail_slot = params.shape.has_segment_ids;
  return params;
}

BackwardParams for_backward_of_shard(const BackwardParams& given) {
  BackwardParams params = for_backward(given);
  params.forward.shape.tail_slot = params.forward.shape.has_segment_ids;
  return params;
}

// The workspace, with offsets that lead to what is prepared and lies apart from it.
ForwardWorkspace place_prepared(const ForwardParams& params, ForwardWorkspace workspace) {
  const auto offset = [&](const void* place) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(place) -
                                reinterpret_cast<uintptr_t>(params.workspace));
  };
  workspace.operands = offset(params.prepared);
  workspace.betas = offset(params.betas);
  workspace.chunk_decay = offset(params.decays);
  return workspace;
}

// A slot that no segment uses is passed through, and so is its gradient.
Status pass_unused_gradients(const BackwardParams& params, const BackwardWorkspace& workspace,
                             CUstream_st* stream) {
  if (params.d_initial_state == nullptr || !may_leave_slots(params.forward.shape)) return {};
  ForwardParams states = params.forward;
  states.initial_state = params.d_final_state;
  states.final_state = params.d_initial_state;
  return sm90::launch_unused_states(states, workspace.forward, stream);
}

// The backward of chunks that are prepared.
Status gradients(const BackwardParams& params, const BackwardWorkspace& workspace,
                 CUstream_st* stream) {
  if (has_tokens(params.forward.shape)) {
    if (Status status = sm90::launch_chunk_state_gradient(params, workspace, stream); !status.ok())
      return status;
    if (Status status = sm90::launch_chunk_gradient(params, workspace, stream); !status.ok())
      return status;
  }
  if (params.forward.shape.B > 0) {
    if (Status status = sm90::launch_gradient_reduce(params, workspace, stream); !status.ok())
      return status;
  }
  return pass_unused_gradients(params, workspace, stream);
}

}  // namespace

// With a second architecture: by the device's compute capability.
Status initialize(int device) { return sm90::initialize(device); }

Status forward(const ForwardParams& given, CUstream_st* stream) {
  if (Status status = check_forward(given); !status.ok()) return status;
  ForwardParams params = given;
  params.workspace = aligned_workspace(given.workspace);
  params.nonzero_beta = false;
  // States inside a row are those of a call that ends there: in no pieces.
  const bool chunk_states = params.chunk_states != nullptr;
  ForwardWorkspace workspace =
      forward_workspace(params.shape, chunk_states ? StageOrder::kWholeRows : params.stage_order);
  workspace.short_runs = leaves_short_runs(params);

  if (has_tokens(params.shape)) {
    if (workspace.short_runs && params.shape.T <= kShortTokens)
      return short_rows(params, workspace, stream);
    if (chunk_states && params.shape.has_segment_ids) {
      if (Status status = sm90::clear_chunk_states(params, stream); !status.ok()) return status;
    }
    if (Status status = prepare_chunks(params, workspace, stream); !status.ok()) return status;
    if (workspace.pieces.count > 1) {
      if (Status status = sm90::launch_chunk_state_pieces(params, workspace, stream); !status.ok())
        return status;
    }
    if (Status status = sm90::launch_chunk_state_output(params, workspace, stream); !status.ok())
      return status;
    if (workspace.short_runs) {
      if (Status status = sm90::launch_short_segments(params, workspace, stream); !status.ok())
        return status;
    }
  }
  if (params.final_state != nullptr && may_leave_slots(params.shape))
    return sm90::launch_unused_states(params, workspace, stream);
  return {};
}

Status prepared_forward(const ForwardParams& given, CUstream_st* stream) {
  if (Status status = check_prepared_forward(given); !status.ok()) return status;
  const ForwardParams params = for_shard(given);
  const ForwardWorkspace workspace = place_prepared(params, prepared_workspace(params.shape));
  if (has_tokens(params.shape)) {
    if (params.shape.has_segment_ids) {
      if (Status status = sm90::clear_output(params, stream); !status.ok()) return status;
    }
    if (Status status = find_segments(params, workspace, stream); !status.ok()) return status;
    if (Status status = sm90::launch_chunk_state_output(params, workspace, stream); !status.ok())
      return status;
  }
  if (params.final_state != nullptr && may_leave_slots(params.shape))
    return sm90::launch_unused_states(params, workspace, stream);
  return {};
}

Status backward(const BackwardParams& given, CUstream_st* stream) {
  if (Status status = check_backward(given); !status.ok()) return status;
  const BackwardParams params = for_backward(given);
  const BackwardWorkspace workspace = backward_workspace(params.forward.shape);
  if (has_tokens(params.forward.shape)) {
    if (Status status = prepare_chunks(params.forward, workspace.forward, stream); !status.ok())
      return status;
  }
  return gradients(params, workspace, stream);
}

Status prepared_backward(const BackwardParams& given, CUstream_st* stream) {
  if (Status status = check_prepared_backward(given); !status.ok()) return status;
  const BackwardParams params = for_backward_of_shard(given);
  BackwardWorkspace workspace = backward_workspace(params.forward.shape, /*prepared_apart=*/true);
  workspace.forward = place_prepared(params.forward, workspace.forward);
  if (has_tokens(params.forward.shape)) {
    if (Status status = find_segments(params.forward, workspace.forward, stream); !status.ok())
      return status;
  }
  return gradients(params, workspace, stream);
}

Status state_gradient(const BackwardParams& given, CUstream_st* stream) {
  if (Status status = check_state_gradient(given); !status.ok()) return status;
  const BackwardParams params = for_backward_of_shard(given);
  BackwardWorkspace workspace{};
  workspace.forward = place_prepared(params.forward, prepared_workspace(params.forward.shape));
  if (has_tokens(params.forward.shape)) {
    if (Status status = prepare_chunks(params.forward, workspace.forward, stream); !status.ok())
      return status;
    if (Status status = sm90::launch_state_gradient(params, workspace, stream); !status.ok())
      return status;
  }
  return pass_unused_gradients(params, workspace, stream);
}

Status state_maps(const StateMapsParams& given, CUstream_st* stream) {
  if (Status status = check_state_maps(given); !status.ok()) return status;
  StateMapsParams params = given;
  params.forward = for_shard(given.forward);
  const ForwardShape& shape = params.forward.shape;
  const ForwardWorkspace workspace = place_prepared(params.forward, prepared_workspace(shape));
  if (!has_tokens(shape)) return {};
  if (Status status = prepare_chunks(params.forward, workspace, stream); !status.ok())
    return status;
  return sm90::launch_state_maps(params, workspace, stream);
}

Status step(const StepParams& params, CUstream_st* stream) {
  if (Status status = check_step(params); !status.ok()) return status;
  if (params.shape.N == 0) return {};
  return sm90::launch_decode_step(params, stream);
}

Status convolve(const ShortConvParams& params, CUstream_st* stream) {
  if (Status status = check_short_conv(params); !status.ok()) return status;
  if (params.shape.B == 0 || params.shape.T == 0) return {};
  return sm90::launch_short_conv(params, stream);
}

Status convolve_backward(const ShortConvBackwardParams& params, CUstream_st* stream) {
  if (Status status = check_short_conv_backward(params); !status.ok()) return status;
  if (params.forward.shape.B == 0) return {};
  return sm90::launch_short_conv_backward(params, stream);
}

Status convolve_step(const ShortConvStepParams& params, CUstream_st* stream) {
  if (Status status = check_short_conv_step(params); !status.ok()) return status;
  if (params.shape.N == 0) return {};
  return sm90::launch_short_conv_step(params, stream);
}

}  // namespace jax_flashkda
