// What the timing programs share: shapes, inputs, the clock.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/status.h"
#include "device.h"
#include "dispatch/dispatch.h"
#include "problem/params.h"

struct Shape {
  const char* name;
  int64_t B, T, H, HV;
  std::vector<int64_t> lengths;
};

// Raw inputs of a layer, drawn on the device, in one of two decay regimes.
struct TimedInputs {
  TimedInputs(const Shape& s, jax_flashkda::Gate gate, bool fast, uint32_t seed) {
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
    if (gate == jax_flashkda::Gate::kBounded && !fast)  // the same mean decay under the sigmoid
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
    params.qkv_dtype = params.g_dtype = params.beta_dtype = jax_flashkda::DType::kBF16;
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
  jax_flashkda::ForwardParams params{};
};

// CUDA events, median over repeats of at least 20 ms, or of a call.
template <class Launch>
double median_ms(Launch launch) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  auto time = [&](int calls) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < calls; ++i) launch(i);
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms / calls;
  };
  const float warm = std::min(time(2), time(2));
  const int calls = std::max(1, static_cast<int>(std::ceil(std::min(20.0f / warm, 100.0f))));
  std::vector<float> times;
  for (int repeat = 0; repeat < 7; ++repeat) times.push_back(time(calls));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

inline std::vector<Shape> timed_shapes() {
  return {
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
      {"seg1024_h32", 1, 65536, 32, 32, std::vector<int64_t>(64, 1024)},
      {"seg16_h32", 1, 65536, 32, 32, std::vector<int64_t>(4096, 16)},
      {"seg1_h32", 1, 65536, 32, 32, std::vector<int64_t>(65536, 1)},
      {"gva16_32", 1, 8192, 16, 32, {}},
  };
}

inline void require(const jax_flashkda::Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message.c_str());
  std::exit(1);
}

inline void* aligned_workspace(void* workspace) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace) + 1023) / 1024 * 1024);
}

// Calls time(shape, gate, fast) for the shapes named on the command line, or all.
template <class Time>
int time_shapes(int argc, char** argv, Time time) {
  using jax_flashkda::Gate;
  require(jax_flashkda::initialize(0));
  for (const Shape& s : timed_shapes()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::string(argv[i]) == s.name;
    if (!wanted) continue;
    for (Gate gate : {Gate::kBounded, Gate::kSoftplus})
      for (bool fast : {true, false}) time(s, gate, fast);
  }
  return 0;
}
