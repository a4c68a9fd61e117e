// The gradient stage's formulas in float64, on the CPU, chunk by chunk. What the scans would hand
// it (states, state gradients, U, dR) is any data. Shares no code with the kernels.
#pragma once

#include "oracle.h"
#include "sm90/chunk_gradient/config.h"

namespace oracle {

// What the stage reads beside the call.
struct ScanResults {
  std::vector<float> d_o, d_r, u;              // [B, T, HV, V]
  std::vector<float> states, state_gradients;  // [B, HV, boundary slots, V, K]
  std::vector<float> d_final_state;            // [B, N, HV, K, V] or empty: zero
};

struct Gradients {
  std::vector<double> dq, dk, dg, d_beta;           // dq and dk [B, T, H, K]
  std::vector<double> dA_log, d_dt_bias;            // [B, HV], [B, HV, K]
  std::vector<double> dA_log_size, d_dt_bias_size;  // sums of squares of their summands
};

struct ChunkRange {
  int64_t row, start, length, segment;  // segment -1: padding
  bool first, last;
};

inline std::vector<ChunkRange> chunks_of(const Call& c) {
  std::vector<ChunkRange> chunks;
  auto padding = [&](int64_t at) {
    return c.has_segment_ids &&
           (c.segment_ids[at] < 0 ||
            (c.has_padding_segment_id && c.segment_ids[at] == c.padding_segment_id));
  };
  for (int64_t b = 0; b < c.B; ++b) {
    int64_t ordinal = -1;
    for (int64_t t = 0; t < c.T;) {
      const bool pad = padding(b * c.T + t);
      int64_t end = t + 1;
      while (
          end < c.T && padding(b * c.T + end) == pad &&
          (pad || !c.has_segment_ids || c.segment_ids[b * c.T + end] == c.segment_ids[b * c.T + t]))
        ++end;
      if (!pad) ++ordinal;
      for (int64_t at = t; at < end; at += 64)
        chunks.push_back(
            {b, at, std::min<int64_t>(64, end - at), pad ? -1 : ordinal, at == t, at + 64 >= end});
      t = end;
    }
  }
  return chunks;
}

inline void chunk_gradient(const Call& c, const ScanResults& x, const ChunkRange& chunk, int64_t h,
                           Gradients& out) {
  constexpr int64_t K = Call::K, V = Call::V;
  const int64_t L = chunk.length, slots = (c.T + 63) / 64, row_head = chunk.row * c.HV + h;
  auto matrix = [](int64_t rows, int64_t columns) {
    return std::vector<double>(rows * columns, 0.0);
  };
  // Boundaries as [V][K].
  auto boundary = [&](bool inside, const std::vector<float>& images, int64_t slot,
                      const std::vector<float>& outer) {
    auto S = matrix(V, K);
    for (int64_t v = 0; v < V; ++v)
      for (int64_t k = 0; k < K; ++k) {
        if (inside)
          S[v * K + k] = images[((row_head * slots + slot) * V + v) * K + k];
        else if (!outer.empty() && chunk.segment < c.N)
          S[v * K + k] = outer[(((chunk.row * c.N + chunk.segment) * c.HV + h) * K + k) * V + v];
      }
    return S;
  };
  const auto S = boundary(!chunk.first, x.states, chunk.start / 64, c.initial_state);
  const auto dS = boundary(!chunk.last, x.state_gradients, chunk.start / 64 + 1, x.d_final_state);
  const double A_log = c.A_log.empty() ? 0.0 : c.A_log[row_head];
  auto q = matrix(L, K), k = matrix(L, K), G = matrix(L, K), decay = matrix(L, K);
  std::vector<double> fq(L), fk(L);
  auto beta_at = [&](int64_t i) { return (chunk.row * c.T + chunk.start + i) * c.HV + h; };
  auto beta_of = [&](int64_t i) {
    double beta = c.beta[beta_at(i)];
    if (c.beta_is_logits) beta = (c.allow_neg_eigval ? 2.0 : 1.0) / (1.0 + std::exp(-beta));
    return std::fabs(beta) < 0x1p-60 ? std::copysign(0x1p-60, beta) : beta;
  };
  auto qk_at = [&](int64_t i) {
    return ((chunk.row * c.T + chunk.start + i) * c.H + h / (c.HV / c.H)) * K;
  };
  auto v_at = [&](int64_t i) { return ((chunk.row * c.T + chunk.start + i) * c.HV + h) * K; };
  for (int64_t i = 0; i < L; ++i) {
    fq[i] = norm_factor(&c.q[qk_at(i)], c.qk_l2norm);
    fk[i] = norm_factor(&c.k[qk_at(i)], c.qk_l2norm);
    for (int64_t n = 0; n < K; ++n) {
      q[i * K + n] = fq[i] * c.q[qk_at(i) + n];
      k[i * K + n] = fk[i] * c.k[qk_at(i) + n];
      decay[i * K + n] = log_decay(c, c.g[v_at(i) + n], A_log,
                                   c.dt_bias.empty() ? 0.0 : c.dt_bias[row_head * K + n]);
      G[i * K + n] = (i > 0 ? G[(i - 1) * K + n] : 0.0) + std::max(decay[i * K + n], -110.0);
    }
  }
  // The few tokens of a chunk get d_beta of the recurrence itself, not of dR and U.
  auto few_d_beta = [&] {
    auto score = [&](const std::vector<double>& x, int64_t i, int64_t j) {
      double sum = 0.0;
      for (int64_t n = 0; n < K; ++n)
        sum += x[i * K + n] * std::exp(G[i * K + n] - G[j * K + n]) * k[j * K + n];
      return sum;
    };
    std::vector<double> d_beta(L), residual(L), du(L);
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t i = 0; i < L; ++i) {
        residual[i] = c.v[v_at(i) + v];
        for (int64_t n = 0; n < K; ++n)
          residual[i] -= k[i * K + n] * std::exp(G[i * K + n]) * S[v * K + n];
        for (int64_t j = 0; j < i; ++j) residual[i] -= score(k, i, j) * beta_of(j) * residual[j];
      }
      for (int64_t i = L - 1; i >= 0; --i) {
        du[i] = 0.0;
        for (int64_t n = 0; n < K; ++n)
          du[i] += k[i * K + n] * std::exp(G[(L - 1) * K + n] - G[i * K + n]) * dS[v * K + n];
        for (int64_t l = i; l < L; ++l) du[i] += c.scale * score(q, l, i) * x.d_o[v_at(l) + v];
        for (int64_t l = i + 1; l < L; ++l) du[i] -= score(k, l, i) * beta_of(l) * du[l];
        d_beta[i] += residual[i] * du[i];
      }
    }
    return d_beta;
  };
  const bool few = L <= jax_flashkda::chunk_gradient::Config::kFewTokens;
  const std::vector<double> of_few = few ? few_d_beta() : std::vector<double>(L);
  auto dA = matrix(L, L), dL = matrix(L, L);
  for (int64_t i = 0; i < L; ++i)
    for (int64_t j = 0; j <= i; ++j)
      for (int64_t v = 0; v < V; ++v) {
        dA[i * L + j] += c.scale * x.d_o[v_at(i) + v] * x.u[v_at(j) + v];
        if (j < i) dL[i * L + j] -= double(x.d_r[v_at(i) + v]) * x.u[v_at(j) + v];
      }
  auto dq = matrix(L, K), dk = matrix(L, K), dG = matrix(L, K), restored = matrix(L, K);
  std::vector<double> end(K, 0.0);
  for (int64_t n = 0; n < K; ++n) {
    for (int64_t v = 0; v < V; ++v)
      end[n] += std::exp(G[(L - 1) * K + n]) * S[v * K + n] * dS[v * K + n];
    for (int64_t i = 0; i < L; ++i) {
      double dq_d = 0.0, dk_d = 0.0, dk_r = 0.0;
      for (int64_t v = 0; v < V; ++v) {
        dq_d += c.scale * x.d_o[v_at(i) + v] * S[v * K + n];
        dk_d -= x.d_r[v_at(i) + v] * S[v * K + n];
        dk_r += x.u[v_at(i) + v] * dS[v * K + n];
      }
      const double down = std::exp(G[i * K + n]), up = std::exp(G[(L - 1) * K + n] - G[i * K + n]);
      dq[i * K + n] += down * dq_d;
      dk[i * K + n] += down * dk_d + up * dk_r;
      restored[i * K + n] = k[i * K + n] * up * dk_r;
      dG[i * K + n] += q[i * K + n] * down * dq_d + k[i * K + n] * down * dk_d;
      for (int64_t j = 0; j <= i; ++j) {
        const double e = std::exp(G[i * K + n] - G[j * K + n]);
        const double of_q = dA[i * L + j] * e, of_k = dL[i * L + j] * e;
        dq[i * K + n] += of_q * k[j * K + n];
        dk[i * K + n] += of_k * k[j * K + n];
        dk[j * K + n] += of_q * q[i * K + n] + of_k * k[i * K + n];
        const double pair = (of_q * q[i * K + n] + of_k * k[i * K + n]) * k[j * K + n];
        if (j == i) continue;  // knows no decay
        dG[i * K + n] += pair;
        dG[j * K + n] -= pair;
      }
    }
  }
  for (int64_t n = 0; n < K; ++n) {
    // Restored keys ahead of a token count for it: not as a difference of all and those behind it,
    // which would drown what decays fast.
    std::vector<double> ahead(L, end[n]);
    for (int64_t i = 1; i < L; ++i) ahead[i] = ahead[i - 1] + restored[(i - 1) * K + n];
    double behind = 0.0;
    for (int64_t i = L - 1; i >= 0; --i) {
      behind += dG[i * K + n];
      const double sum = behind + ahead[i];
      double d = decay[i * K + n] > -110.0 ? sum : 0.0, to_A = 0.0, factor = 1.0;
      const double raw = c.g[v_at(i) + n] + (c.dt_bias.empty() ? 0.0 : c.dt_bias[row_head * K + n]);
      if (c.gate == Gate::kSoftplus) {
        factor = -std::exp(A_log) / (1.0 + std::exp(-raw));
        to_A = d * decay[i * K + n];
      } else if (c.gate == Gate::kBounded) {
        const double s = 1.0 / (1.0 + std::exp(-std::exp(A_log) * raw));
        factor = c.gate_lower_bound * std::exp(A_log) * s * (1.0 - s);
        to_A = d * factor * raw;
      }
      d *= factor;
      out.dg[v_at(i) + n] = d;
      out.d_dt_bias[row_head * K + n] += d;
      out.d_dt_bias_size[row_head * K + n] += d * d;
      out.dA_log[row_head] += to_A;
      out.dA_log_size[row_head] += to_A * to_A;
    }
  }
  for (int64_t i = 0; i < L; ++i) {
    double q_dot = 0.0, k_dot = 0.0, d_beta = 0.0;
    for (int64_t n = 0; n < K; ++n) {
      q_dot += q[i * K + n] * dq[i * K + n];
      k_dot += k[i * K + n] * dk[i * K + n];
      d_beta += double(x.d_r[v_at(i) + n]) * x.u[v_at(i) + n];
    }
    if (!c.qk_l2norm) q_dot = k_dot = 0.0;
    for (int64_t n = 0; n < K; ++n) {
      out.dq[qk_at(i) + n] += fq[i] * (dq[i * K + n] - q[i * K + n] * q_dot);
      out.dk[qk_at(i) + n] += fk[i] * (dk[i * K + n] - k[i * K + n] * k_dot);
    }
    const double beta = beta_of(i), top = c.allow_neg_eigval ? 2.0 : 1.0;
    const double slope = c.beta_is_logits ? beta * (1.0 - beta / top) : 1.0;
    out.d_beta[beta_at(i)] = (few ? of_few[i] : d_beta / (beta * beta)) * slope;
  }
}

