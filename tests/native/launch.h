// Calls on the device: their operands, poisoned results, a workspace with a canary behind it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cases.h"
#include "device.h"
#include "dispatch/dispatch.h"
#include "problem/workspace.h"

inline bool poisoned = true;  // else results and workspace are as allocated

// The operands of a call on the device, and its parameters but for results and workspace.
struct Inputs {
  explicit Inputs(const Case& c)
      : q(upload_as(c.call.q, true)),
        k(upload_as(c.call.k, true)),
        v(upload_as(c.call.v, true)),
        g(upload_as(c.call.g, c.g_bf16)),
        beta(upload_as(c.call.beta, c.beta_bf16)),
        A_log(upload_as(c.call.A_log, false)),
        dt_bias(upload_as(c.call.dt_bias, false)),
        initial_state(upload_as(c.call.initial_state, false)),
        segment_ids(c.call.segment_ids.size() * 4) {
    segment_ids.upload(c.call.segment_ids);
    const Call& x = c.call;
    params.shape = {x.B, x.T, x.H, x.HV, Call::K, Call::V, x.N, x.has_segment_ids};
    params.qkv_dtype = jax_flashkda::DType::kBF16;
    params.g_dtype = c.g_bf16 ? jax_flashkda::DType::kBF16 : jax_flashkda::DType::kF32;
    params.beta_dtype = c.beta_bf16 ? jax_flashkda::DType::kBF16 : jax_flashkda::DType::kF32;
    params.q = q.data();
    params.k = k.data();
    params.v = v.data();
    params.g = g.data();
    params.beta = beta.data();
    params.A_log = static_cast<float*>(A_log.data());
    params.dt_bias = static_cast<float*>(dt_bias.data());
    params.initial_state = static_cast<float*>(initial_state.data());
    params.segment_ids = static_cast<int32_t*>(segment_ids.data());
    params.gate = static_cast<jax_flashkda::Gate>(x.gate);
    params.gate_lower_bound = static_cast<float>(x.gate_lower_bound);
    params.beta_is_logits = x.beta_is_logits;
    params.allow_neg_eigval = x.allow_neg_eigval;
    params.qk_l2norm = x.qk_l2norm;
    params.scale = static_cast<float>(x.scale);
    params.has_padding_segment_id = x.has_padding_segment_id;
    params.padding_segment_id = x.padding_segment_id;
  }

  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, initial_state, segment_ids;
  jax_flashkda::ForwardParams params{};
};

// Scratch memory with a canary behind it.
struct Workspace {
  static constexpr size_t kCanaryBytes = 4096;
  static constexpr unsigned char kCanary = 0xA5;

  explicit Workspace(int64_t size) : bytes(size), buffer(size + kCanaryBytes) {}
  void* data() const { return buffer.data(); }
  void* aligned() const {
    constexpr uintptr_t kStep = jax_flashkda::kWorkspaceAlignment;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data()) + kStep - 1) / kStep *
                                   kStep);
  }
  void fill(int byte) { CHECK_CUDA(cudaMemset(buffer.data(), byte, bytes)); }
  void set_canary() {
    CHECK_CUDA(cudaMemset(static_cast<char*>(buffer.data()) + bytes, kCanary, kCanaryBytes));
  }
  bool intact() const {
    std::vector<unsigned char> tail(kCanaryBytes);
    CHECK_CUDA(cudaMemcpy(tail.data(), static_cast<char*>(buffer.data()) + bytes, kCanaryBytes,
                          cudaMemcpyDeviceToHost));
    const bool same =
        std::all_of(tail.begin(), tail.end(), [](unsigned char b) { return b == kCanary; });
    if (!same) std::printf("  the canary behind the workspace was overwritten\n");
    return same;
  }

  int64_t bytes;
  DeviceBuffer buffer;
};

