// Times the forward without JAX: CUDA events, median over repeats, two input sets in rotation; the
// same with its stages one after the other, and overlapped; and each stage alone.
//   forward_time [name ...]
#include "problem/workspace.h"
#include "sm90/launch.h"
#include "timing.h"

namespace {

using namespace jax_flashkda;

void time_shape(const Shape& s, Gate gate, bool fast) {
  TimedInputs sets[2] = {{s, gate, fast, 1}, {s, gate, fast, 2}};
  const ForwardShape& shape = sets[0].params.shape;
  DeviceBuffer scratch(forward_workspace_bytes(shape));
  for (TimedInputs& set : sets) set.params.workspace = scratch.data();
  auto whole = [&](StageOrder order) {
    return median_ms([&](int i) {
      ForwardParams params = sets[i % 2].params;
      params.stage_order = order;
      require(forward(params, nullptr));
    });
  };
  const double chosen = whole(StageOrder::kByShape), serial = whole(StageOrder::kSerial),
               overlapped = whole(StageOrder::kOverlapped);
  auto stage = [&](const ForwardWorkspace& workspace, auto... launches) {
    return median_ms([&](int i) {
      ForwardParams params = sets[i % 2].params;
      params.workspace = aligned_workspace(params.workspace);
      (require(launches(params, workspace, nullptr)), ...);
    });
  };
  const ForwardWorkspace alone = forward_workspace(shape, StageOrder::kSerial),
                         beside = forward_workspace(shape, StageOrder::kOverlapped);
  const bool has_table = shape.has_segment_ids, in_pieces = alone.pieces.count > 1;
  const double table = has_table ? stage(alone, sm90::launch_segment_table) : 0.0;
  const double prepare = stage(alone, sm90::launch_chunk_prepare);
  const double pieces = in_pieces ? stage(alone, sm90::launch_chunk_state_pieces) : 0.0;
  const double state = stage(alone, sm90::launch_chunk_state_output);
  ForwardWorkspace apart = alone;
  apart.short_runs = leaves_short_runs(sets[0].params);
  const double of_short =
      apart.short_runs ? stage(apart, sm90::launch_segment_table, sm90::launch_short_segments)
                       : 0.0;
  const double floor = 5.0 * s.B * s.T * s.HV * 256 / 4.3e9;
  std::printf(
      "%-14s %-8s %-4s  all %7.3f ms  serial %7.3f  table %6.3f  prepare %7.3f  pieces %7.3f  "
      "state %7.3f  table and short %7.3f  floor %.3f",
      s.name, gate == Gate::kSoftplus ? "softplus" : "bounded", fast ? "fast" : "slow", chosen,
      serial, table, prepare, pieces, state, of_short, floor);
  if (!in_pieces) {  // each on its share of the device, the other not running
    const double share = stage(beside, sm90::clear_progress, sm90::launch_chunk_prepare);
    std::printf("  overlapped %7.3f (%ld for state)  prepare %7.3f  state %7.3f", overlapped,
                beside.overlap.processors, share, stage(beside, sm90::launch_chunk_state_output));
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) { return time_shapes(argc, argv, time_shape); }
