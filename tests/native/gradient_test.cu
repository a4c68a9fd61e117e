// The gradient stage alone against its formulas in float64: states, state gradients, U and dR are
// random data, not those of a call. Exact-size allocations, poisoned outputs, a canary behind the
// workspace, bitwise repeats, NaN in neighbours, doubled cotangents. Prints a line a case; exit
// status 1 on failure.
//   gradient_test [--quick | --time]
//   --quick: small cases alone, for compute-sanitizer. --time: CUDA events at large shapes.
#include <algorithm>
#include <functional>
#include <random>
#include <string>

#include "device.h"
#include "gradient_oracle.h"
#include "problem/workspace.h"
#include "sm90/launch.h"

namespace {

using namespace jax_flashkda;
using oracle::Call;
using oracle::GradientCall;

constexpr size_t kCanaryBytes = 4096;
constexpr unsigned char kCanary = 0xA5;

struct Case {
  std::string name;
  GradientCall x;
  bool g_bf16 = true, beta_bf16 = true;
  double limit = 0.008, gate_limit = 0.015;  // relative RMS over the whole tensor
};

// Boundary images [.., V][K] as the scans store them.
std::vector<uint16_t> swizzled_images(const std::vector<float>& images) {
  std::vector<uint16_t> out(images.size());
  for (size_t at = 0; at < images.size(); ++at) {
    const size_t image = at / (128 * 128), v = at / 128 % 128, k = at % 128;
    const size_t piece = k % 64 / 8;
    const __nv_bfloat16 x = __float2bfloat16(images[at]);
    std::memcpy(&out[image * 128 * 128 + k / 64 * 8192 + v * 64 + ((piece ^ (v % 8)) * 8) + k % 8],
                &x, 2);
  }
  return out;
}

std::vector<unsigned char> bytes_of(const DeviceBuffer& buffer) {
  return buffer.download<unsigned char>();
}

float value_at(const std::vector<unsigned char>& bytes, bool bf16, size_t i) {
  uint32_t bits = 0;
  if (bf16) {
    uint16_t half;
    std::memcpy(&half, bytes.data() + 2 * i, 2);
    bits = uint32_t(half) << 16;
  } else {
    std::memcpy(&bits, bytes.data() + 4 * i, 4);
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Results {
  std::vector<unsigned char> dq, dk, dg, d_beta, dA_log, d_dt_bias, dv;
  bool operator==(const Results& r) const {
    return dq == r.dq && dk == r.dk && dg == r.dg && d_beta == r.d_beta && dA_log == r.dA_log &&
           d_dt_bias == r.d_dt_bias && dv == r.dv;
  }
};

struct Launch {
  explicit Launch(const Case& c) : g_bf16(c.g_bf16), beta_bf16(c.beta_bf16) {
    const Call& x = c.x.call;
    q = upload_as(x.q, true), k = upload_as(x.k, true), v = upload_as(x.v, true);
    g = upload_as(x.g, g_bf16);
    beta = upload_as(x.beta, beta_bf16), A_log = upload_as(x.A_log, false);
    dt_bias = upload_as(x.dt_bias, false), initial_state = upload_as(x.initial_state, false);
    d_final_state = upload_as(c.x.d_final_state, false), d_o = upload_as(c.x.d_o, true);
    d_r = c.x.d_r, u = upload_as(c.x.u, true);
    segment_ids = DeviceBuffer(x.segment_ids.size() * 4);
    segment_ids.upload(x.segment_ids);
    dq = DeviceBuffer(x.q.size() * 2), dk = DeviceBuffer(x.q.size() * 2);
    dg = DeviceBuffer(x.g.size() * (g_bf16 ? 2 : 4));
    d_beta = DeviceBuffer(x.beta.size() * (beta_bf16 ? 2 : 4));
    dA_log = DeviceBuffer(x.A_log.size() * 4), d_dt_bias = DeviceBuffer(x.dt_bias.size() * 4);
    states = swizzled_images(c.x.states), state_gradients = swizzled_images(c.x.state_gradients);
    ForwardParams& p = params.forward;
    p.shape = {x.B, x.T, x.H, x.HV, Call::K, Call::V, x.N, x.has_segment_ids};
    p.qkv_dtype = DType::kBF16;
    p.g_dtype = g_bf16 ? DType::kBF16 : DType::kF32;
    p.beta_dtype = beta_bf16 ? DType::kBF16 : DType::kF32;
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.g = g.data(), p.beta = beta.data();
    p.A_log = static_cast<float*>(A_log.data());
    p.dt_bias = static_cast<float*>(dt_bias.data());
    p.initial_state = static_cast<float*>(initial_state.data());
    p.segment_ids = static_cast<int32_t*>(segment_ids.data());
    p.gate = static_cast<Gate>(x.gate);
    p.gate_lower_bound = static_cast<float>(x.gate_lower_bound);
    p.beta_is_logits = x.beta_is_logits, p.allow_neg_eigval = x.allow_neg_eigval;
    p.qk_l2norm = x.qk_l2norm, p.scale = static_cast<float>(x.scale);
    p.has_padding_segment_id = x.has_padding_segment_id;
    p.padding_segment_id = x.padding_segment_id;
    p.nonzero_beta = true;
    params.d_o = d_o.data();
    params.d_final_state = static_cast<float*>(d_final_state.data());
    params.dq = dq.data(), params.dk = dk.data(), params.dg = dg.data();
    params.d_beta = d_beta.data();
    params.dA_log = static_cast<float*>(dA_log.data());
    params.d_dt_bias = static_cast<float*>(d_dt_bias.data());
    layout = backward_workspace(p.shape);
    workspace = DeviceBuffer(layout.bytes + kWorkspaceAlignment + kCanaryBytes);
    p.workspace = reinterpret_cast<void*>(
        (reinterpret_cast<uintptr_t>(workspace.data()) + kWorkspaceAlignment - 1) /
        kWorkspaceAlignment * kWorkspaceAlignment);
  }

  uint8_t* at(int64_t offset) { return static_cast<uint8_t*>(params.forward.workspace) + offset; }

  Results run(int poison, bool& good) {
    for (DeviceBuffer* b : {&dq, &dk, &dg, &d_beta, &dA_log, &d_dt_bias, &workspace})
      b->fill(poison);
    CHECK_CUDA(cudaMemset(at(layout.bytes), kCanary, kCanaryBytes));
    dv = upload_as(d_r, true);
    params.dv = dv.data();
    auto copy = [&](int64_t offset, const void* from, size_t bytes, cudaMemcpyKind kind) {
      if (bytes > 0) CHECK_CUDA(cudaMemcpy(at(offset), from, bytes, kind));
    };
    copy(layout.states, states.data(), states.size() * 2, cudaMemcpyHostToDevice);
    copy(layout.state_gradients, state_gradients.data(), state_gradients.size() * 2,
         cudaMemcpyHostToDevice);
    copy(layout.corrected_values, u.data(), u.bytes(), cudaMemcpyDeviceToDevice);
    auto require = [&](const Status& status) {
      if (!status.ok()) std::printf("  %s\n", status.message.c_str());
      good &= status.ok();
    };
    const bool tokens = params.forward.shape.B * params.forward.shape.T > 0;
    if (tokens && params.forward.shape.has_segment_ids)
      require(sm90::launch_segment_table(params.forward, layout.forward, nullptr));
    if (tokens) require(sm90::launch_chunk_gradient(params, layout, nullptr));
    require(sm90::launch_gradient_reduce(params, layout, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<unsigned char> tail(kCanaryBytes);
    CHECK_CUDA(cudaMemcpy(tail.data(), at(layout.bytes), kCanaryBytes, cudaMemcpyDeviceToHost));
    if (!std::all_of(tail.begin(), tail.end(), [](unsigned char b) { return b == kCanary; })) {
      std::printf("  the canary behind the workspace was overwritten\n");
      good = false;
    }
    return {bytes_of(dq),     bytes_of(dk),        bytes_of(dg), bytes_of(d_beta),
            bytes_of(dA_log), bytes_of(d_dt_bias), bytes_of(dv)};
  }

  bool g_bf16, beta_bf16;
  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, initial_state, d_final_state, segment_ids, d_o, u, dv,
      dq, dk, dg, d_beta, dA_log, d_dt_bias, workspace;
  std::vector<float> d_r;
  std::vector<uint16_t> states, state_gradients;
  BackwardWorkspace layout{};
  BackwardParams params{};
};

struct Regime {
  enum Keys { kRandom, kIdentical, kNear, kZero } keys = kRandom;
  enum Gates { kSlow, kFast, kBound, kNone, kReset, kFifty, kDead, kMixed } gates = kSlow;
};

Case make_case(std::string name, Call shape, Regime regime = {}, uint64_t seed = 1) {
  Case c{std::move(name), {std::move(shape)}};
  Call& x = c.x.call;
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  x.scale = 1.0 / std::sqrt(128.0);
  auto fill = [&](std::vector<float>& out, int64_t count, auto draw) {
    out.resize(count);
    for (float& value : out) value = round_bf16(draw());
  };
  auto gaussian = [&] { return normal(generator); };
  const int64_t tokens = x.B * x.T, slots = (x.T + 63) / 64;
  fill(x.q, tokens * x.H * Call::K, gaussian);
  fill(x.k, tokens * x.H * Call::K, gaussian);
  for (auto* rows : {&x.v, &c.x.d_o, &c.x.d_r, &c.x.u}) fill(*rows, tokens * x.HV * Call::V, gaussian);
  for (auto* images : {&c.x.states, &c.x.state_gradients})
    fill(*images, x.B * x.HV * slots * Call::K * Call::V, [&] { return 0.3f * gaussian(); });
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
  fill(x.beta, tokens * x.HV,
       [&] { return x.beta_is_logits ? normal(generator) : 0.05f + uniform(generator); });
  fill(x.g, tokens * x.HV * Call::K, [&] {
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
      case Regime::kFifty:
        return -50.0f;
      case Regime::kDead:
        return -1000.0f;
      case Regime::kMixed:  // each channel of its own kind, some tokens far from others
        return uniform(generator) < 0.2f ? -40.0f * uniform(generator) : -0.02f;
      default:
        return 0.0f;
    }
  });
  if (regime.gates == Regime::kReset && !x.g.empty()) x.g[x.g.size() / 2] = -INFINITY;
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

Case with_states(Case c) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  Call& x = c.x.call;
  for (auto* states : {&x.initial_state, &c.x.d_final_state}) {
    states->resize(x.B * x.N * x.HV * Call::K * Call::V);
    for (float& value : *states) value = 0.3f * normal(generator);
  }
  return c;
}

Case packed_case(std::string name, int64_t B, int64_t HV, int64_t N,
                 const std::vector<std::pair<int32_t, int64_t>>& runs) {
  std::vector<int32_t> ids;
  for (const auto& [id, length] : runs) ids.insert(ids.end(), length, id);
  Call c = raw_shape(oracle::Gate::kSoftplus, B, int64_t(ids.size()) / B, HV, HV);
  c.N = N;
  c.has_segment_ids = c.has_padding_segment_id = true;
  c.segment_ids = ids;
  return with_states(make_case(std::move(name), std::move(c)));
}

double relative_rms(const std::vector<double>& truth, const std::vector<unsigned char>& got,
                    bool bf16, const std::vector<double>* sizes = nullptr) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double difference = value_at(got, bf16, i) - truth[i];
    error += difference * difference;
    size += sizes != nullptr ? (*sizes)[i] : truth[i] * truth[i];
  }
  if (std::isnan(error)) return error;
  return size > 0.0 ? std::sqrt(error / size) : std::sqrt(error);
}

bool check(const Case& c) {
  Launch launch(c);
  bool good = true;
  const Results got = launch.run(0xFF, good);
  const oracle::Gradients truth = oracle::gradients(c.x);
  const Call& x = c.x.call;
  const double dq = relative_rms(truth.dq, got.dq, true), dk = relative_rms(truth.dk, got.dk, true),
               dg = relative_rms(truth.dg, got.dg, c.g_bf16),
               d_beta = relative_rms(truth.d_beta, got.d_beta, c.beta_bf16);
  const double dA = x.A_log.empty()
                        ? 0.0
                        : relative_rms(truth.dA_log, got.dA_log, false, &truth.dA_log_size),
               d_bias = x.dt_bias.empty() ? 0.0
                                          : relative_rms(truth.d_dt_bias, got.d_dt_bias, false,
                                                         &truth.d_dt_bias_size);
  const bool accurate = dq <= c.limit && dk <= c.limit && dg <= c.gate_limit &&
                        d_beta <= c.gate_limit && dA <= c.gate_limit && d_bias <= c.gate_limit;
  bool repeats = true;
  for (int i = 0; i < 3; ++i) repeats &= launch.run(i == 0 ? 0x3C : 0xFF, good) == got;
  std::printf("%-40s dq %.1e dk %.1e dg %.1e d_beta %.1e dA_log %.1e d_dt_bias %.1e%s%s%s\n",
              c.name.c_str(), dq, dk, dg, d_beta, dA, d_bias, accurate ? "" : "  INACCURATE",
              repeats ? "" : "  NOT REPEATABLE", good ? "" : "  FAILED");
  std::fflush(stdout);
  return good && accurate && repeats;
}

std::vector<Case> cases(bool quick) {
  using G = oracle::Gate;
  std::vector<Case> list;
  for (int64_t T : {1, 15, 16, 17, 31, 63, 64, 65, 129})
    list.push_back(make_case("log_decay T " + std::to_string(T), shape(1, T, 1, 1)));
  list.push_back(make_case("softplus, logits, l2norm", raw_shape(G::kSoftplus, 2, 100, 2, 2)));
  list.push_back(make_case("softplus, fast", raw_shape(G::kSoftplus, 1, 200, 2, 2),
                           {Regime::kRandom, Regime::kFast}));
  list.push_back(make_case("bounded, logits, l2norm", raw_shape(G::kBounded, 1, 200, 1, 1)));
  list.push_back(make_case("bounded, fast, GVA", raw_shape(G::kBounded, 1, 200, 1, 2),
                           {Regime::kRandom, Regime::kFast}));
  list.push_back(with_states(make_case("log decay, resets, GVA, states", shape(1, 200, 1, 3),
                                       {Regime::kRandom, Regime::kReset})));
  list.push_back(packed_case("packed", 1, 2, 3, {{1, 70}, {2, 1}, {3, 64}, {0, 5}, {9, 100}}));
  {
    Case c = make_case("fp32 gate and beta", raw_shape(G::kSoftplus, 1, 150, 2, 2));
    c.g_bf16 = c.beta_bf16 = false;
    list.push_back(with_states(std::move(c)));
  }
  list.push_back(make_case("-50 a token", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kFifty}));
  if (quick) return list;
  list.push_back(make_case("softplus, fp32 gate, tail 17", raw_shape(G::kSoftplus, 1, 81, 1, 1),
                           {Regime::kRandom, Regime::kFast}));
  list.back().g_bf16 = false;
  list.push_back(make_case("log decay, fp32 gate, resets", shape(1, 200, 1, 1),
                           {Regime::kRandom, Regime::kReset}));
  list.back().g_bf16 = false;
  list.push_back(
      make_case("log decay, fast", shape(1, 200, 1, 1), {Regime::kRandom, Regime::kFast}));
  list.push_back(
      make_case("log decay, bound", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kBound}));
  list.push_back(
      make_case("log decay, none", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kNone}));
  list.push_back(
      make_case("log decay, mixed", shape(1, 200, 2, 2), {Regime::kRandom, Regime::kMixed}));
  list.push_back(make_case("-1000 a token", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kDead}));
  list.push_back(make_case("bounded, at the bound", raw_shape(G::kBounded, 1, 130, 1, 1),
                           {Regime::kRandom, Regime::kBound}));
  for (auto keys : {Regime::kIdentical, Regime::kNear, Regime::kZero}) {
    const char* name = keys == Regime::kIdentical ? "identical keys"
                       : keys == Regime::kNear    ? "near keys"
                                                  : "zero keys";
    for (auto gates : {Regime::kSlow, Regime::kFast, Regime::kNone, Regime::kReset})
      list.push_back(make_case(std::string(name) + ", gates " + std::to_string(gates),
                               shape(1, 130, 1, 1), {keys, gates}));
    list.push_back(make_case(std::string(name) + ", softplus",
                             raw_shape(G::kSoftplus, 1, 130, 1, 1), {keys, Regime::kSlow}));
  }
  {
    Call c = raw_shape(G::kSoftplus, 1, 130, 2, 2);
    c.allow_neg_eigval = true;
    list.push_back(make_case("negative eigenvalues", std::move(c)));
    Call d = raw_shape(G::kSoftplus, 1, 130, 2, 4);
    d.qk_l2norm = false;
    list.push_back(with_states(make_case("softplus, no norm, GVA", std::move(d))));
    Case e = make_case("bounded, no A_log, no dt_bias", raw_shape(G::kBounded, 1, 100, 1, 1));
    e.x.call.A_log.clear();
    e.x.call.dt_bias.clear();
    list.push_back(std::move(e));
  }
  list.push_back(packed_case("packed, two rows, few slots", 2, 3, 2,
                             {{1, 17}, {2, 63}, {3, 15}, {0, 33}, {5, 128}}));
  list.push_back(packed_case("packed, tokens alone", 1, 1, 40, [] {
    std::vector<std::pair<int32_t, int64_t>> runs;
    for (int i = 0; i < 40; ++i) runs.push_back({i + 1, 1 + i % 3});
    return runs;
  }()));
  list.push_back(with_states(make_case("many chunks", raw_shape(G::kSoftplus, 1, 2000, 2, 2))));
  return list;
}

