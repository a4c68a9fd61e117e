// Times the backward without JAX, and each of its stages alone; beside it the forward.
//   backward_time [name ...]
#include "problem/workspace.h"
#include "sm90/launch.h"
#include "timing.h"

namespace {

using namespace jax_flashkda;

struct Set : TimedInputs {
  Set(const Shape& s, Gate gate, bool fast, uint32_t seed, void* workspace)
      : TimedInputs(s, gate, fast, seed),
        d_o(o.bytes()),
        dq(q.bytes()),
        dk(k.bytes()),
        dv(v.bytes()),
        dg(g.bytes()),
        d_beta(beta.bytes()),
        dA_log(A_log.bytes()),
        d_dt_bias(dt_bias.bytes()) {
    fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(d_o.data()),
                               static_cast<int64_t>(d_o.bytes() / 2), seed * 104729, 1, 0);
    params.workspace = workspace;
    call.forward = params;
    call.forward.nonzero_beta = true;
    call.d_o = d_o.data();
    call.dq = dq.data(), call.dk = dk.data(), call.dv = dv.data(), call.dg = dg.data(),
    call.d_beta = d_beta.data();
    call.dA_log = static_cast<float*>(dA_log.data());
    call.d_dt_bias = static_cast<float*>(d_dt_bias.data());
  }
  DeviceBuffer d_o, dq, dk, dv, dg, d_beta, dA_log, d_dt_bias;
  BackwardParams call{};
};

void time_shape(const Shape& s, Gate gate, bool fast) {
  const ForwardShape shape = TimedInputs(s, gate, fast, 1).params.shape;
  DeviceBuffer scratch(backward_workspace_bytes(shape));
  Set sets[2] = {{s, gate, fast, 1, scratch.data()}, {s, gate, fast, 2, scratch.data()}};
  const double before = median_ms([&](int i) { require(forward(sets[i % 2].params, nullptr)); });
  const double whole = median_ms([&](int i) { require(backward(sets[i % 2].call, nullptr)); });
  const BackwardWorkspace workspace = backward_workspace(shape);
  auto aligned = [&](int i) {
    BackwardParams call = sets[i % 2].call;
    call.forward.workspace = aligned_workspace(call.forward.workspace);
    call.forward.o = nullptr;
    return call;
  };
  auto stage = [&](auto launch) {
    return median_ms([&](int i) { require(launch(aligned(i), workspace, nullptr)); });
  };
  const double prepare = median_ms([&](int i) {
    require(sm90::launch_chunk_prepare(aligned(i).forward, workspace.forward, nullptr));
  });
  std::printf(
      "%-14s %-8s %-4s  forward %7.3f  backward %7.3f ms  prepare %7.3f  scans %7.3f  "
      "gradient %7.3f  reduce %6.3f  both / forward %.2f\n",
      s.name, gate == Gate::kSoftplus ? "softplus" : "bounded", fast ? "fast" : "slow", before,
      whole, prepare, stage(sm90::launch_chunk_state_gradient), stage(sm90::launch_chunk_gradient),
      stage(sm90::launch_gradient_reduce), (before + whole) / before);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) { return time_shapes(argc, argv, time_shape); }
