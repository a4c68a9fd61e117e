// The order of the stages. Plain host C++: the CUDA runtime is behind the launch functions.
#include "dispatch/dispatch.h"

#include "problem/workspace.h"
#include "sm90/launch.h"

namespace jax_flashkda {

// With a second architecture: by the device's compute capability.
Status initialize(int device) { return sm90::initialize(device); }

Status forward(const ForwardParams& given, CUstream_st* stream) {
  if (Status status = check_forward(given); !status.ok()) return status;
  ForwardParams params = given;
  const ForwardShape& shape = params.shape;
  const auto address = reinterpret_cast<uintptr_t>(params.workspace);
  params.workspace = reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) /
                                             kWorkspaceAlignment * kWorkspaceAlignment);
  const ForwardWorkspace workspace = forward_workspace(shape);

  const bool tokens = shape.B > 0 && shape.T > 0;
  if (tokens && shape.has_segment_ids) {
    if (Status status = sm90::launch_segment_table(params, workspace, stream); !status.ok())
      return status;
  }
  if (tokens) {
    if (Status status = sm90::launch_chunk_prepare(params, workspace, stream); !status.ok())
      return status;
    if (Status status = sm90::launch_chunk_state_output(params, workspace, stream); !status.ok())
      return status;
  }
  const bool slots = shape.B > 0 && shape.N > 0 && (shape.has_segment_ids || shape.T == 0);
  if (params.final_state != nullptr && slots)
    return sm90::launch_unused_states(params, workspace, stream);
  return {};
}

}  // namespace jax_flashkda
