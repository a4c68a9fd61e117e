// The decode step against a float64 recurrence, without XLA: exact-size allocations, poisoned
// outputs, bitwise repeats, slots that are negative, past the pool, named twice or by nobody; and
// that bits depend neither on the batch nor on how a state is divided among CTAs. Prints a line a
// case; exit status 1 on failure.
//   step_test [--quick]      --quick: few heads, for compute-sanitizer
#include <algorithm>
#include <climits>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "dispatch/dispatch.h"
#include "dtypes.h"
#include "sm90/decode_step/kernel.cuh"
#include "sm90/decode_step/one_token.cuh"

namespace {

using namespace jax_flashkda;

struct Case {
  std::string name;
  StepShape shape;  // K = V; slots 0: no indices
  Gate gate = Gate::kSoftplus;
  DType tokens = DType::kBF16, gates = DType::kBF16, state = DType::kF32;
  bool raw = true;  // beta logits, l2norm
  bool neg = false;
  bool token_states = true, parameters_per_sequence = false;
  std::vector<int32_t> indices = {};
};

// A case's operands on both sides.
struct Operands {
  explicit Operands(const Case& c) {
    const StepShape& s = c.shape;
    std::mt19937_64 generator(7);
    std::normal_distribution<float> normal;
    auto draw = [&](int64_t count, DType dtype, float scale, float shift) {
      std::vector<float> x(count);
      for (float& value : x) value = rounded(shift + scale * normal(generator), dtype);
      return x;
    };
    const float qk_scale = c.raw ? 1.0f : 1.0f / std::sqrt(float(s.K));
    q = draw(s.N * s.T * s.H * s.K, c.tokens, qk_scale, 0);
    k = draw(s.N * s.T * s.H * s.K, c.tokens, qk_scale, 0);
    v = draw(s.N * s.T * s.HV * s.V, c.tokens, 1, 0);
    g = draw(s.N * s.T * s.HV * s.K, c.gates, 1, 0);
    beta = draw(s.N * s.T * s.HV, c.gates, 1, 0);
    if (c.gate == Gate::kLogDecay)
      for (float& x : g) x = -std::fabs(x);
    if (!c.raw)
      for (float& x : beta) x = rounded(1.0f / (1.0f + std::exp(-x)), c.gates);
    const int64_t rows = c.parameters_per_sequence ? s.N : 1;
    if (c.gate != Gate::kLogDecay) {
      A_log = draw(rows * s.HV, DType::kF32, 0.3f, 0);
      dt_bias = draw(rows * s.HV * s.K, DType::kF32, 1, -2);
    }
    const int64_t slots = c.indices.empty() ? s.N : s.slots;
    state = draw(slots * s.HV * s.K * s.V, c.state, 1, 0);
  }
  std::vector<float> q, k, v, g, beta, A_log, dt_bias, state;
};

struct Truth {
  std::vector<double> o, token_states;
};

int32_t slot_of(const Case& c, int64_t n) { return c.indices.empty() ? int32_t(n) : c.indices[n]; }

bool has_slot(const Case& c, int64_t n) {
  const int64_t slots = c.indices.empty() ? c.shape.N : c.shape.slots;
  return slot_of(c, n) >= 0 && slot_of(c, n) < slots;
}

Truth recurrence(const Case& c, const Operands& x) {
  const StepShape& s = c.shape;
  const int64_t K = s.K, V = s.V;
  Truth truth;
  truth.o.assign(s.N * s.T * s.HV * V, 0.0);
  truth.token_states.assign(s.N * s.T * s.HV * K * V, 0.0);
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t h = 0; h < s.HV && has_slot(c, n); ++h) {
      const float* first = &x.state[(slot_of(c, n) * s.HV + h) * K * V];
      std::vector<double> S(first, first + K * V);
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t qk = ((n * s.T + t) * s.H + h / (s.HV / s.H)) * K,
                      own = (n * s.T + t) * s.HV + h,
                      row = (c.parameters_per_sequence ? n * s.HV : 0) + h;
        auto factor = [&](const std::vector<float>& y) {
          double squares = 0.0;
          for (int64_t i = 0; i < K; ++i) squares += double(y[qk + i]) * y[qk + i];
          return c.raw ? 1.0 / std::sqrt(squares + 1e-6) : 1.0;
        };
        const double q_factor = factor(x.q), k_factor = factor(x.k);
        double beta = x.beta[own];
        if (c.raw) beta = (c.neg ? 2.0 : 1.0) / (1.0 + std::exp(-beta));
        std::vector<double> u(V, 0.0);
        for (int64_t i = 0; i < K; ++i) {
          double g = x.g[own * K + i];
          if (c.gate != Gate::kLogDecay) {
            const double amplitude = std::exp(double(x.A_log[row])), y = g + x.dt_bias[row * K + i];
            g = c.gate == Gate::kSoftplus ? -amplitude * std::log1p(std::exp(y))
                                          : -5.0 / (1.0 + std::exp(-amplitude * y));
          }
          for (int64_t j = 0; j < V; ++j) {
            S[i * V + j] *= std::exp(g);
            u[j] += S[i * V + j] * x.k[qk + i] * k_factor;
          }
        }
        for (int64_t j = 0; j < V; ++j) u[j] = beta * (x.v[own * V + j] - u[j]);
        for (int64_t i = 0; i < K; ++i)
          for (int64_t j = 0; j < V; ++j) {
            S[i * V + j] += x.k[qk + i] * k_factor * u[j];
            truth.o[own * V + j] += 0.125 * S[i * V + j] * x.q[qk + i] * q_factor;
          }
        std::copy(S.begin(), S.end(), truth.token_states.begin() + own * K * V);
      }
    }
  return truth;
}

