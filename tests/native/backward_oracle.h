// The gradients by definition: the recurrence of oracle.h walked back token by token, in float64, on
// the CPU. Shares no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "oracle.h"

namespace oracle {

struct Cotangents {
  std::vector<float> d_o, d_final_state;  // already rounded; the second empty: zero
};

struct Gradients {
  std::vector<double> dq, dk, dv, dg, d_beta, dA_log, d_dt_bias, d_initial_state;
  std::vector<double> dA_log_size, d_dt_bias_size;  // roots of the sums of their summands' squares
  // What the kernels keep on the way. Between tokens t - 1 and t of one segment, every 64 tokens
  // from its start: the state and its gradient, in slot t / 64.
  std::vector<double> corrected_values;         // [B, T, HV, V]
  std::vector<double> states, state_gradients;  // [B, HV, ceil(T / 64), K, V]
  std::vector<char> is_boundary;                // [B, ceil(T / 64)]
};

struct Run {
  int64_t start, length, slot;
};

inline std::vector<Run> runs(const Call& c, int64_t b) {
  if (!c.has_segment_ids) return c.T > 0 ? std::vector<Run>{{0, c.T, 0}} : std::vector<Run>{};
  std::vector<Run> found;
  auto id = [&](int64_t t) { return c.segment_ids[b * c.T + t]; };
  for (int64_t start = 0, t = 1; t <= c.T; ++t) {
    if (t < c.T && id(t) == id(start)) continue;
    const bool padding =
        id(start) < 0 || (c.has_padding_segment_id && id(start) == c.padding_segment_id);
    if (!padding) found.push_back({start, t - start, int64_t(found.size())});
    start = t;
  }
  return found;
}

inline int64_t most_segments(const Call& c) {
  size_t most = 0;
  for (int64_t b = 0; b < c.B; ++b) most = std::max(most, runs(c, b).size());
  return int64_t(most);
}

// One head of one row.
class HeadGradient {
 public:
  HeadGradient(const Call& call, const Cotangents& cotangents, int64_t row, int64_t head,
               Gradients& gradients)
      : c(call), d(cotangents), b(row), h(head), out(gradients) {}

  void run() {
    int64_t slots_used = 0;
    for (const Run& segment : runs(c, b)) {
      walk(segment);
      ++slots_used;
    }
    for (int64_t n = slots_used; n < c.N; ++n)
      for (int64_t i = 0; i < K * V; ++i)
        out.d_initial_state[state(n) + i] =
            d.d_final_state.empty() ? 0.0 : d.d_final_state[state(n) + i];
  }

 private:
  static constexpr int64_t K = Call::K, V = Call::V, kBlock = 64;
  using State = std::vector<double>;

  struct Token {
    std::vector<double> q, k, decay, decayed, error;  // decayed: the state behind the decay
    double q_factor, k_factor, beta;
  };

  int64_t state(int64_t n) const { return ((b * c.N + n) * c.HV + h) * K * V; }
  int64_t query_row(int64_t t) const { return (b * c.T + t) * c.H + h / (c.HV / c.H); }
  int64_t value_row(int64_t t) const { return (b * c.T + t) * c.HV + h; }
  double A_log() const { return c.A_log.empty() ? 0.0 : c.A_log[b * c.HV + h]; }
  double dt_bias(int64_t i) const {
    return c.dt_bias.empty() ? 0.0 : c.dt_bias[(b * c.HV + h) * K + i];
  }

  // S becomes the state behind token t.
  Token step(State& S, int64_t t) {
    Token x;
    const float *q = &c.q[query_row(t) * K], *k = &c.k[query_row(t) * K];
    const float *v = &c.v[value_row(t) * V], *g = &c.g[value_row(t) * K];
    x.q_factor = norm_factor(q, c.qk_l2norm), x.k_factor = norm_factor(k, c.qk_l2norm);
    x.beta = c.beta[value_row(t)];
    if (c.beta_is_logits) x.beta = (c.allow_neg_eigval ? 2.0 : 1.0) / (1.0 + std::exp(-x.beta));
    x.error.assign(v, v + V);
    for (int64_t i = 0; i < K; ++i) {
      x.q.push_back(q[i] * x.q_factor);
      x.k.push_back(k[i] * x.k_factor);
      x.decay.push_back(std::exp(log_decay(c, g[i], A_log(), dt_bias(i))));
      for (int64_t j = 0; j < V; ++j) {
        S[i * V + j] *= x.decay[i];
        x.error[j] -= S[i * V + j] * x.k[i];
      }
    }
    x.decayed = S;
    double* u = &out.corrected_values[value_row(t) * V];
    for (int64_t j = 0; j < V; ++j) u[j] = x.beta * x.error[j];
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < V; ++j) S[i * V + j] += x.k[i] * u[j];
    return x;
  }

