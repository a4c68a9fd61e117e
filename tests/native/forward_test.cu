// The forward against a float64 recurrence, without XLA: exact-size allocations, poisoned outputs
// and workspace, a canary behind the workspace, bitwise repeats, several streams, isolation and
// packing. Prints a line a case; exit status 1 on failure.
//   forward_test [--quick | --large] [--unpoisoned]
//   --quick: small cases alone, for compute-sanitizer. --large: offsets beyond 2^31 elements and
//   more than 65,535 (segment, head) pairs, some 50 GB. --unpoisoned: results and workspace as
//   allocated, for initcheck.
#include <algorithm>
#include <functional>
#include <random>
#include <string>

#include "device.h"
#include "dispatch/dispatch.h"
#include "oracle.h"

namespace {

using namespace jax_flashkda;
using oracle::Call;

constexpr size_t kCanaryBytes = 4096;
constexpr unsigned char kCanary = 0xA5;
bool poisoned = true;

struct Case {
  std::string name;
  Call call;
  bool g_bf16 = true, beta_bf16 = true;
  bool want_final = true;
  double limit = 0.007;  // relative RMS over the whole tensor
};

// The operands of a call on the device, and its results.
struct Launch {
  explicit Launch(const Case& c)
      : q(upload_as(c.call.q, true)),
        k(upload_as(c.call.k, true)),
        v(upload_as(c.call.v, true)),
        g(upload_as(c.call.g, c.g_bf16)),
        beta(upload_as(c.call.beta, c.beta_bf16)),
        A_log(upload_as(c.call.A_log, false)),
        dt_bias(upload_as(c.call.dt_bias, false)),
        initial_state(upload_as(c.call.initial_state, false)),
        segment_ids(c.call.segment_ids.size() * 4),
        o(c.call.v.size() * 2),
        final_state(c.want_final ? c.call.B * c.call.N * c.call.HV * Call::K * Call::V * 4 : 0) {
    segment_ids.upload(c.call.segment_ids);
    const Call& x = c.call;
    params.shape = {x.B, x.T, x.H, x.HV, Call::K, Call::V, x.N, x.has_segment_ids};
    params.qkv_dtype = DType::kBF16;
    params.g_dtype = c.g_bf16 ? DType::kBF16 : DType::kF32;
    params.beta_dtype = c.beta_bf16 ? DType::kBF16 : DType::kF32;
    params.q = q.data();
    params.k = k.data();
    params.v = v.data();
    params.g = g.data();
    params.beta = beta.data();
    params.A_log = static_cast<float*>(A_log.data());
    params.dt_bias = static_cast<float*>(dt_bias.data());
    params.initial_state = static_cast<float*>(initial_state.data());
    params.segment_ids = static_cast<int32_t*>(segment_ids.data());
    params.o = o.data();
    params.final_state = static_cast<float*>(final_state.data());
    params.gate = static_cast<Gate>(x.gate);
    params.gate_lower_bound = static_cast<float>(x.gate_lower_bound);
    params.beta_is_logits = x.beta_is_logits;
    params.allow_neg_eigval = x.allow_neg_eigval;
    params.qk_l2norm = x.qk_l2norm;
    params.scale = static_cast<float>(x.scale);
    params.has_padding_segment_id = x.has_padding_segment_id;
    params.padding_segment_id = x.padding_segment_id;
    workspace_bytes = forward_workspace_bytes(params.shape);
    workspace = DeviceBuffer(workspace_bytes + kCanaryBytes);
    params.workspace = workspace.data();
  }

  void poison(int byte) {
    if (poisoned) {
      o.fill(byte);
      final_state.fill(byte);
      workspace.fill(byte);
    }
    if (workspace_bytes + kCanaryBytes > 0)
      CHECK_CUDA(cudaMemset(static_cast<char*>(workspace.data()) + workspace_bytes, kCanary,
                            kCanaryBytes));
  }