// A case on the device.
struct Launch {
  Launch(const Case& c, const Operands& x)
      : state_host(x.state),
        state_dtype(c.state),
        q(upload(x.q, c.tokens)),
        k(upload(x.k, c.tokens)),
        v(upload(x.v, c.tokens)),
        g(upload(x.g, c.gates)),
        beta(upload(x.beta, c.gates)),
        A_log(upload(x.A_log, DType::kF32)),
        dt_bias(upload(x.dt_bias, DType::kF32)),
        state(upload(x.state, c.state)),
        indices(c.indices.size() * 4),
        o(x.v.size() * (c.tokens == DType::kF32 ? 4 : 2)),
        token_states(c.token_states ? c.shape.T * c.shape.N * c.shape.HV * c.shape.K * c.shape.V *
                                          (c.state == DType::kF32 ? 4 : 2)
                                    : 0) {
    indices.upload(c.indices);
    params.shape = c.shape;
    if (c.indices.empty()) params.shape.slots = c.shape.N;
    params.qkv_dtype = c.tokens, params.g_dtype = params.beta_dtype = c.gates;
    params.state_dtype = c.state;
    params.q = q.data(), params.k = k.data(), params.v = v.data(), params.g = g.data();
    params.beta = beta.data();
    params.A_log = static_cast<float*>(A_log.data());
    params.dt_bias = static_cast<float*>(dt_bias.data());
    params.state_indices = static_cast<int32_t*>(indices.data());
    params.state = state.data(), params.o = o.data(), params.token_states = token_states.data();
    params.gate = c.gate, params.gate_lower_bound = -5.0f;
    params.beta_is_logits = params.qk_l2norm = c.raw;
    params.allow_neg_eigval = c.neg;
    params.parameters_per_sequence = c.parameters_per_sequence;
    params.scale = 0.125f;
  }

  template <class Step>
  bool run(int byte, Step step) {
    state = upload(state_host, state_dtype);
    params.state = state.data();
    o.fill(byte), token_states.fill(byte);
    const Status status = step(params);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    return status.ok();
  }
  bool run(int byte) {
    return run(byte, [](const StepParams& p) { return step(p, nullptr); });
  }

