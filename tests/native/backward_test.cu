// The backward against a float64 recurrence walked back, without XLA: every gradient, and what the
// two scans leave for the gradient stage. Exact-size allocations, poisoned outputs and workspace, a
// canary behind the workspace, bitwise repeats, several streams, isolation, packing and linearity.
// Prints two lines a case; exit status 1 on failure.
//   backward_test [--quick | --random N [--seed S] [--promise]] [--unpoisoned]
//   --quick: small cases alone, for compute-sanitizer. --random: N calls of random_cases.h.
//   --promise: each is held to the promise (judged_draws.h).
//   --unpoisoned: results and workspace as allocated, for initcheck.
#include <algorithm>
#include <random>
#include <string>

#include "backward_oracle.h"
#include "judged_draws.h"
#include "launch.h"
#include "problem/numerics.cuh"

namespace {

using namespace jax_flashkda;
using oracle::Cotangents;

// A call on the device, and its gradients.
struct Launch : Inputs, Runs<Launch> {
  Launch(const Case& c, const Cotangents& d)
      : Inputs(c),
        d_o(upload_as(d.d_o, true)),
        d_final_state(upload_as(d.d_final_state, false)),
        workspace(backward_workspace_bytes(params.shape)) {
    const Call& x = c.call;
    outputs.emplace_back("dq", x.q.size(), true);
    outputs.emplace_back("dk", x.k.size(), true);
    outputs.emplace_back("dv", x.v.size(), true);
    outputs.emplace_back("dg", x.g.size(), c.g_bf16);
    outputs.emplace_back("d_beta", x.beta.size(), c.beta_bf16);
    outputs.emplace_back("dA_log", x.A_log.size(), false);
    outputs.emplace_back("d_dt_bias", x.dt_bias.size(), false);
    outputs.emplace_back("d_initial_state", x.initial_state.size(), false);
    auto at = [&](size_t i) { return outputs[i].buffer.data(); };
    call.forward = params;
    call.forward.workspace = workspace.data();
    call.d_o = d_o.data();
    call.d_final_state = static_cast<float*>(d_final_state.data());
    call.dq = at(0), call.dk = at(1), call.dv = at(2), call.dg = at(3), call.d_beta = at(4);
    call.dA_log = static_cast<float*>(at(5));
    call.d_dt_bias = static_cast<float*>(at(6));
    call.d_initial_state = static_cast<float*>(at(7));
  }

  bool enqueue(cudaStream_t stream) { return accepted(backward(call, stream)); }