  bool enqueue(cudaStream_t stream) {
    const Status status = forward(params, stream);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    return status.ok();
  }

  bool run(int byte) {
    poison(byte);
    const bool launched = enqueue(nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<unsigned char> tail(kCanaryBytes);
    CHECK_CUDA(cudaMemcpy(tail.data(), static_cast<char*>(workspace.data()) + workspace_bytes,
                          kCanaryBytes, cudaMemcpyDeviceToHost));
    const bool intact =
        std::all_of(tail.begin(), tail.end(), [](unsigned char b) { return b == kCanary; });
    if (!intact) std::printf("  the canary behind the workspace was overwritten\n");
    return launched && intact;
  }

  std::vector<uint16_t> output_bits() const { return o.download<uint16_t>(); }
  std::vector<uint32_t> state_bits() const { return final_state.download<uint32_t>(); }

  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, initial_state, segment_ids, o, final_state,
      workspace;
  int64_t workspace_bytes = 0;
  ForwardParams params{};
};

struct Regime {
  enum Keys { kRandom, kIdentical, kNear, kZero } keys = kRandom;
  enum Gates { kSlow, kFast, kBound, kNone, kReset, kOneAlive } gates = kSlow;
};

Case make_case(std::string name, Call shape, Regime regime = {}, uint64_t seed = 1) {
  Case c{std::move(name), std::move(shape)};
  Call& x = c.call;
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  x.scale = 1.0 / std::sqrt(128.0);
  auto fill = [&](std::vector<float>& out, int64_t count, auto draw) {
    out.resize(count);
    for (float& value : out) value = round_bf16(draw());
  };
  auto gaussian = [&] { return normal(generator); };
  fill(x.q, x.B * x.T * x.H * Call::K, gaussian);
  fill(x.k, x.B * x.T * x.H * Call::K, gaussian);
  fill(x.v, x.B * x.T * x.HV * Call::V, gaussian);
  if (regime.keys != Regime::kRandom)
    for (int64_t i = 0; i < int64_t(x.k.size()); ++i) {
      const float first = x.k[i % (x.H * Call::K)];
      if (regime.keys == Regime::kIdentical) x.k[i] = first;
      if (regime.keys == Regime::kNear) x.k[i] = round_bf16(first + 0.01f * normal(generator));
      if (regime.keys == Regime::kZero) x.k[i] = 0.0f;
    }
  if (!x.qk_l2norm)
    for (auto* operand : {&x.q, &x.k})
      for (float& value : *operand) value = round_bf16(value / std::sqrt(128.0f));
  const bool raw = x.gate != oracle::Gate::kLogDecay;
  fill(x.beta, x.B * x.T * x.HV,
       [&] { return x.beta_is_logits ? normal(generator) : uniform(generator); });
  fill(x.g, x.B * x.T * x.HV * Call::K, [&] {
    if (raw)
      return regime.gates == Regime::kSlow    ? 0.3f * normal(generator)
             : regime.gates == Regime::kBound ? 30.0f
                                              : normal(generator);
    switch (regime.gates) {
      case Regime::kSlow:
        return -0.2f * uniform(generator);
      case Regime::kFast:
        return -2.5f * uniform(generator);
      case Regime::kBound:
        return -5.0f;
      case Regime::kReset:
        return uniform(generator) < 0.02f ? -1000.0f : -0.1f * uniform(generator);
      default:
        return 0.0f;
    }
  });
  if (regime.gates == Regime::kReset && !x.g.empty()) x.g[x.g.size() / 2] = -INFINITY;
  if (regime.gates == Regime::kOneAlive)
    for (size_t i = 0; i < x.g.size(); ++i) x.g[i] = i % Call::K == 7 ? 0.0f : -4.0f;
  if (raw) {
    const bool slow = regime.gates == Regime::kSlow;
    x.A_log.resize(x.B * x.HV);
    for (float& value : x.A_log) value = slow ? 0.0f : uniform(generator);
    x.dt_bias.resize(x.B * x.HV * Call::K);
    for (float& value : x.dt_bias)
      value = slow ? -4.5f + 2.5f * uniform(generator) : uniform(generator);
  }
  return c;
}

double relative_rms(const std::vector<double>& truth, const std::function<double(size_t)>& got) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (got(i) - truth[i]) * (got(i) - truth[i]);
    size += truth[i] * truth[i];
  }
  if (std::isnan(error)) return error;
  return size > 0.0 ? std::sqrt(error / size) : std::sqrt(error);
}