inline Gradients gradients(const Call& c, const ScanResults& x) {
  Gradients out;
  out.dq.assign(c.B * c.T * c.H * Call::K, 0.0);
  out.dk = out.dq;
  out.dg.assign(c.B * c.T * c.HV * Call::K, 0.0);
  out.d_beta.assign(c.B * c.T * c.HV, 0.0);
  out.dA_log.assign(c.B * c.HV, 0.0);
  out.d_dt_bias.assign(c.B * c.HV * Call::K, 0.0);
  out.dA_log_size = out.dA_log;
  out.d_dt_bias_size = out.d_dt_bias;
  const auto chunks = chunks_of(c);
  const int64_t group = c.HV / c.H;
  std::vector<std::thread> threads;
  const int workers = std::max(1u, std::thread::hardware_concurrency());
  for (int worker = 0; worker < workers; ++worker)  // a query head's sums belong to one thread
    threads.emplace_back([&, worker] {
      for (int64_t h = worker; h < c.H; h += workers)
        for (int64_t head = h * group; head < (h + 1) * group; ++head)
          for (const ChunkRange& chunk : chunks)
            if (chunk.segment >= 0) chunk_gradient(c, x, chunk, head, out);
    });
  for (auto& thread : threads) thread.join();
  return out;
}

}  // namespace oracle