void set_nan(std::vector<float>& x, int64_t from, int64_t to) {
  std::fill(x.begin() + from, x.begin() + to, NAN);
}

// NaN in one segment and in padding changes no bit of the other segments' gradients.
bool check_isolation() {
  const Case clean = packed_case("", 1, 2, 4, {{1, 70}, {2, 100}, {0, 20}, {3, 65}});
  Case c = clean;
  Call& x = c.x.call;
  const int64_t heads = x.HV * 128, slots = (x.T + 63) / 64;
  const std::pair<int64_t, int64_t> ranges[] = {{70, 170}, {170, 190}};
  for (const auto& [low, high] : ranges) {
    for (auto* rows : {&x.q, &x.k, &x.v, &x.g, &c.x.d_o, &c.x.d_r, &c.x.u})
      set_nan(*rows, low * heads, high * heads);
    set_nan(x.beta, low * x.HV, high * x.HV);
  }
  for (int64_t h = 0; h < x.HV; ++h) {
    // The one boundary inside the second segment is at token 134, and slot 0 is nobody's.
    for (auto* images : {&c.x.states, &c.x.state_gradients})
      for (int64_t slot : {int64_t{2}, int64_t{0}})
        set_nan(*images, (h * slots + slot) * 16384, (h * slots + slot + 1) * 16384);
    for (auto* states : {&x.initial_state, &c.x.d_final_state})
      set_nan(*states, (x.HV + h) * 16384, (x.HV + h + 1) * 16384);
  }
  bool good = true;
  const Results a = Launch(clean).run(0xFF, good), b = Launch(c).run(0xFF, good);
  bool same = true, cleared = true;
  for (int64_t t = 0; t < x.T; ++t) {
    if (t >= 70 && t < 170) continue;
    auto equal = [&](const auto& u, const auto& v, int64_t bytes) {
      return std::memcmp(&u[t * bytes], &v[t * bytes], bytes) == 0;
    };
    same &= equal(a.dq, b.dq, 2 * heads) && equal(a.dk, b.dk, 2 * heads) &&
            equal(a.dg, b.dg, 2 * heads) && equal(a.d_beta, b.d_beta, 2 * x.HV) &&
            equal(a.dv, b.dv, 2 * heads);
    if (t >= 170 && t < 190)
      for (const auto* r : {&b.dq, &b.dk, &b.dg, &b.dv})
        cleared &= std::all_of(r->begin() + t * 2 * heads, r->begin() + (t + 1) * 2 * heads,
                               [](unsigned char byte) { return byte == 0; });
  }
  std::printf("%-40s %s%s\n", "NaN in neighbours", same ? "no bit changed" : "BITS CHANGED",
              cleared ? "" : ", PADDING NOT CLEARED");
  return good && same && cleared;
}