float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float f32_value(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool check(const Case& c) {
  Launch launch(c);
  bool good = launch.run(0xFF);  // NaN in every type
  const auto o = launch.output_bits();
  const auto state = launch.state_bits();
  const oracle::Result truth = oracle::forward(c.call);
  const double o_error = relative_rms(truth.o, [&](size_t i) { return double(bf16_value(o[i])); });
  const double state_error =
      c.want_final
          ? relative_rms(truth.final_state, [&](size_t i) { return double(f32_value(state[i])); })
          : 0.0;
  const bool accurate = o_error <= c.limit && state_error <= c.limit;  // false for NaN
  bool repeats = true;
  for (int i = 0; i < 3; ++i) {
    good &= launch.run(i == 0 ? 0x3C : 0xFF);
    repeats &= launch.output_bits() == o && launch.state_bits() == state;
  }
  std::printf("%-44s o %.2e  state %.2e  (limit %.3f)%s%s\n", c.name.c_str(), o_error, state_error,
              c.limit, accurate ? "" : "  INACCURATE", repeats ? "" : "  NOT REPEATABLE");
  std::fflush(stdout);
  return good && accurate && repeats;
}

Call shape(int64_t B, int64_t T, int64_t H, int64_t HV, int64_t N = 1) {
  Call c{};
  c.B = B, c.T = T, c.H = H, c.HV = HV, c.N = N;
  return c;
}

Call raw_shape(oracle::Gate gate, int64_t B, int64_t T, int64_t H, int64_t HV) {
  Call c = shape(B, T, H, HV);
  c.gate = gate;
  c.beta_is_logits = c.qk_l2norm = true;
  return c;
}

void add_initial_state(Case& c) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  c.call.initial_state.resize(c.call.B * c.call.N * c.call.HV * Call::K * Call::V);
  for (float& value : c.call.initial_state) value = 0.3f * normal(generator);
}

std::vector<int32_t> ids_from_lengths(const std::vector<std::pair<int32_t, int64_t>>& runs) {
  std::vector<int32_t> ids;
  for (const auto& [id, length] : runs) ids.insert(ids.end(), length, id);
  return ids;
}

Case packed_case(std::string name, int64_t B, int64_t HV, int64_t N, std::vector<int32_t> ids,
                 bool states = true) {
  Call c = raw_shape(oracle::Gate::kSoftplus, B, int64_t(ids.size()) / B, HV, HV);
  c.N = N;
  c.has_segment_ids = true;
  c.has_padding_segment_id = true;
  Case packed = make_case(std::move(name), std::move(c));
  packed.call.segment_ids = std::move(ids);
  if (states) add_initial_state(packed);
  return packed;
}