  template <class T>
  std::vector<T> from_workspace(int64_t offset, int64_t count) const {
    std::vector<T> host(count);
    if (count > 0)
      CHECK_CUDA(cudaMemcpy(host.data(), static_cast<char*>(workspace.aligned()) + offset,
                            count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

  DeviceBuffer d_o, d_final_state;
  std::vector<Output> outputs;
  Workspace workspace;
  BackwardParams call{};
};

// The images of one scan against the states [K, V] that they are of.
double image_error(const Launch& launch, int64_t offset, const std::vector<double>& states,
                   const oracle::Gradients& truth) {
  const ForwardShape& s = launch.params.shape;
  const int64_t slots = (s.T + 63) / 64;
  const auto images =
      launch.from_workspace<uint16_t>(offset, s.B * s.HV * slots * kBoundaryBytes / 2);
  std::vector<double> expected;
  std::vector<float> got;
  for (int64_t i = 0; i < s.B * s.HV * slots; ++i) {
    if (!truth.is_boundary[i / s.HV / slots * slots + i % slots]) continue;
    for (int64_t k = 0; k < 128; ++k)
      for (int64_t v = 0; v < 128; ++v) {
        const int64_t byte =
            k / 64 * (kBoundaryBytes / 2) + swizzle128(int(v), int(k % 64 / 8)) + k % 8 * 2;
        expected.push_back(states[(i * 128 + k) * 128 + v]);
        got.push_back(bf16_value(images[i * kBoundaryBytes / 2 + byte / 2]));
      }
  }
  return relative_rms(expected, [&](size_t i) { return double(got[i]); });
}

double corrected_value_error(const Launch& launch, int64_t offset, const Case& c,
                             const oracle::Gradients& truth) {
  const ForwardShape& s = launch.params.shape;
  const auto rows = launch.from_workspace<uint16_t>(offset, s.B * s.T * s.HV * s.V);
  std::vector<double> expected;
  std::vector<float> got;
  for (int64_t b = 0; b < s.B; ++b)
    for (const oracle::Run& segment : oracle::runs(c.call, b))
      for (int64_t i = 0; i < segment.length * s.HV * s.V; ++i) {
        const int64_t at = (b * s.T + segment.start) * s.HV * s.V + i;
        expected.push_back(truth.corrected_values[at]);
        got.push_back(bf16_value(rows[at]));
      }
  return relative_rms(expected, [&](size_t i) { return double(got[i]); });
}

// What state_gradient leaves of d_initial_state: that of segments which begin their rows, and what
// slots without a segment pass through; of all others nothing.
std::vector<uint8_t> initial_gradients(const Case& c, const std::vector<uint8_t>& all,
                                       std::vector<uint8_t> before) {
  const int64_t slot_bytes = c.call.HV * Call::K * Call::V * 4;
  for (int64_t b = 0; b < c.call.B; ++b) {
    const auto segments = oracle::runs(c.call, b);
    for (int64_t n = 0; n < c.call.N; ++n) {
      const bool first = n == 0 && !segments.empty() && segments[0].start == 0;
      if (!first && n < int64_t(segments.size())) continue;
      const int64_t at = (b * c.call.N + n) * slot_bytes;
      std::copy_n(all.begin() + at, slot_bytes, before.begin() + at);
    }
  }
  return before;
}

// state_gradient leaves the bits of the backward's d_initial_state and no other gradient, and the
// backward of what it has prepared those of the backward. Slots for all segments and one more.
bool check_state_gradient(Case c) {
  if (c.call.initial_state.empty()) return true;
  if (c.call.has_segment_ids) {
    c.call.N = 1 + oracle::most_segments(c.call);
    add_initial_state(c);
  }
  const Cotangents d = make_cotangents(c);
  Launch launch(c, d), alone(c, d);
  bool ran = launch.run(0xFF);
  alone.poison(0xFF);
  auto expected = alone.bits();
  expected.back() = initial_gradients(c, launch.bits().back(), expected.back());
  const ForwardShape& shape = alone.params.shape;
  const Prepared prepared(shape);
  Workspace small(prepared_forward_workspace_bytes(shape));
  Workspace large(prepared_backward_workspace_bytes(shape));
  for (Workspace* workspace : {&small, &large}) workspace->fill(0xFF), workspace->set_canary();
  BackwardParams call = alone.call;
  prepared.give_to(call.forward);
  call.forward.workspace = large.data();
  BackwardParams initial = call;
  initial.forward.workspace = small.data();
  initial.dq = initial.dk = initial.dv = initial.dg = initial.d_beta = nullptr;
  initial.dA_log = initial.d_dt_bias = nullptr;
  ran &= accepted(state_gradient(initial, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const bool same = alone.bits() == expected;
  if (!same) std::printf("  state_gradient differs");
  ran &= accepted(prepared_backward(call, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const bool handed = alone.bits() == launch.bits();
  if (!handed) std::printf("  the prepared backward differs");
  return ran && same && handed && small.intact() && large.intact();
}

bool check(const Case& c) {
  const Cotangents d = make_cotangents(c);
  Launch launch(c, d);
  bool good = launch.run(0xFF);  // NaN in every type
  const oracle::Gradients truth = oracle::backward(c.call, d);
  const BackwardWorkspace w = backward_workspace(launch.params.shape);
  bool accurate = true;  // false for NaN
  auto judge = [&](const char* what, double error, bool of_gate = false) {
    const bool fine = error <= (of_gate ? c.gate_limit : c.gradient_limit);
    std::printf("  %s %.2e%s", what, error, fine ? "" : " INACCURATE");
    accurate &= fine;
  };
  std::printf("%s  (limits %.3f, %.3f)\n   ", c.name.c_str(), c.gradient_limit, c.gate_limit);
  judge("S", image_error(launch, w.states, truth.states, truth));
  judge("U", corrected_value_error(launch, w.corrected_values, c, truth));
  judge("dS", image_error(launch, w.state_gradients, truth.state_gradients, truth));
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    const std::vector<float> got = launch.outputs[i].values();
    if (!got.empty())
      judge(launch.outputs[i].name,
            relative_rms(gradient_of(truth, i), [&](size_t at) { return double(got[at]); }),
            /*of_gate=*/i >= 3 && i <= 6);
  }
  const bool repeats = launch.repeats(good);
  good &= check_state_gradient(c);
  std::printf("%s\n", repeats ? "" : "  NOT REPEATABLE");
  std::fflush(stdout);
  return good && accurate && repeats;
}

Verdict judge_draw(const Case& c, uint64_t seed, bool promise) {
  Verdict verdict;
  const Cotangents d = drawn_cotangents(c, seed);
  Launch launch(c, d);
  if (!launch.run(0xFF)) verdict.failures += "  did not run";
  const oracle::Gradients truth = oracle::backward(c.call, d, /*workers=*/1);
  std::vector<std::vector<float>> got;
  for (const Output& output : launch.outputs) got.push_back(output.values());
  judge_gradients(verdict, c, d, truth, got, promise);
  return verdict;
}

// Twice the cotangents are twice the gradients, to the bit.
bool check_linear() {
  Case c = packed_case("linear", 1, 2, 3, ids_from_lengths({{1, 100}, {0, 9}, {2, 70}, {3, 200}}));
  Cotangents d = make_cotangents(c);
  Launch once(c, d);
  for (auto* x : {&d.d_o, &d.d_final_state})
    for (float& value : *x) value *= 2.0f;
  Launch twice(c, d);
  bool good = once.run(0xFF) && twice.run(0xFF);
  for (size_t i = 0; i < once.outputs.size(); ++i) {
    const auto a = once.outputs[i].values(), b = twice.outputs[i].values();
    for (size_t at = 0; at < a.size(); ++at)
      if (2.0f * a[at] != b[at]) {
        std::printf("  %s[%zu] is %g, and with twice the cotangents %g\n", once.outputs[i].name, at,
                    a[at], b[at]);
        good = false;
        break;
      }
  }
  std::printf("%-44s %s\n", "twice the cotangents", good ? "twice the bits" : "FAILED");
  return good;
}

// One segment of a packed row against the same tokens alone: equal bits, though its neighbours and
// the padding between them are NaN.
bool check_packing(int64_t HV) {
  const std::vector<std::pair<int32_t, int64_t>> layout = {{1, 70}, {0, 9},   {2, 1},  {3, 200},
                                                           {4, 64}, {-1, 30}, {5, 129}};
  std::vector<std::pair<int64_t, int64_t>> segments;  // start, length
  int64_t start = 0;
  for (const auto& [id, length] : layout) {
    if (id > 0) segments.push_back({start, length});
    start += length;
  }
  const Case packed =
      packed_case("packed", 1, HV, int64_t(segments.size()), ids_from_lengths(layout));
  const Cotangents d = make_cotangents(packed);
  const int64_t state = HV * Call::K * Call::V;
  const int64_t rows[] = {HV * 128, HV * 128, HV * 128, HV * 128, HV};  // of q, k, v, g, beta
  bool good = true;
  for (size_t n = 0; n < segments.size(); ++n) {
    const auto [first, length] = segments[n];
    Cotangents own = d, spoiled = d;
    cut_tokens(own.d_o, HV * 128, first, length);
    cut_tokens(own.d_final_state, state, n, 1);
    spoil_other_tokens(spoiled.d_o, HV * 128, first, length);
    spoil_other_tokens(spoiled.d_final_state, state, n, 1);
    Launch a(packed, d), b(cut_out(packed, first, length, n), own),
        c(spoil_around(packed, first, length, n), spoiled);
    good &= a.run(0xFF) && b.run(0xFF) && c.run(0xFF);
    auto same = [&, n, length = length](size_t i, int64_t row_bytes, int64_t from) {
      const auto expected = b.outputs[i].bytes();
      for (const Launch* other : {&a, &c}) {
        const auto got = other->outputs[i].bytes();
        if (std::equal(expected.begin(), expected.end(), got.begin() + from * row_bytes)) continue;
        std::printf("  %s of segment %zu of length %ld differs from itself alone%s\n",
                    b.outputs[i].name, n, length, other == &c ? ", beside NaN" : "");
        good = false;
      }
    };
    for (size_t i = 0; i < 5; ++i) same(i, rows[i] * 2, first);
    same(7, state * 4, int64_t(n));
    // Padding gets zeros, whatever it holds.
    for (size_t i = 0; i < 5; ++i) {
      const auto got = c.outputs[i].values();
      int64_t t = 0;
      for (const auto& [id, run] : layout) {
        if (id <= 0 && std::any_of(got.begin() + t * rows[i], got.begin() + (t + run) * rows[i],
                                   [](float x) { return x != 0.0f; })) {
          std::printf("  %s of padding is not zero\n", c.outputs[i].name);
          good = false;
        }
        t += run;
      }
    }
  }
  std::printf("%-44s %s\n",
              ("packed equals alone, NaN neighbours, H " + std::to_string(HV)).c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// beta = 0 switches a token's write off: what it would have written still has a gradient.
bool check_zero_beta() {
  Case c = make_case("zero beta", shape(1, 150, 1, 2));
  for (size_t i = 0; i < c.call.beta.size(); ++i)
    if (i % 3 != 0) c.call.beta[i] = i % 3 == 1 ? 0.0f : -0.0f;
  return check(c);
}

bool check_streams(int rounds) {
  const Case c = make_case("streams", raw_shape(oracle::Gate::kSoftplus, 1, 700, 4, 4));
  const Cotangents d = make_cotangents(c);
  std::vector<Launch> launches;
  for (int i = 0; i < 4; ++i) launches.emplace_back(c, d);
  const bool good = equal_on_streams(std::move(launches), Launch(c, d), rounds, 50);
  std::printf("%-44s %s\n", ("four streams, " + std::to_string(rounds) + " rounds").c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

bool check_refusals() {
  const Case c = make_case("refusals", shape(1, 10, 1, 1));
  Launch launch(c, make_cotangents(c));
  auto refused_after = [&](auto change, const char* word) {
    BackwardParams params = launch.call;
    change(params);
    return refused(backward(params, nullptr), word);
  };
  bool good = true;
  good &= refused_after([](BackwardParams& p) { p.forward.shape.K = 64; }, "K = 64");
  good &= refused_after([](BackwardParams& p) { p.dq = nullptr; }, "dq is missing");
  good &= refused_after([](BackwardParams& p) { p.d_o = static_cast<const char*>(p.d_o) + 2; },
                        "d_o is not aligned");
  good &= refused_after([](BackwardParams& p) { p.d_dt_bias = static_cast<float*>(p.dq); },
                        "d_dt_bias");
  good &= launch.run(0xFF);  // the next valid call works
  std::printf("%-44s %s\n", "refusals", good ? "told" : "FAILED");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  RandomRun random;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (read_random_option(argc, argv, i, random)) continue;
    quick |= option == "--quick";
    poisoned &= option != "--unpoisoned";
  }
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  if (random.count > 0)
    return judge_draws("backward_test", random, kMostBackwardPairs, judge_draw) == 0 ? 0 : 1;
  Tally tally;
  for (const Case& c : cases(quick)) tally(check(c));
  tally(check_zero_beta());
  tally(check_linear());
  tally(check_packing(2));
  if (!quick) tally(check_packing(70));
  tally(check_streams(quick ? 3 : 200));
  tally(check_refusals());
  return tally.exit_status();
}