// d_beta of chunks of one token, behind others and alone, with slots and without, is fp32.
bool check_single_tokens(oracle::Gate gate, bool g_bf16) {
  // Two rows of 260 tokens.
  const std::vector<std::pair<int32_t, int64_t>> runs = {
      {1, 65}, {2, 1},   {3, 1}, {0, 3}, {4, 129}, {5, 1},  {6, 1},
      {7, 63}, {8, 193}, {9, 1}, {8, 1}, {9, 1},   {3, 58}, {1, 2}};
  Case c = packed_case("", 2, 3, 5, runs);
  Call& x = c.x.call;
  x.gate = gate, c.g_bf16 = g_bf16, c.beta_bf16 = false;
  if (gate == oracle::Gate::kLogDecay) {
    x.A_log.clear(), x.dt_bias.clear();
    for (float& value : x.g) value = round_bf16(-std::fabs(value));
    x.beta_is_logits = x.qk_l2norm = false;
  }
  bool good = true;
  const Results got = Launch(c).run(0xFF, good);
  const oracle::Gradients truth = oracle::gradients(c.x);
  double error = 0.0, size = 0.0;
  int64_t count = 0;
  for (const oracle::ChunkRange& chunk : oracle::chunks_of(x))
    for (int64_t h = 0; h < x.HV && chunk.length == 1 && chunk.segment >= 0; ++h, ++count) {
      const int64_t at = (chunk.row * x.T + chunk.start) * x.HV + h;
      const double difference = value_at(got.d_beta, false, at) - truth.d_beta[at];
      error += difference * difference, size += truth.d_beta[at] * truth.d_beta[at];
    }
  const double relative = std::sqrt(error / size);
  const bool fine = count > 0 && relative <= 2e-5;  // false for NaN
  std::printf("%-40s d_beta %.1e of %ld%s\n", "chunks of one token", relative, long(count),
              fine ? "" : "  INACCURATE");
  return good && fine;
}