  // Of the gate's g and bias; what comes back is the channel's part of the gradient of A_log.
  double gate_gradient(int64_t t, int64_t i, double d_log_decay) {
    const double x = c.g[value_row(t) * K + i] + dt_bias(i), amplitude = std::exp(A_log());
    double d_raw = d_log_decay, d_amplitude = 0.0;
    if (c.gate == Gate::kSoftplus) {
      d_raw = -amplitude / (1.0 + std::exp(-x)) * d_log_decay;
      d_amplitude = log_decay(c, c.g[value_row(t) * K + i], A_log(), dt_bias(i)) * d_log_decay;
    }
    if (c.gate == Gate::kBounded) {
      const double slope =  // sigmoid (1 - sigmoid), neither of them a difference
          1.0 / (1.0 + std::exp(-amplitude * x)) / (1.0 + std::exp(amplitude * x));
      const double d_argument = c.gate_lower_bound * slope * d_log_decay;
      d_raw = amplitude * d_argument;
      d_amplitude = amplitude * x * d_argument;
    }
    out.dg[value_row(t) * K + i] = d_raw;
    add(out.d_dt_bias, out.d_dt_bias_size, (b * c.HV + h) * K + i, d_raw);
    return d_amplitude;
  }

  // A token's summand.
  static void add(std::vector<double>& sums, std::vector<double>& sizes, int64_t at, double x) {
    if (sums.empty()) return;
    sums[at] += x;
    sizes[at] = std::sqrt(sizes[at] * sizes[at] + x * x);
  }

  // Gradients of a token's q and k, [B, T, HV, K]: summed over heads that share a row afterwards.
  static void unnormalise(double* dx, const std::vector<double>& dn, const std::vector<double>& n,
                          double factor, bool enabled) {
    double along = 0.0;
    for (int64_t i = 0; i < K; ++i) along += enabled ? n[i] * dn[i] : 0.0;
    for (int64_t i = 0; i < K; ++i) dx[i] = factor * (dn[i] - n[i] * along);
  }

  // dS becomes the gradient of the state ahead of token t.
  void step_back(State& dS, const Token& x, int64_t t) {
    const float* d_o = &d.d_o[value_row(t) * V];
    std::vector<double> dq(K), dk(K), du(V, 0.0), u(V);
    for (int64_t j = 0; j < V; ++j) u[j] = x.beta * x.error[j];
    for (int64_t i = 0; i < K; ++i) {
      double* row = &dS[i * V];
      const double* S = &x.decayed[i * V];
      for (int64_t j = 0; j < V; ++j) {
        row[j] += c.scale * x.q[i] * d_o[j];
        dq[i] += c.scale * (S[j] + x.k[i] * u[j]) * d_o[j];
        dk[i] += row[j] * u[j];
        du[j] += x.k[i] * row[j];
      }
    }
    double d_beta = 0.0;
    for (int64_t j = 0; j < V; ++j) {
      d_beta += du[j] * x.error[j];
      out.dv[value_row(t) * V + j] = x.beta * du[j];
    }
    const double* dv = &out.dv[value_row(t) * V];
    double d_amplitude = 0.0;
    for (int64_t i = 0; i < K; ++i) {
      double d_log_decay = 0.0;
      double* row = &dS[i * V];
      const double* S = &x.decayed[i * V];
      for (int64_t j = 0; j < V; ++j) {
        dk[i] -= S[j] * dv[j];
        row[j] -= x.k[i] * dv[j];
        d_log_decay += row[j] * S[j];
        row[j] *= x.decay[i];
      }
      d_amplitude += gate_gradient(t, i, d_log_decay);
    }
    add(out.dA_log, out.dA_log_size, b * c.HV + h, d_amplitude);
    if (c.beta_is_logits) d_beta *= x.beta * (1.0 - x.beta / (c.allow_neg_eigval ? 2.0 : 1.0));
    out.d_beta[value_row(t)] = d_beta;
    unnormalise(&out.dq[value_row(t) * K], dq, x.q, x.q_factor, c.qk_l2norm);
    unnormalise(&out.dk[value_row(t) * K], dk, x.k, x.k_factor, c.qk_l2norm);
  }