// What chunk_prepare leaves, apart from the workspace.
struct Prepared {
  explicit Prepared(const jax_flashkda::ForwardShape& s)
      : operands(s.B * s.HV * s.T * jax_flashkda::kOperandBytes),
        betas(s.B * s.HV * s.T * jax_flashkda::kBetaBytes),
        decays(s.B * s.HV * jax_flashkda::decay_slots(s) * s.K * 4) {
    if (poisoned) operands.fill(0xFF), betas.fill(0xFF), decays.fill(0xFF);
  }
  void give_to(jax_flashkda::ForwardParams& params) const {
    params.prepared = operands.data();
    params.betas = static_cast<float*>(betas.data());
    params.decays = static_cast<float*>(decays.data());
  }
  std::vector<uint8_t> bytes() const {
    auto all = operands.download<uint8_t>();
    for (const DeviceBuffer* buffer : {&betas, &decays}) {
      const auto more = buffer->download<uint8_t>();
      all.insert(all.end(), more.begin(), more.end());
    }
    return all;
  }

  DeviceBuffer operands, betas, decays;
};

// A result, in one of two types.
struct Output {
  Output(const char* text, size_t elements, bool is_bf16)
      : name(text), bf16(is_bf16), buffer(elements * (is_bf16 ? 2 : 4)) {}

  std::vector<float> values() const {
    if (!bf16) return buffer.download<float>();
    std::vector<float> wide;
    for (uint16_t bits : buffer.download<uint16_t>()) wide.push_back(bf16_value(bits));
    return wide;
  }
  std::vector<uint8_t> bytes() const { return buffer.download<uint8_t>(); }

  const char* name;
  bool bf16;
  DeviceBuffer buffer;
};

// What the tests do with a Launch, which has outputs, a workspace and enqueue(stream).
template <class Launch>
struct Runs {
  void poison(int byte) {
    if (poisoned) {
      for (Output& output : self().outputs) output.buffer.fill(byte);
      self().workspace.fill(byte);
    }
    self().workspace.set_canary();
  }
  bool run(int byte) {
    poison(byte);
    const bool launched = self().enqueue(nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    return self().workspace.intact() && launched;
  }
  // All results, poisoned in other ways, are the same bits as before.
  bool repeats(bool& good) {
    const auto first = bits();
    bool same = true;
    for (int i = 0; i < 3; ++i) {
      good &= run(i == 0 ? 0x3C : 0xFF);
      same &= bits() == first;
    }
    return same;
  }
  std::vector<std::vector<uint8_t>> bits() {
    std::vector<std::vector<uint8_t>> all;
    for (const Output& output : self().outputs) all.push_back(output.bytes());
    return all;
  }

 private:
  Launch& self() { return static_cast<Launch&>(*this); }
};

inline bool accepted(const jax_flashkda::Status& status) {
  if (!status.ok()) std::printf("  %s\n", status.message.c_str());
  return status.ok();
}

// Whether a call is refused with a message that holds the word.
inline bool refused(const jax_flashkda::Status& status, const char* word) {
  const bool told = !status.ok() && status.message.find(word) != std::string::npos;
  if (!told)
    std::printf("  expected a refusal that names %s, got '%s'\n", word, status.message.c_str());
  return told;
}

// Calls side by side on as many streams, again and again, have the bits of one alone.
template <class Launch>
bool equal_on_streams(std::vector<Launch> launches, Launch alone, int rounds, int compare_every) {
  std::vector<cudaStream_t> streams(launches.size());
  for (size_t i = 0; i < launches.size(); ++i) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    launches[i].poison(0xFF);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  bool good = alone.run(0xFF);
  const auto expected = alone.bits();
  for (int round = 1; round <= rounds; ++round) {
    for (size_t i = 0; i < launches.size(); ++i) good &= launches[i].enqueue(streams[i]);
    if (round % compare_every != 0 && round != rounds) continue;
    CHECK_CUDA(cudaDeviceSynchronize());
    for (Launch& launch : launches) good &= launch.bits() == expected;
  }
  for (cudaStream_t stream : streams) CHECK_CUDA(cudaStreamDestroy(stream));
  return good;
}

// A test program: prints how many of its checks passed.
struct Tally {
  void operator()(bool good) { ++count, failures += good ? 0 : 1; }
  int exit_status() const {
    std::printf("%d of %d passed\n", count - failures, count);
    return failures == 0 ? 0 : 1;
  }

  int failures = 0, count = 0;
};