// Twice the cotangents, twice the gradients, bit by bit.
bool check_doubling(Regime::Gates gates) {
  const Case once = with_states(make_case("", shape(1, 200, 1, 2), {Regime::kRandom, gates}));
  Case twice = once;
  for (auto* x : {&twice.x.d_o, &twice.x.d_r, &twice.x.state_gradients, &twice.x.d_final_state})
    for (float& value : *x) value *= 2.0f;
  bool good = true, same = true;
  const Results a = Launch(once).run(0xFF, good), b = Launch(twice).run(0xFF, good);
  for (auto member : {&Results::dq, &Results::dk, &Results::dg, &Results::d_beta})
    for (size_t i = 0; i < (a.*member).size() / 2; ++i)
      same &= 2.0f * value_at(a.*member, true, i) == value_at(b.*member, true, i);
  std::printf("%-40s %s\n", "doubled cotangents", same ? "doubled gradients" : "NOT DOUBLED");
  return good && same;
}

struct TimedShape {
  const char* name;
  int64_t B, T, H, HV;
};

void time_shape(const TimedShape& t, Gate gate, bool fast) {
  struct Set {
    std::vector<DeviceBuffer> buffers;
    BackwardParams params{};
  } sets[2];
  BackwardWorkspace layout{};
  for (uint32_t n = 0; n < 2; ++n) {
    Set& set = sets[n];
    uint32_t seed = 100 * n;
    auto normal = [&](int64_t count, float scale, float shift = 0.0f) {
      set.buffers.emplace_back(count * 2);
      fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(set.buffers.back().data()), count,
                                 ++seed * 7919, scale, shift);
      return set.buffers.back().data();
    };
    auto floats = [&](int64_t count, float value) {
      set.buffers.push_back(upload_as(std::vector<float>(count, value), false));
      return static_cast<float*>(set.buffers.back().data());
    };
    ForwardParams& p = set.params.forward;
    p.shape = {t.B, t.T, t.H, t.HV, 128, 128, 1, false};
    layout = backward_workspace(p.shape);
    const int64_t qk = t.B * t.T * t.H * 128, v = t.B * t.T * t.HV * 128;
    p.qkv_dtype = p.g_dtype = p.beta_dtype = DType::kBF16;
    p.q = normal(qk, 1), p.k = normal(qk, 1), p.g = normal(v, fast ? 1.0f : 0.3f);
    p.beta = normal(v / 128, 1);
    p.A_log = floats(t.B * t.HV, fast ? 0.5f : 0.0f);
    p.dt_bias = floats(t.B * t.HV * 128, fast ? 0.5f : -4.0f);
    p.gate = gate, p.gate_lower_bound = -5.0f;
    p.beta_is_logits = p.qk_l2norm = p.nonzero_beta = true;
    p.scale = 0.08838835f;
    set.params.d_o = normal(v, 1), set.params.dv = normal(v, 1);
    set.params.dq = normal(qk, 1), set.params.dk = normal(qk, 1), set.params.dg = normal(v, 1);
    set.params.d_beta = normal(v / 128, 1);
    set.params.dA_log = floats(t.B * t.HV, 0), set.params.d_dt_bias = floats(t.B * t.HV * 128, 0);
    set.buffers.emplace_back(layout.bytes + 1024);
    p.workspace = reinterpret_cast<void*>(
        (reinterpret_cast<uintptr_t>(set.buffers.back().data()) + 1023) / 1024 * 1024);
    fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(p.workspace), layout.bytes / 2, 3, 0.3f,
                               0.0f);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  auto median = [&](auto launch) {
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int repeat = 0; repeat < 8; ++repeat) {
      constexpr int kCalls = 10;
      CHECK_CUDA(cudaEventRecord(begin));
      for (int i = 0; i < kCalls; ++i) launch(sets[i % 2].params);
      CHECK_CUDA(cudaEventRecord(end));
      CHECK_CUDA(cudaEventSynchronize(end));
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
      if (repeat > 0) times.push_back(ms / kCalls);
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  };
  auto require = [](const Status& status) {
    if (!status.ok()) std::printf("%s\n", status.message.c_str()), std::exit(1);
  };
  const float gradient = median(
      [&](const BackwardParams& p) { require(sm90::launch_chunk_gradient(p, layout, nullptr)); });
  const float reduce = median(
      [&](const BackwardParams& p) { require(sm90::launch_gradient_reduce(p, layout, nullptr)); });
  const double U = t.B * t.T * t.HV * 256.0;
  const double bytes = 9 * U + 4 * U * t.H / t.HV + (t.HV > t.H ? 4 * U - 2 * U * t.H / t.HV : 0);
  std::printf("%-12s %-8s %-4s gradient %7.3f ms  reduce %6.3f  bytes alone %.3f\n", t.name,
              gate == Gate::kSoftplus ? "softplus" : "bounded", fast ? "fast" : "slow", gradient,
              reduce, bytes / 4.3e9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const Status status = sm90::initialize_chunk_gradient();
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  if (mode == "--time") {
    const TimedShape shapes[] = {{"fix8k_h96", 1, 8192, 96, 96}, {"fix8k_h64", 1, 8192, 64, 64},
                                 {"b4t4k_h32", 4, 4096, 32, 32}, {"b1t32k_h16", 1, 32768, 16, 16},
                                 {"b1t64k_h8", 1, 65536, 8, 8},  {"t2k_h12", 1, 2048, 12, 12},
                                 {"gva16_32", 1, 8192, 16, 32}};
    for (const TimedShape& t : shapes) {
      if (argc > 2 && t.name != std::string(argv[2])) continue;
      time_shape(t, Gate::kBounded, false);
      time_shape(t, Gate::kSoftplus, false);
      time_shape(t, Gate::kSoftplus, true);
    }
    return 0;
  }
  int failures = 0;
  for (const Case& c : cases(mode == "--quick")) failures += !check(c);
  for (auto gate : {oracle::Gate::kSoftplus, oracle::Gate::kBounded, oracle::Gate::kLogDecay})
    for (bool g_bf16 : {true, false}) failures += !check_single_tokens(gate, g_bf16);
  failures += !check_isolation();
  failures += !check_doubling(Regime::kSlow);
  failures += !check_doubling(Regime::kMixed);
  std::printf("%d failures\n", failures);
  return failures > 0;
}