  bool same_bits(const Launch& other) const {
    return o.download<uint8_t>() == other.o.download<uint8_t>() &&
           state.download<uint8_t>() == other.state.download<uint8_t>() &&
           token_states.download<uint8_t>() == other.token_states.download<uint8_t>();
  }

  std::vector<float> state_host;
  DType state_dtype;
  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, state, indices, o, token_states;
  StepParams params{};
};

// States as the pool must hold them afterwards: those of the last token, and the rest as they were.
std::vector<double> final_states(const Case& c, const Operands& x, const Truth& truth) {
  const StepShape& s = c.shape;
  const int64_t head = s.K * s.V;
  std::vector<double> states(x.state.begin(), x.state.end());
  for (int64_t n = 0; n < s.N; ++n)
    if (has_slot(c, n))
      std::copy_n(truth.token_states.begin() + ((n + 1) * s.T - 1) * s.HV * head, s.HV * head,
                  states.begin() + slot_of(c, n) * s.HV * head);
  return states;
}

bool check(const Case& c) {
  const Operands x(c);
  const Truth truth = recurrence(c, x);
  Launch launch(c, x), again(c, x);
  bool good = launch.run(0xFF);
  const auto states = download(launch.state, c.state);
  const double o_error = relative_rms(truth.o, download(launch.o, c.tokens)),
               state_error = relative_rms(final_states(c, x, truth), states),
               token_error = c.token_states ? relative_rms(truth.token_states,
                                                           download(launch.token_states, c.state))
                                            : 0.0;
  const bool accurate = o_error <= limit_of(c.tokens) && state_error <= limit_of(c.state) &&
                        token_error <= limit_of(c.state);
  bool untouched = true;
  for (int64_t slot = 0; slot < launch.params.shape.slots; ++slot) {
    bool named = false;
    for (int64_t n = 0; n < c.shape.N; ++n) named |= slot_of(c, n) == slot;
    const int64_t size = c.shape.HV * c.shape.K * c.shape.V;
    untouched &=
        named || std::equal(states.begin() + slot * size, states.begin() + (slot + 1) * size,
                            x.state.begin() + slot * size);
  }
  bool repeats = true;
  for (int byte : {0x3C, 0xFF, 0xFF}) {
    good &= again.run(byte);
    repeats &= again.same_bits(launch);
  }
  std::printf("%-44s o %.2e  state %.2e  token states %.2e%s%s%s\n", c.name.c_str(), o_error,
              state_error, token_error, accurate ? "" : "  INACCURATE",
              untouched ? "" : "  OTHER SLOTS CHANGED", repeats ? "" : "  NOT REPEATABLE");
  return good && accurate && untouched && repeats;
}

bool report(const char* name, bool good, const char* word) {
  std::printf("%-44s %s\n", name, good ? word : "FAILED");
  return good;
}

bool check_named_twice(DType state, int64_t T) {
  Case c{"slots named twice", {6, T, 1, 2, 128, 128, 5}};
  c.state = state;
  c.indices = {1, 3, 1, 1, 0, 3};
  const Operands x(c);
  Case once = c;
  once.indices = {-1, -1, -1, -1, 0, -1};
  Launch twice(c, x), alone(once, x);
  bool good = twice.run(0xFF) && alone.run(0xFF);
  const auto states = twice.state.download<uint8_t>(), wanted = alone.state.download<uint8_t>();
  const size_t size = 2 * 128 * 128 * (state == DType::kF32 ? 4 : 2);
  for (size_t slot : {0, 2, 4})
    good &= std::equal(states.begin() + slot * size, states.begin() + (slot + 1) * size,
                       wanted.begin() + slot * size);
  const auto o = twice.o.download<uint16_t>(), o_wanted = alone.o.download<uint16_t>();
  const size_t row = T * 2 * 128;
  good &= std::equal(o.begin() + 4 * row, o.begin() + 5 * row, o_wanted.begin() + 4 * row);
  return report("slots named twice harm no other", good, "equal bits");
}

