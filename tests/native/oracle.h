// The definition, token by token, in float64, on the CPU. Shares no code with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace oracle {

enum class Gate { kLogDecay, kSoftplus, kBounded };

struct Call {
  int64_t B, T, H, HV, N;
  static constexpr int64_t K = 128, V = 128;
  Gate gate = Gate::kLogDecay;
  double gate_lower_bound = -5.0;
  bool beta_is_logits = false, allow_neg_eigval = false, qk_l2norm = false;
  double scale = 1.0;
  bool has_segment_ids = false, has_padding_segment_id = false;
  int32_t padding_segment_id = 0;
  // Already rounded to the types of the call. Empty: absent.
  std::vector<float> q, k, v, g, beta, A_log, dt_bias, initial_state;
  std::vector<int32_t> segment_ids;
};

struct Result {
  std::vector<double> o, final_state;
};

inline double log_decay(const Call& c, double g, double A_log, double dt_bias) {
  if (c.gate == Gate::kSoftplus) {
    const double x = g + dt_bias;
    return -std::exp(A_log) * (std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))));
  }
  if (c.gate == Gate::kBounded)
    return c.gate_lower_bound / (1.0 + std::exp(-std::exp(A_log) * (g + dt_bias)));
  return g;
}

inline double norm_factor(const float* x, bool enabled) {
  if (!enabled) return 1.0;
  double squares = 0.0;
  for (int64_t c = 0; c < Call::K; ++c) squares += double(x[c]) * x[c];
  return 1.0 / std::sqrt(squares + 1e-6);
}

// One head of one row.
inline void recurrence(const Call& c, int64_t b, int64_t h, Result& result) {
  constexpr int64_t K = Call::K, V = Call::V;
  std::vector<double> S(K * V, 0.0), read(V);
  auto padding = [&](int32_t id) {
    return id < 0 || (c.has_padding_segment_id && id == c.padding_segment_id);
  };
  auto state = [&](int64_t n) { return ((b * c.N + n) * c.HV + h) * K * V; };
  int64_t segment = -1;
  auto keep = [&] {
    if (segment >= 0 && segment < c.N)
      for (int64_t i = 0; i < K * V; ++i) result.final_state[state(segment) + i] = S[i];
  };
  bool inside = false;
  for (int64_t t = 0; t < c.T; ++t) {
    const int32_t id = c.has_segment_ids ? c.segment_ids[b * c.T + t] : 1;
    const bool pad = c.has_segment_ids && padding(id);
    const bool starts =
        !pad && (!inside || (c.has_segment_ids && id != c.segment_ids[b * c.T + t - 1]));
    if ((pad || starts) && inside) keep();
    inside = !pad;
    if (pad) continue;  // the output stays zero
    if (starts) {
      ++segment;
      for (int64_t i = 0; i < K * V; ++i)
        S[i] =
            segment < c.N && !c.initial_state.empty() ? c.initial_state[state(segment) + i] : 0.0;
    }
    const float* q = &c.q[((b * c.T + t) * c.H + h / (c.HV / c.H)) * K];
    const float* k = &c.k[((b * c.T + t) * c.H + h / (c.HV / c.H)) * K];
    const float* v = &c.v[((b * c.T + t) * c.HV + h) * V];
    const float* g = &c.g[((b * c.T + t) * c.HV + h) * K];
    double beta = c.beta[(b * c.T + t) * c.HV + h];
    if (c.beta_is_logits) beta = (c.allow_neg_eigval ? 2.0 : 1.0) / (1.0 + std::exp(-beta));
    const double q_factor = norm_factor(q, c.qk_l2norm) * c.scale,
                 k_factor = norm_factor(k, c.qk_l2norm);
    std::fill(read.begin(), read.end(), 0.0);
    for (int64_t i = 0; i < K; ++i) {
      const double decay =
          std::exp(log_decay(c, g[i], c.A_log.empty() ? 0.0 : c.A_log[b * c.HV + h],
                             c.dt_bias.empty() ? 0.0 : c.dt_bias[(b * c.HV + h) * K + i]));
      for (int64_t j = 0; j < V; ++j) {
        S[i * V + j] *= decay;
        read[j] += S[i * V + j] * k[i] * k_factor;
      }
    }
    for (int64_t j = 0; j < V; ++j) read[j] = beta * (v[j] - read[j]);
    double* o = &result.o[((b * c.T + t) * c.HV + h) * V];
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < V; ++j) {
        S[i * V + j] += k[i] * k_factor * read[j];
        o[j] += q_factor * q[i] * S[i * V + j];
      }
  }
  if (inside) keep();
  if (!c.has_segment_ids && c.T == 0) segment = -1;
  for (int64_t n = segment + 1; n < c.N; ++n)
    for (int64_t i = 0; i < K * V; ++i)
      result.final_state[state(n) + i] =
          c.initial_state.empty() ? 0.0 : c.initial_state[state(n) + i];
}

// On all cores, or on so many.
inline Result forward(const Call& c, int workers = 0) {
  Result result;
  result.o.assign(c.B * c.T * c.HV * Call::V, 0.0);
  result.final_state.assign(c.B * c.N * c.HV * Call::K * Call::V, 0.0);
  const int64_t heads = c.B * c.HV;
  if (workers == 0) workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] {
      for (int64_t i = worker; i < heads; i += workers) recurrence(c, i / c.HV, i % c.HV, result);
    });
  for (auto& thread : threads) thread.join();
  return result;
}

}  // namespace oracle