std::vector<Case> cases(bool quick) {
  using G = oracle::Gate;
  std::vector<Case> list;
  for (int64_t T : {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129})
    list.push_back(make_case("log_decay T " + std::to_string(T), shape(1, T, 1, 1)));
  list.push_back(make_case("softplus, logits, l2norm", raw_shape(G::kSoftplus, 2, 100, 2, 2)));
  list.push_back(make_case("bounded, logits, l2norm, fast", raw_shape(G::kBounded, 1, 200, 1, 2),
                           {Regime::kRandom, Regime::kFast}));
  list.push_back(make_case("softplus, fast", raw_shape(G::kSoftplus, 1, 200, 2, 2),
                           {Regime::kRandom, Regime::kFast}));
  list.push_back(make_case("bounded, at the bound", raw_shape(G::kBounded, 1, 130, 1, 1),
                           {Regime::kRandom, Regime::kBound}));
  list.push_back(
      make_case("log decay, resets", shape(1, 200, 1, 2), {Regime::kRandom, Regime::kReset}));
  list.push_back(
      make_case("log decay, bound", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kBound}));
  list.push_back(
      make_case("log decay, none", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kNone}));
  list.push_back(make_case("log decay, one channel alive", shape(1, 200, 1, 1),
                           {Regime::kRandom, Regime::kOneAlive}));
  list.push_back(make_case("softplus, raw 30: every block pairwise",
                           raw_shape(G::kSoftplus, 1, 130, 1, 1),
                           {Regime::kRandom, Regime::kBound}));
  list.push_back(make_case("GVA 2 / 6", raw_shape(G::kBounded, 2, 90, 2, 6),
                           {Regime::kRandom, Regime::kFast}));
  {
    Case c = make_case("f32 gate and beta, initial state", shape(2, 150, 2, 2));
    c.g_bf16 = c.beta_bf16 = false;
    add_initial_state(c);
    list.push_back(std::move(c));
  }
  {
    Call c = raw_shape(G::kSoftplus, 1, 150, 1, 1);
    c.allow_neg_eigval = true;
    list.push_back(make_case("allow_neg_eigval", c));
    list.back().limit = 0.012;
  }
  {
    Case c = make_case("T 0 keeps the initial state", shape(2, 0, 1, 2));
    add_initial_state(c);
    list.push_back(std::move(c));
    list.push_back(make_case("no final state", shape(1, 100, 1, 1)));
    list.back().want_final = false;
  }
  for (auto [keys, text] : {std::pair{Regime::kIdentical, "identical"},
                            {Regime::kNear, "near-identical"},
                            {Regime::kZero, "zero"}}) {
    list.push_back(make_case(std::string("keys ") + text + ", slow",
                             raw_shape(G::kSoftplus, 1, 300, 1, 1), {keys, Regime::kSlow}));
    list.back().limit = 0.06;
    list.push_back(make_case(std::string("keys ") + text + ", no decay", shape(1, 300, 1, 1),
                             {keys, Regime::kNone}));
    list.back().limit = 0.06;
  }
  list.push_back(packed_case("segments with padding inside", 2, 2, 4,
                             ids_from_lengths({{1, 70},
                                               {0, 5},
                                               {2, 64},
                                               {3, 1},
                                               {1, 30},
                                               {-1, 20},
                                               {9, 40},
                                               {0, 130},
                                               {5, 90},
                                               {6, 10}})));
  list.push_back(packed_case("segments of one token", 1, 2, 5, [] {
    std::vector<int32_t> ids(100);
    for (int i = 0; i < 100; ++i) ids[i] = i + 1;
    return ids;
  }()));
  list.push_back(packed_case(
      "extreme ids", 1, 1, 3,
      ids_from_lengths({{INT32_MAX, 33}, {INT32_MIN, 7}, {INT32_MAX, 65}, {-5, 1}, {17, 100}})));
  list.push_back(packed_case("all padding", 1, 2, 2, ids_from_lengths({{0, 40}, {-1, 60}})));
  list.push_back(packed_case("one segment, slots to spare", 1, 1, 3, ids_from_lengths({{4, 100}})));
  list.push_back(make_case("80 heads: whole heads, several chunks a CTA",
                           raw_shape(G::kSoftplus, 1, 280, 80, 80)));
  if (quick) return list;
  {
    std::mt19937 generator(3);
    std::vector<int32_t> random(3000);
    for (size_t i = 0; i < random.size(); ++i)
      random[i] = i > 0 && generator() % 40 != 0 ? random[i - 1] : int32_t(generator());
    list.push_back(packed_case("random runs", 2, 3, 12, random));
    list.push_back(packed_case("more rows than slots", 3, 2, 1, random, false));
  }
  for (auto gate : {G::kSoftplus, G::kBounded})
    for (auto gates : {Regime::kSlow, Regime::kFast})
      list.push_back(make_case(std::string(gate == G::kSoftplus ? "softplus" : "bounded") +
                                   (gates == Regime::kSlow ? " slow" : " fast") + " T 2048, H 8",
                               raw_shape(gate, 1, 2048, 8, 8), {Regime::kRandom, gates}));
  list.push_back(
      make_case("T 1000, 80 heads: whole heads", raw_shape(G::kSoftplus, 1, 1000, 80, 80)));
  list.push_back(make_case("B 5, GVA 8 / 16", raw_shape(G::kSoftplus, 5, 333, 8, 16)));
  return list;
}