template <class State, int kLanes>
Status divided(const StepParams& p) {
  using Config = decode_step::Config<State, 128, kLanes, 1>;
  decode_step::decode_step_kernel<Config>
      <<<unsigned(p.shape.N * p.shape.HV * Config::kParts), Config::kThreads>>>(p);
  return {};
}

template <int kLanes>
Status one_token(const StepParams& p) {
  using Config = decode_step::Config<__nv_bfloat16, 128, kLanes, 1, 1, uint32_t>;
  decode_step::decode_one_token_kernel<Config>
      <<<unsigned(p.shape.N * p.shape.HV * Config::kParts), Config::kThreads>>>(p);
  return {};
}

bool check_divisions() {
  using Bf16 = __nv_bfloat16;
  bool good = true;
  for (DType state : {DType::kF32, DType::kBF16})
    for (int64_t T : {1, 3}) {
      Case c{"divisions", {5, T, 1, 2, 128, 128, 0}};
      c.state = state;
      const Operands x(c);
      Launch launch(c, x), other(c, x);
      good &= launch.run(0xFF);
      auto same = [&](auto step) { good &= other.run(0x3C, step) && other.same_bits(launch); };
      if (state == DType::kF32) {
        same(divided<float, 8>);
        same(divided<float, 16>);
        same(divided<float, 32>);
      } else {
        same(divided<Bf16, 8>);
        same(divided<Bf16, 16>);
      }
      if (state == DType::kBF16 && T == 1) {
        same(one_token<8>);
        same(one_token<16>);
      }
    }
  return report("a state in 4, 2 and 1 parts", good, "equal bits");
}

bool check_batch(DType state, int64_t T) {
  Case c{"batch", {40, T, 2, 4, 128, 128, 0}};
  c.state = state;
  const Operands x(c);
  Launch all(c, x);
  bool good = all.run(0xFF);
  const auto o = all.o.download<uint16_t>();
  const auto states = all.state.download<uint8_t>();
  for (int64_t n : {0, 17, 39}) {
    Case one = c;
    one.shape.N = 1;
    Operands y = x;
    auto cut = [&](std::vector<float>& values) {
      const size_t size = values.size() / c.shape.N;
      values = std::vector<float>(values.begin() + n * size, values.begin() + (n + 1) * size);
    };
    cut(y.q), cut(y.k), cut(y.v), cut(y.g), cut(y.beta), cut(y.state);
    Launch alone(one, y);
    good &= alone.run(0xFF);
    const auto own_o = alone.o.download<uint16_t>();
    const auto own_states = alone.state.download<uint8_t>();
    good &= std::equal(own_o.begin(), own_o.end(), o.begin() + n * own_o.size());
    good &=
        std::equal(own_states.begin(), own_states.end(), states.begin() + n * own_states.size());
  }
  return report("alone and in a batch", good, "equal bits");
}

bool check_refusals() {
  Case c{"refusals", {2, 1, 1, 1, 128, 128, 0}};
  const Operands x(c);
  Launch launch(c, x);
  auto refused = [&](auto change, const char* word) {
    StepParams params = launch.params;
    change(params);
    const Status status = step(params, nullptr);
    const bool told = !status.ok() && status.message.find(word) != std::string::npos;
    if (!told) std::printf("  no refusal that names %s: '%s'\n", word, status.message.c_str());
    return told;
  };
  bool good = refused([](StepParams& p) { p.shape.T = 9; }, "T is 9");
  good &= refused([](StepParams& p) { p.shape.K = 96; }, "K = 96");
  good &= refused([](StepParams& p) { p.state_dtype = DType::kF16; }, "state is f16");
  good &= refused([](StepParams& p) { p.shape.slots = 1; }, "slots is 1");
  good &= refused([](StepParams& p) { p.state = static_cast<char*>(p.state) + 4; },
                  "state is not aligned");
  good &= launch.run(0xFF);  // the next valid call works
  return report("refusals", good, "told");
}

