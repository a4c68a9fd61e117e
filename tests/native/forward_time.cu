// Times the forward without JAX: CUDA events, median over repeats, two input sets in rotation; and
// each stage alone.
//   forward_time [name ...]
#include <algorithm>
#include <cmath>
#include <string>

#include "device.h"
#include "dispatch/dispatch.h"
#include "problem/workspace.h"
#include "sm90/launch.h"

namespace {

using namespace jax_flashkda;

struct Shape {
  const char* name;
  int64_t B, T, H, HV;
  std::vector<int64_t> lengths;
};

struct Inputs {
  Inputs(const Shape& s, Gate gate, bool fast, uint32_t seed) {
    const int64_t tokens = s.B * s.T;
    auto normal = [&](int64_t count, float scale, float shift) {
      DeviceBuffer buffer(count * 2);
      fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(buffer.data()), count, ++seed * 7919,
                                 scale, shift);
      return buffer;
    };
    q = normal(tokens * s.H * 128, 1, 0);
    k = normal(tokens * s.H * 128, 1, 0);
    v = normal(tokens * s.HV * 128, 1, 0);
    g = normal(tokens * s.HV * 128, fast ? 1.0f : 0.3f, 0);
    beta = normal(tokens * s.HV, 1, 0);
    std::vector<float> A(s.B * s.HV), bias(s.B * s.HV * 128);
    for (size_t i = 0; i < A.size(); ++i) A[i] = fast ? (i * 37 % 101) / 101.0f : 0.0f;
    for (size_t i = 0; i < bias.size(); ++i) {
      const float uniform = (i * 7919 % 10007) / 10007.0f;
      const float dt = std::exp(std::log(1e-3f) + uniform * std::log(100.0f));
      bias[i] = fast ? uniform : std::log(std::expm1(dt));
    }
    if (gate == Gate::kBounded && !fast)  // the same mean decay under the sigmoid
      for (float& x : bias) x = -4.0f + x * 0.1f;
    A_log = upload_as(A, false);
    dt_bias = upload_as(bias, false);
    std::vector<int32_t> ids;
    for (size_t n = 0; n < s.lengths.size(); ++n)
      ids.insert(ids.end(), s.lengths[n], int32_t(n + 1));
    segment_ids = DeviceBuffer(ids.size() * 4);
    segment_ids.upload(ids);
    o = DeviceBuffer(tokens * s.HV * 256);
    params.shape = {s.B,
                    s.T,
                    s.H,
                    s.HV,
                    128,
                    128,
                    s.lengths.empty() ? 1 : int64_t(s.lengths.size()),
                    !s.lengths.empty()};
    params.qkv_dtype = params.g_dtype = params.beta_dtype = DType::kBF16;
    params.q = q.data(), params.k = k.data(), params.v = v.data(), params.g = g.data(),
    params.beta = beta.data();
    params.A_log = static_cast<float*>(A_log.data()),
    params.dt_bias = static_cast<float*>(dt_bias.data());
    params.segment_ids = static_cast<int32_t*>(segment_ids.data());
    params.o = o.data();
    params.gate = gate;
    params.gate_lower_bound = -5.0f;
    params.beta_is_logits = params.qk_l2norm = true;
    params.scale = 0.08838835f;
    params.has_padding_segment_id = true;
  }
  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, segment_ids, o;
  ForwardParams params{};
};

template <class Launch>
double median_ms(Launch launch) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) launch(i);
  std::vector<float> times;
  for (int repeat = 0; repeat < 7; ++repeat) {
    constexpr int kCalls = 10;
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < kCalls; ++i) launch(i);
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms / kCalls);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void time_shape(const Shape& s, Gate gate, bool fast) {
  Inputs sets[2] = {{s, gate, fast, 1}, {s, gate, fast, 2}};
  DeviceBuffer scratch(forward_workspace_bytes(sets[0].params.shape));
  for (Inputs& set : sets) set.params.workspace = scratch.data();
  auto require = [](const Status& status) {
    if (!status.ok()) std::printf("%s\n", status.message.c_str()), std::exit(1);
  };
  const double whole = median_ms([&](int i) { require(forward(sets[i % 2].params, nullptr)); });
  const ForwardWorkspace workspace = forward_workspace(sets[0].params.shape);
  auto aligned = [&](int i) {
    ForwardParams params = sets[i % 2].params;
    params.workspace = reinterpret_cast<void*>(
        (reinterpret_cast<uintptr_t>(params.workspace) + 1023) / 1024 * 1024);
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

int main(int argc, char** argv) {
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  const std::vector<Shape> shapes = {
      {"fix8k_h96", 1, 8192, 96, 96, {}},
      {"mixed8k_h96", 1, 8192, 96, 96, {1300, 547, 2048, 963, 271, 3063}},
      {"uni8k_h96", 1, 8192, 96, 96, std::vector<int64_t>(8, 1024)},
      {"fix8k_h64", 1, 8192, 64, 64, {}},
      {"b4t4k_h32", 4, 4096, 32, 32, {}},
      {"b1t32k_h16", 1, 32768, 16, 16, {}},
      {"b1t64k_h8", 1, 65536, 8, 8, {}},
      {"t2k_h12", 1, 2048, 12, 12, {}},
      {"t512_h32", 1, 512, 32, 32, {}},
      {"seg256x32_h32", 1, 8192, 32, 32, std::vector<int64_t>(256, 32)},
      {"seg16_h32", 1, 65536, 32, 32, std::vector<int64_t>(4096, 16)},
      {"gva16_32", 1, 8192, 16, 32, {}},
  };
  for (const Shape& s : shapes) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::string(argv[i]) == s.name;
    if (!wanted) continue;
    time_shape(s, Gate::kBounded, true);
    time_shape(s, Gate::kBounded, false);
    time_shape(s, Gate::kSoftplus, true);
    time_shape(s, Gate::kSoftplus, false);
  }
  return 0;
}