// One segment of a packed row against the same tokens alone: equal bits, though its neighbours are
// NaN.
bool check_packing(int64_t HV) {
  const std::vector<int64_t> lengths = {70, 1, 200, 64, 129};
  std::vector<std::pair<int32_t, int64_t>> runs;
  for (size_t i = 0; i < lengths.size(); ++i) runs.push_back({int32_t(i + 1), lengths[i]});
  Case packed = packed_case("packed", 1, HV, int64_t(lengths.size()), ids_from_lengths(runs));
  bool good = true;
  int64_t start = 0;
  for (size_t n = 0; n < lengths.size(); start += lengths[n++]) {
    Case alone = packed;
    const int64_t state = HV * Call::K * Call::V;
    auto cut = [&](std::vector<float>& x, int64_t row) {
      x = std::vector<float>(x.begin() + start * row, x.begin() + (start + lengths[n]) * row);
    };
    cut(alone.call.q, HV * 128), cut(alone.call.k, HV * 128), cut(alone.call.v, HV * 128),
        cut(alone.call.g, HV * 128), cut(alone.call.beta, HV);
    alone.call.T = lengths[n];
    alone.call.N = 1;
    alone.call.has_segment_ids = alone.call.has_padding_segment_id = false;
    alone.call.segment_ids.clear();
    auto& initial = alone.call.initial_state;
    initial = std::vector<float>(initial.begin() + n * state, initial.begin() + (n + 1) * state);
    Case poisoned = packed;
    for (int64_t t = 0; t < packed.call.T; ++t) {
      if (t >= start && t < start + lengths[n]) continue;
      for (auto [x, row] : {std::pair{&poisoned.call.q, HV * 128},
                            {&poisoned.call.k, HV * 128},
                            {&poisoned.call.v, HV * 128},
                            {&poisoned.call.g, HV * 128},
                            {&poisoned.call.beta, HV}})
        std::fill_n(x->begin() + t * row, row, NAN);
    }
    for (size_t m = 0; m < lengths.size(); ++m)
      if (m != n) std::fill_n(poisoned.call.initial_state.begin() + m * state, state, NAN);
    Launch a(packed), b(alone), c(poisoned);
    good &= a.run(0xFF) && b.run(0xFF) && c.run(0xFF);
    const auto ao = a.output_bits(), bo = b.output_bits(), co = c.output_bits();
    const auto as = a.state_bits(), bs = b.state_bits(), cs = c.state_bits();
    const bool outputs = std::equal(bo.begin(), bo.end(), ao.begin() + start * HV * 128) &&
                         std::equal(bo.begin(), bo.end(), co.begin() + start * HV * 128);
    const bool states = std::equal(bs.begin(), bs.end(), as.begin() + n * state) &&
                        std::equal(bs.begin(), bs.end(), cs.begin() + n * state);
    if (!outputs || !states)
      std::printf("  segment %zu of length %ld differs from itself alone (output %d, state %d)\n",
                  n, lengths[n], outputs, states);
    good &= outputs && states;
  }
  std::printf("%-44s %s\n",
              ("packed equals alone, NaN neighbours, H " + std::to_string(HV)).c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

bool check_streams(int rounds) {
  Case c = make_case("streams", raw_shape(oracle::Gate::kSoftplus, 1, 700, 4, 4));
  constexpr int kStreams = 4;
  std::vector<Launch> launches;
  std::vector<cudaStream_t> streams(kStreams);
  for (auto& stream : streams) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    launches.emplace_back(c);
    launches.back().poison(0xFF);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  Launch reference(c);
  bool good = reference.run(0xFF);
  const auto o = reference.output_bits();
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < kStreams; ++i) good &= launches[i].enqueue(streams[i]);
    if (round % 100 != 99 && round != rounds - 1) continue;
    CHECK_CUDA(cudaDeviceSynchronize());
    for (auto& launch : launches) good &= launch.output_bits() == o;
  }
  for (auto& stream : streams) CHECK_CUDA(cudaStreamDestroy(stream));
  std::printf("%-44s %s\n", ("four streams, " + std::to_string(rounds) + " rounds").c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// A call whose operands were made on the device; segments of the given lengths fill its one row.
struct LargeCall {
  LargeCall(int64_t H, const std::vector<int64_t>& lengths, int64_t N) {
    std::vector<int32_t> ids;
    for (size_t n = 0; n < lengths.size(); ++n) ids.insert(ids.end(), lengths[n], int32_t(n + 1));
    const int64_t T = int64_t(ids.size());
    uint32_t seed = 0;
    auto normal = [&](DeviceBuffer& buffer, int64_t count, float scale, float shift) {
      buffer = DeviceBuffer(count * 2);
      fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(buffer.data()), count, ++seed, scale,
                                 shift);
    };
    normal(q, T * H * 128, 1, 0);
    normal(k, T * H * 128, 1, 0);
    normal(v, T * H * 128, 1, 0);
    normal(g, T * H * 128, 0.1f, -0.5f);
    normal(beta, T * H, 1, 0);
    segment_ids = DeviceBuffer(ids.size() * 4);
    segment_ids.upload(ids);
    o = DeviceBuffer(T * H * 256);
    final_state = DeviceBuffer(N * H * Call::K * Call::V * 4);
    params.shape = {1, T, H, H, Call::K, Call::V, N, true};
    params.qkv_dtype = params.g_dtype = params.beta_dtype = DType::kBF16;
    params.q = q.data(), params.k = k.data(), params.v = v.data(), params.g = g.data(),
    params.beta = beta.data();
    params.segment_ids = static_cast<int32_t*>(segment_ids.data());
    params.o = o.data();
    params.final_state = static_cast<float*>(final_state.data());
    params.beta_is_logits = params.qk_l2norm = true;
    params.scale = 0.125f;
  }

  // Tokens start .. start + length - 1 in a call of their own, against segment n of this one.
  bool equals_alone(int64_t start, int64_t length, int64_t n) {
    const int64_t H = params.shape.H, row = H * 128, state = H * Call::K * Call::V;
    ForwardParams alone = params;
    auto shift = [&](const void*& pointer, int64_t elements) {
      pointer = static_cast<const char*>(pointer) + start * elements * 2;
    };
    shift(alone.q, row), shift(alone.k, row), shift(alone.v, row), shift(alone.g, row),
        shift(alone.beta, H);
    alone.shape.T = length, alone.shape.N = 1, alone.shape.has_segment_ids = false,
    alone.segment_ids = nullptr;
    DeviceBuffer own_o(length * row * 2), own_state(state * 4),
        scratch(forward_workspace_bytes(alone.shape));
    own_o.fill(0xFF), own_state.fill(0xFF);
    alone.o = own_o.data(), alone.final_state = static_cast<float*>(own_state.data()),
    alone.workspace = scratch.data();
    if (!forward(alone, nullptr).ok()) return false;
    const auto expected = own_o.download<uint16_t>();
    const auto expected_state = own_state.download<uint32_t>();
    std::vector<uint16_t> got(expected.size());
    std::vector<uint32_t> got_state(expected_state.size());
    CHECK_CUDA(cudaMemcpy(got.data(), static_cast<char*>(params.o) + start * row * 2,
                          got.size() * 2, cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(got_state.data(), params.final_state + n * state, got_state.size() * 4,
                          cudaMemcpyDeviceToHost));
    const bool finite =
        std::none_of(got.begin(), got.end(), [](uint16_t x) { return (x & 0x7f80) == 0x7f80; });
    return finite && got == expected && got_state == expected_state;
  }

  bool run() {
    DeviceBuffer scratch(forward_workspace_bytes(params.shape));
    scratch.fill(0xFF), o.fill(0xFF), final_state.fill(0xFF);
    params.workspace = scratch.data();
    const Status status = forward(params, nullptr);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    return status.ok();
  }

  DeviceBuffer q, k, v, g, beta, segment_ids, o, final_state;
  ForwardParams params{};
};

bool check_large_offsets() {
  LargeCall call(128, {131100, 100}, 2);  // 2.15e9 elements an operand
  const bool good = call.run() && call.equals_alone(131100, 100, 1);
  std::printf("%-44s %s\n", "T H K beyond 2^31, the last 100 tokens",
              good ? "equal bits" : "FAILED");
  return good;
}

bool check_many_pairs() {
  std::vector<int64_t> lengths(1100);
  std::vector<int64_t> starts(lengths.size());
  int64_t T = 0;
  for (size_t n = 0; n < lengths.size(); T += lengths[n++])
    starts[n] = T, lengths[n] = 1 + int64_t(n * 7 % 70);
  LargeCall call(64, lengths, int64_t(lengths.size()));
  bool good = call.run();
  for (int64_t n : {0, 1, 511, 1023, 1024, 1099})
    good &= call.equals_alone(starts[n], lengths[n], n);
  std::printf("%-44s %s\n", "70,400 (segment, head) pairs", good ? "equal bits" : "FAILED");
  return good;
}

bool check_refusals() {
  Case c = make_case("refusals", shape(1, 10, 1, 1));
  Launch launch(c);
  auto refused = [&](auto change, const char* word) {
    ForwardParams params = launch.params;
    change(params);
    const Status status = forward(params, nullptr);
    const bool told = !status.ok() && status.message.find(word) != std::string::npos;
    if (!told)
      std::printf("  expected a refusal that names %s, got '%s'\n", word, status.message.c_str());
    return told;
  };
  bool good = true;
  good &= refused([](ForwardParams& p) { p.shape.HV = 3, p.shape.H = 2; }, "HV");
  good &= refused([](ForwardParams& p) { p.shape.K = 64; }, "K = 64");
  good &= refused([](ForwardParams& p) { p.q = static_cast<const char*>(p.q) + 2; },
                  "q is not aligned");
  good &= refused([](ForwardParams& p) { p.gate = Gate::kBounded, p.gate_lower_bound = -6; },
                  "gate_lower_bound");
  good &= refused([](ForwardParams& p) { p.gate = Gate::kSoftplus; }, "A_log");
  good &= launch.run(0xFF);  // the next valid call works
  std::printf("%-44s %s\n", "refusals", good ? "told" : "FAILED");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false, large = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    quick |= option == "--quick";
    large |= option == "--large";
    poisoned &= option != "--unpoisoned";
  }
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  int failures = 0, count = 0;
  auto tally = [&](bool good) { ++count, failures += good ? 0 : 1; };
  if (large) {
    tally(check_large_offsets());
    tally(check_many_pairs());
  } else {
    for (const Case& c : cases(quick)) tally(check(c));
    tally(check_packing(2));
    if (!quick) tally(check_packing(70));
    tally(check_streams(quick ? 3 : 1000));
    tally(check_refusals());
  }
  std::printf("%d of %d passed\n", count - failures, count);
  return failures == 0 ? 0 : 1;
}