std::vector<Case> cases(bool quick) {
  const int64_t HV = quick ? 2 : 32;
  std::vector<Case> list;
  auto add = [&](const char* name, StepShape shape) -> Case& {
    list.push_back({name, shape});
    return list.back();
  };
  for (int64_t T : {1, 2, 3, 4, 5, 8})
    add("softplus", {2, T, HV, HV, 128, 128, 0}).name += ", T " + std::to_string(T);
  add("bounded", {3, 2, HV / 2, HV, 128, 128, 0}).gate = Gate::kBounded;
  Case& log_decay = add("log decay, no norms", {3, 2, HV, HV, 128, 128, 0});
  log_decay.gate = Gate::kLogDecay, log_decay.raw = false;
  add("beta up to 2", {3, 2, HV, HV, 128, 128, 0}).neg = true;
  add("head dim 64", {3, 3, HV, HV, 64, 64, 0});
  add("bf16 state", {3, 3, HV, HV, 128, 128, 0}).state = DType::kBF16;
  add("bf16 state, one token", {3, 1, HV, HV, 128, 128, 0}).state = DType::kBF16;
  add("bf16 state, one token, head dim 64", {3, 1, HV, HV, 64, 64, 0}).state = DType::kBF16;
  add("bf16 state, head dim 64", {3, 3, HV, HV, 64, 64, 0}).state = DType::kBF16;
  add("f16 tokens", {3, 2, HV, HV, 128, 128, 0}).tokens = DType::kF16;
  Case& full = add("f32 tokens", {3, 8, HV, HV, 128, 128, 0});
  full.tokens = full.gates = DType::kF32;
  Case& full64 = add("f32 tokens, head dim 64", {3, 2, HV, HV, 64, 64, 0});
  full64.tokens = full64.gates = DType::kF32;
  add("f32 gates", {3, 1, HV, HV, 128, 128, 0}).gates = DType::kF32;
  add("no token states", {3, 2, HV, HV, 128, 128, 0}).token_states = false;
  add("parameters of each sequence", {3, 1, HV, HV, 128, 128, 0}).parameters_per_sequence = true;
  add("pool", {3, 2, HV, HV, 128, 128, 7}).indices = {6, 0, 3};
  add("pool, missing slots", {6, 2, HV, HV, 128, 128, 4}).indices = {2, -1, 4, INT_MIN, INT_MAX, 0};
  Case& pool = add("bf16 pool, missing slots", {4, 3, HV, HV, 64, 64, 3});
  pool.state = DType::kBF16, pool.indices = {-7, 2, 3, 0};
  Case& one = add("bf16 pool, one token, missing slots", {6, 1, HV / 2, HV, 128, 128, 4});
  one.state = DType::kBF16, one.indices = {2, -1, 4, INT_MIN, INT_MAX, 0};
  Case& own = add("bf16 state, one token, own parameters", {3, 1, HV, HV, 128, 128, 0});
  own.state = DType::kBF16, own.tokens = own.gates = DType::kF32;
  own.parameters_per_sequence = true, own.token_states = false;
  add("nobody has a slot", {2, 2, HV, HV, 128, 128, 1}).indices = {-1, 1};
  return list;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  int failures = 0, count = 0;
  auto tally = [&](bool good) { ++count, failures += good ? 0 : 1; };
  for (const Case& c : cases(quick)) tally(check(c));
  for (auto [state, T] : {std::pair{DType::kF32, 2}, {DType::kBF16, 1}}) {
    tally(check_named_twice(state, T));
    tally(check_batch(state, T));
  }
  tally(check_divisions());
  tally(check_refusals());
  std::printf("%d of %d passed\n", count - failures, count);
  return failures == 0 ? 0 : 1;
}
