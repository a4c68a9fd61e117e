// Times the forward without JAX: CUDA events, median over repeats, two input sets in rotation; and
// each stage alone.
//   forward_time [name ...]
#include "problem/workspace.h"
#include "sm90/launch.h"
#include "timing.h"

namespace {

using namespace jax_flashkda;

void time_shape(const Shape& s, Gate gate, bool fast) {
  TimedInputs sets[2] = {{s, gate, fast, 1}, {s, gate, fast, 2}};
  DeviceBuffer scratch(forward_workspace_bytes(sets[0].params.shape));
  for (TimedInputs& set : sets) set.params.workspace = scratch.data();
  const double whole = median_ms([&](int i) { require(forward(sets[i % 2].params, nullptr)); });
  const ForwardWorkspace workspace = forward_workspace(sets[0].params.shape);
  auto aligned = [&](int i) {
    ForwardParams params = sets[i % 2].params;
    params.workspace = aligned_workspace(params.workspace);
    return params;
  };
  double table = 0.0;
  if (!s.lengths.empty())
    table = median_ms(
        [&](int i) { require(sm90::launch_segment_table(aligned(i), workspace, nullptr)); });
  const double prepare = median_ms(
      [&](int i) { require(sm90::launch_chunk_prepare(aligned(i), workspace, nullptr)); });
  const double state = median_ms(
      [&](int i) { require(sm90::launch_chunk_state_output(aligned(i), workspace, nullptr)); });
  const double floor = 5.0 * s.B * s.T * s.HV * 256 / 4.3e9;
  std::printf(
      "%-14s %-8s %-4s  all %7.3f ms  table %6.3f  prepare %7.3f  state %7.3f  floor %.3f\n",
      s.name, gate == Gate::kSoftplus ? "softplus" : "bounded", fast ? "fast" : "slow", whole,
      table, prepare, state, floor);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) { return time_shapes(argc, argv, time_shape); }