  void keep(std::vector<double>& images, const State& S, int64_t t) const {
    const int64_t slots = (c.T + kBlock - 1) / kBlock;
    std::copy(S.begin(), S.end(), images.begin() + ((b * c.HV + h) * slots + t / kBlock) * K * V);
    if (h == 0) out.is_boundary[b * slots + t / kBlock] = 1;
  }

  void walk(const Run& segment) {
    State S(K * V, 0.0), dS(K * V, 0.0);
    const bool slot = segment.slot < c.N;
    if (slot && !c.initial_state.empty())
      std::copy_n(c.initial_state.begin() + state(segment.slot), K * V, S.begin());
    if (slot && !d.d_final_state.empty())
      std::copy_n(d.d_final_state.begin() + state(segment.slot), K * V, dS.begin());
    std::vector<State> block_starts;
    for (int64_t n = 0; n < segment.length; ++n) {
      if (n % kBlock == 0) block_starts.push_back(S);
      step(S, segment.start + n);
    }
    for (int64_t block = int64_t(block_starts.size()) - 1; block >= 0; --block) {
      const int64_t first = segment.start + block * kBlock,
                    end = std::min(first + kBlock, segment.start + segment.length);
      if (block > 0) keep(out.states, block_starts[block], first);
      std::vector<Token> tokens;
      for (int64_t t = first; t < end; ++t) tokens.push_back(step(block_starts[block], t));
      for (int64_t t = end - 1; t >= first; --t) step_back(dS, tokens[t - first], t);
      if (block > 0) keep(out.state_gradients, dS, first);
    }
    if (slot) std::copy(dS.begin(), dS.end(), out.d_initial_state.begin() + state(segment.slot));
  }

  const Call& c;
  const Cotangents& d;
  const int64_t b, h;
  Gradients& out;
};

// [B, T, HV, K] to [B, T, H, K].
inline std::vector<double> sum_over_groups(const Call& c, const std::vector<double>& heads) {
  std::vector<double> sum(c.B * c.T * c.H * Call::K, 0.0);
  for (size_t i = 0; i < heads.size(); ++i) {
    const int64_t row = int64_t(i) / Call::K, token = row / c.HV, head = row % c.HV;
    sum[(token * c.H + head / (c.HV / c.H)) * Call::K + i % Call::K] += heads[i];
  }
  return sum;
}

// On all cores, or on so many.
inline Gradients backward(const Call& c, const Cotangents& d, int workers = 0) {
  constexpr int64_t K = Call::K, V = Call::V;
  Gradients out;
  const int64_t head_tokens = c.B * c.T * c.HV, slots = (c.T + 63) / 64;
  for (auto* x : {&out.dq, &out.dk, &out.dg}) x->assign(head_tokens * K, 0.0);
  for (auto* x : {&out.dv, &out.corrected_values}) x->assign(head_tokens * V, 0.0);
  out.d_beta.assign(head_tokens, 0.0);
  out.dA_log.assign(c.A_log.size(), 0.0);
  out.d_dt_bias.assign(c.dt_bias.size(), 0.0);
  out.dA_log_size = out.dA_log, out.d_dt_bias_size = out.d_dt_bias;
  out.d_initial_state.assign(c.B * c.N * c.HV * K * V, 0.0);
  for (auto* x : {&out.states, &out.state_gradients}) x->assign(c.B * c.HV * slots * K * V, 0.0);
  out.is_boundary.assign(c.B * slots, 0);
  const int64_t heads = c.B * c.HV;
  if (workers == 0) workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] {
      for (int64_t i = worker; i < heads; i += workers)
        HeadGradient(c, d, i / c.HV, i % c.HV, out).run();
    });
  for (auto& thread : threads) thread.join();
  out.dq = sum_over_groups(c, out.dq);
  out.dk = sum_over_groups(c, out.dk);
  return out;
}

}  // namespace oracle
