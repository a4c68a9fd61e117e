// The peer of the accuracy promise: `chunked` of jax_flashkda/reference.py, and its gradients as
// autodiff makes them, on the CPU. fp32, with the operands of every product rounded to bf16 where
// the reference rounds them. Roundings pass cotangents through, cotangents stay fp32, and the
// gradient of an exponent is of the rounded product. Shares no code with the kernels.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "backward_oracle.h"
#include "bf16.h"
#include "oracle.h"

namespace oracle {

// What the peer computes with.
struct Bf16Operands {
  using Real = float;
  static float rounded(float x) { return round_bf16(x); }
  // XLA computes without subnormal numbers.
  static float flushed(float x) { return std::fabs(x) < FLT_MIN ? 0.0f : x; }
};
// Without rounding the chunked form is the recurrence.
struct ExactOperands {
  using Real = double;
  static double rounded(double x) { return x; }
  static double flushed(double x) { return x; }
};

template <class Real>
struct Matrix {
  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), data(r * c, Real(0)) {}
  Real* operator[](int64_t i) { return data.data() + i * columns; }
  const Real* operator[](int64_t i) const { return data.data() + i * columns; }

  int64_t rows = 0, columns = 0;
  std::vector<Real> data;
};

template <class Real>
Matrix<Real> product(const Matrix<Real>& a, const Matrix<Real>& b) {
  Matrix<Real> out(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t m = 0; m < a.columns; ++m) {
      const Real factor = a[i][m];
      for (int64_t j = 0; j < b.columns; ++j) out[i][j] += factor * b[m][j];
    }
  return out;
}

template <class Real>
Matrix<Real> transposed(const Matrix<Real>& a) {
  Matrix<Real> out(a.columns, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.columns; ++j) out[j][i] = a[i][j];
  return out;
}

// Adds b, `times` over, to the rows of a from `row`.
template <class Real>
void add(Matrix<Real>& a, const Matrix<Real>& b, Real times = 1, int64_t row = 0) {
  for (int64_t i = 0; i < b.rows; ++i)
    for (int64_t j = 0; j < b.columns; ++j) a[row + i][j] += times * b[i][j];
}

template <class Real>
Matrix<Real> part(const Matrix<Real>& a, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) {
  Matrix<Real> out(rows, columns);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(a[row + i] + column, columns, out[i]);
  return out;
}

template <class Real>
void place(Matrix<Real>& a, int64_t row, int64_t column, const Matrix<Real>& b) {
  for (int64_t i = 0; i < b.rows; ++i) std::copy_n(b[i], b.columns, a[row + i] + column);
}

template <class Real>
void keep_lower(Matrix<Real>& a, bool diagonal) {
  for (int64_t i = 0; i < a.rows; ++i)
    std::fill(a[i] + std::min(i + (diagonal ? 1 : 0), a.columns), a[i] + a.columns, Real(0));
}

// Sums of rows in blocks of rows: of all up to each or, from the end, of all from each; with or
// without itself.
template <class Real>
Matrix<Real> running_sums(const Matrix<Real>& x, int64_t block, bool from_end, bool with_own) {
  Matrix<Real> out(x.rows, x.columns);
  for (int64_t n = 0; n < x.rows; ++n) {
    const int64_t i = from_end ? x.rows - 1 - n : n, before = from_end ? i + 1 : i - 1;
    const bool has_before = before >= 0 && before < x.rows && before / block == i / block;
    for (int64_t j = 0; j < x.columns; ++j) {
      if (has_before) out[i][j] = out[before][j] + (with_own ? Real(0) : x[before][j]);
      if (with_own) out[i][j] += x[i][j];
    }
  }
  return out;
}

// Up to 64 tokens of one head behind the transforms of the inputs, and then their gradients.
template <class Operands>
class Chunk {
 public:
  using Real = typename Operands::Real;
  using M = Matrix<Real>;
  static constexpr int64_t K = Call::K, V = Call::V, kSize = 64, kSubBlock = 16;

  explicit Chunk(int64_t length)
      : q(length, K), k(length, K), v(length, V), g(length, K), beta(length), L(length) {}

  M q, k, v, g;  // q scaled
  std::vector<Real> beta;
  M dq, dk, dv, dg;
  std::vector<Real> d_beta;

  // The output; S becomes the state behind the chunk.
  M forward(M& S) {
    G = running_sums(g, kSize, false, true);
    after = running_sums(g, kSize, true, false);
    state = S;
    s = rounded(S);
    scores();
    solve();
    decayed_q = Decayed(q, G), decayed_k = Decayed(k, G), restored_k = Decayed(k, after);
    error = v;
    add(error, product(decayed_k.value, s), Real(-1));
    residual = rounded(scaled_by_beta(error));
    U = rounded(product(rounded(inverse), residual));
    rounded_A_qk = rounded(A_qk);
    M o = product(decayed_q.value, s);
    add(o, product(rounded_A_qk, U));
    for (int64_t i = 0; i < K; ++i) {
      const Real decay = decay_of(G[L - 1][i]);
      for (int64_t j = 0; j < V; ++j) S[i][j] *= decay;
    }
    add(S, product(transposed(restored_k.value), U));
    return o;
  }

  // dS becomes the gradient of the state ahead of the chunk.
  void backward(const M& d_o, M& dS) {
    dq = M(L, K), dk = M(L, K), dg = M(L, K), d_beta.assign(L, Real(0));
    dG = M(L, K), d_after = M(L, K), d_sub_G = M(L, K), d_sub_after = M(L, K);
    M dU = product(transposed(rounded_A_qk), d_o);
    add(dU, product(restored_k.value, dS));
    restored_k.pull_back(product(U, transposed(dS)), dk, d_after);
    decayed_q.pull_back(product(d_o, transposed(s)), dq, dG);

    const M d_error = solve_back(dU);
    M d_decayed_k(L, K);
    add(d_decayed_k, product(d_error, transposed(s)), Real(-1));
    decayed_k.pull_back(d_decayed_k, dk, dG);

    M dA_qk = product(d_o, transposed(U));
    keep_lower(dA_qk, /*diagonal=*/true);
    scores_back(dA_qk, dA_kk);
    state_back(d_o, d_error, dS);
    for (const auto& [d, block] : {std::pair{&dG, kSize}, {&d_sub_G, kSubBlock}})
      add(dg, running_sums(*d, block, true, true));
    for (const auto& [d, block] : {std::pair{&d_after, kSize}, {&d_sub_after, kSubBlock}})
      add(dg, running_sums(*d, block, false, false));
  }

 private:
  static M rounded(M x) {
    for (Real& value : x.data) value = Operands::rounded(Operands::flushed(value));
    return x;
  }
  static Real decay_of(Real exponent) { return Operands::flushed(std::exp(exponent)); }

  // x exp(exponent), rounded.
  struct Decayed {
    Decayed() = default;
    Decayed(const M& x, const M& exponent) : decay(exponent), value(x) {
      for (size_t i = 0; i < x.data.size(); ++i) {
        decay.data[i] = decay_of(exponent.data[i]);
        value.data[i] *= decay.data[i];
      }
      value = rounded(std::move(value));
    }
    // Adds to the rows from `row` of the gradients of x and exponent.
    void pull_back(const M& d, M& dx, M& d_exponent, int64_t row = 0) const {
      for (int64_t i = 0; i < d.rows; ++i)
        for (int64_t j = 0; j < d.columns; ++j) {
          dx[row + i][j] += d[i][j] * decay[i][j];
          d_exponent[row + i][j] += d[i][j] * value[i][j];
        }
    }
    M decay, value;
  };

  M scaled_by_beta(M x) const {
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < x.columns; ++j) x[i][j] *= beta[i];
    return x;
  }

  int64_t rows_from(int64_t first) const { return std::min(kSubBlock, L - first); }
  M block(const M& x, int64_t first) const { return part(x, first, rows_from(first), 0, K); }

  // From the keys of the sub-block at `column` to the start of that at `row`.
  M exponents_between(int64_t column, int64_t row) const {
    M between = block(sub_after, column);
    for (int64_t other = column + kSubBlock; other < row; other += kSubBlock)
      for (int64_t i = 0; i < between.rows; ++i)
        for (int64_t n = 0; n < K; ++n) between[i][n] += sub_G[other + kSubBlock - 1][n];
    return between;
  }

  void scores() {
    sub_G = running_sums(g, kSubBlock, false, true);
    sub_after = running_sums(g, kSubBlock, true, false);
    rounded_q = rounded(q), rounded_k = rounded(k);
    A_qk = M(L, L), A_kk = M(L, L);
    for (int64_t row = 0; row < L; row += kSubBlock) {
      rows_q.emplace_back(block(q, row), block(sub_G, row));
      rows_k.emplace_back(block(k, row), block(sub_G, row));
      for (int64_t column = 0; column < row; column += kSubBlock) {
        columns.emplace_back(block(k, column), exponents_between(column, row));
        const M keys = transposed(columns.back().value);
        place(A_qk, row, column, product(rows_q.back().value, keys));
        place(A_kk, row, column, product(rows_k.back().value, keys));
      }
      for_each_pair(row, [&](int64_t i, int64_t j, int64_t n, Real pair) {
        A_qk[i][j] += rounded_q[i][n] * rounded_k[j][n] * pair;
        if (j < i) A_kk[i][j] += rounded_k[i][n] * rounded_k[j][n] * pair;
      });
    }
  }

  // Pairs i >= j of the sub-block at `row`, channel by channel, with the decay between them.
  template <class Visit>
  void for_each_pair(int64_t row, Visit visit) const {
    for (int64_t i = row; i < row + rows_from(row); ++i)
      for (int64_t j = row; j <= i; ++j)
        for (int64_t n = 0; n < K; ++n) visit(i, j, n, decay_of(sub_G[i][n] - sub_G[j][n]));
  }

  void scores_back(const M& d_qk, const M& d_kk) {
    size_t at = 0;
    for (int64_t row = 0; row < L; row += kSubBlock) {
      const Decayed &q_rows = rows_q[row / kSubBlock], &k_rows = rows_k[row / kSubBlock];
      for (int64_t column = 0; column < row; column += kSubBlock, ++at) {
        const Decayed& keys = columns[at];
        const M of_q = part(d_qk, row, rows_from(row), column, kSubBlock),
                of_k = part(d_kk, row, rows_from(row), column, kSubBlock);
        q_rows.pull_back(product(of_q, keys.value), dq, d_sub_G, row);
        k_rows.pull_back(product(of_k, keys.value), dk, d_sub_G, row);
        M d_keys = product(transposed(of_q), q_rows.value);
        add(d_keys, product(transposed(of_k), k_rows.value));
        M d_between(L, K);
        keys.pull_back(d_keys, dk, d_between, column);
        add(d_sub_after, d_between);
        for (int64_t other = column + kSubBlock; other < row; other += kSubBlock)
          for (int64_t i = column; i < column + kSubBlock; ++i)
            for (int64_t n = 0; n < K; ++n) d_sub_G[other + kSubBlock - 1][n] += d_between[i][n];
      }
      diagonal_back(row, d_qk, d_kk);
    }
  }

  void diagonal_back(int64_t row, const M& d_qk, const M& d_kk) {
    // Of the exponents as rows and as columns: a pair with itself cancels as it does there.
    M as_row(L, K), as_column(L, K);
    for_each_pair(row, [&](int64_t i, int64_t j, int64_t n, Real pair) {
      const Real of_q = d_qk[i][j] * pair, of_k = d_kk[i][j] * pair;
      dq[i][n] += of_q * rounded_k[j][n];
      dk[i][n] += of_k * rounded_k[j][n];
      const Real d_column = of_q * rounded_q[i][n] + of_k * rounded_k[i][n];
      dk[j][n] += d_column;
      as_row[i][n] += d_column * rounded_k[j][n];
      as_column[j][n] += d_column * rounded_k[j][n];
    });
    add(d_sub_G, as_row);
    add(d_sub_G, as_column, Real(-1));
  }

  void solve() {
    scaled_A_kk = scaled_by_beta(A_kk);
    inverse = M(L, L);
    for (int64_t i = 0; i < L; ++i) {
      inverse[i][i] = 1;
      for (int64_t j = 0; j < i; ++j)
        for (int64_t n = 0; n <= j; ++n) inverse[i][n] -= scaled_A_kk[i][j] * inverse[j][n];
    }
  }

  // From dU the gradients of A_kk, beta and v; what comes back is that of v - k S.
  M solve_back(const M& dU) {
    const M d_residual = product(transposed(rounded(inverse)), dU);
    // Of (I + A)^-1 = X by A: -X^T dX X^T.
    M dA = product(product(dU, transposed(residual)), transposed(inverse));
    for (int64_t i = L - 1; i >= 0; --i)
      for (int64_t row = i + 1; row < L; ++row)
        for (int64_t j = 0; j < L; ++j) dA[i][j] -= scaled_A_kk[row][i] * dA[row][j];
    keep_lower(dA, /*diagonal=*/false);
    dA_kk = M(L, L);
    add(dA_kk, scaled_by_beta(dA), Real(-1));
    for (int64_t i = 0; i < L; ++i) {
      for (int64_t j = 0; j < i; ++j) d_beta[i] -= dA[i][j] * A_kk[i][j];
      for (int64_t j = 0; j < V; ++j) d_beta[i] += d_residual[i][j] * error[i][j];
    }
    return dv = scaled_by_beta(d_residual);
  }

  void state_back(const M& d_o, const M& d_error, M& dS) {
    for (int64_t i = 0; i < K; ++i) {
      const Real decay = decay_of(G[L - 1][i]);
      Real sum = 0;
      for (int64_t j = 0; j < V; ++j) {
        sum += state[i][j] * dS[i][j];
        dS[i][j] *= decay;
      }
      dG[L - 1][i] += sum * decay;
    }
    add(dS, product(transposed(decayed_q.value), d_o));
    add(dS, product(transposed(decayed_k.value), d_error), Real(-1));
  }

  const int64_t L;
  M G, after, sub_G, sub_after;  // sums of g in the chunk and in its sub-blocks
  M rounded_q, rounded_k;
  std::vector<Decayed> rows_q, rows_k, columns;  // a sub-block each; pairs of them in row order
  Decayed decayed_q, decayed_k, restored_k;
  M A_qk, A_kk, scaled_A_kk, inverse, rounded_A_qk, state, s, error, residual, U;
  M dG, d_after, d_sub_G, d_sub_after, dA_kk;
};

// One head of one row.
template <class Operands>
class ChunkedHead {
 public:
  ChunkedHead(const Call& call, const Cotangents* cotangents, int64_t row, int64_t head,
              Result& result, Gradients& gradients)
      : c(call), d(cotangents), b(row), h(head), out(result), gradient(gradients) {}

  void run() {
    int64_t slots_used = 0;
    for (const Run& segment : runs(c, b)) {
      walk(segment);
      ++slots_used;
    }
    for (int64_t n = slots_used; n < c.N; ++n) {
      put(out.final_state, n, outer_state(c.initial_state, n));
      if (d != nullptr) put(gradient.d_initial_state, n, outer_state(d->d_final_state, n));
    }
  }

 private:
  using Real = typename Operands::Real;
  using M = Matrix<Real>;
  static constexpr int64_t K = Call::K, V = Call::V, kSize = Chunk<Operands>::kSize;

  // A token's log decay, and its slopes in g (or dt_bias) and in A_log.
  struct GateValue {
    Real log_decay, slope = 1, slope_of_A_log = 0;
  };
  GateValue gate(int64_t t, int64_t i) const {
    GateValue y{Real(c.g[value_row(t) * K + i])};
    const Real amplitude = c.A_log.empty() ? Real(1) : std::exp(Real(c.A_log[b * c.HV + h]));
    const Real raw =
        y.log_decay + (c.dt_bias.empty() ? Real(0) : Real(c.dt_bias[(b * c.HV + h) * K + i]));
    if (c.gate == Gate::kSoftplus) {
      const Real softplus = std::max(raw, Real(0)) + std::log1p(std::exp(-std::fabs(raw)));
      y.log_decay = y.slope_of_A_log = -amplitude * softplus;
      y.slope = -amplitude * std::exp(raw - softplus);
    } else if (c.gate == Gate::kBounded) {
      const Real bound = Real(c.gate_lower_bound), sigmoid = logistic(amplitude * raw);
      y.log_decay = bound * sigmoid;
      y.slope = bound * (sigmoid * (1 - sigmoid)) * amplitude;
      y.slope_of_A_log = y.slope * raw;
    }
    if (!(y.log_decay > Real(-110))) y = {Real(-110), 0, 0};
    return y;
  }

  static Real logistic(Real x) { return 1 / (1 + std::exp(-x)); }
  Real factor_of_beta() const { return c.allow_neg_eigval ? 2 : 1; }

  // Rows of q or k, normalised: what multiplies them, and its derivative by the sum of squares.
  struct Norm {
    Real factor = 1, slope = 0;
  };
  Norm norm(const float* x) const {
    if (!c.qk_l2norm) return {};
    Real squares = 0;
    for (int64_t i = 0; i < K; ++i) squares += Real(x[i]) * Real(x[i]);
    squares += Real(1e-6);
    const Real factor = 1 / std::sqrt(squares);
    return {factor, Real(-0.5) * factor / squares};
  }

  int64_t query_row(int64_t t) const { return (b * c.T + t) * c.H + h / (c.HV / c.H); }
  int64_t value_row(int64_t t) const { return (b * c.T + t) * c.HV + h; }
  int64_t state(int64_t n) const { return ((b * c.N + n) * c.HV + h) * K * V; }

  // Slot n of states that may be absent; slots past the last are zero.
  M outer_state(const std::vector<float>& states, int64_t n) const {
    M S(K, V);
    if (n < c.N && !states.empty()) std::copy_n(states.begin() + state(n), K * V, S.data.begin());
    return S;
  }
  void put(std::vector<double>& states, int64_t n, const M& S) const {
    for (int64_t i = 0; n < c.N && i < K * V; ++i) states[state(n) + i] = S.data[i];
  }
  static void put_row(std::vector<double>& rows, int64_t row, const M& x, int64_t i) {
    std::copy_n(x[i], x.columns, &rows[row * x.columns]);
  }

  Chunk<Operands> prepared(int64_t first, int64_t length) const {
    Chunk<Operands> x(length);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t t = first + i;
      const float *q = &c.q[query_row(t) * K], *k = &c.k[query_row(t) * K];
      const Norm of_q = norm(q), of_k = norm(k);
      for (int64_t n = 0; n < K; ++n) {
        x.q[i][n] = q[n] * of_q.factor * Real(c.scale);
        x.k[i][n] = k[n] * of_k.factor;
        x.g[i][n] = gate(t, n).log_decay;
      }
      std::copy_n(&c.v[value_row(t) * V], V, x.v[i]);
      x.beta[i] = c.beta[value_row(t)];
      if (c.beta_is_logits) x.beta[i] = logistic(x.beta[i]) * factor_of_beta();
    }
    return x;
  }

  void unnormalise(std::vector<double>& gradients, int64_t t, const float* x, const Real* d_n,
                   Real scale) const {
    const Norm of = norm(x);
    Real along = 0;
    for (int64_t n = 0; n < K; ++n) along += x[n] * (d_n[n] * scale);
    for (int64_t n = 0; n < K; ++n)
      gradients[value_row(t) * K + n] =
          of.factor * (d_n[n] * scale) + 2 * x[n] * (of.slope * along);
  }

  // The gradients of the raw inputs from those of the prepared ones.
  void put_gradients(const Chunk<Operands>& x, int64_t first, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t t = first + i;
      unnormalise(gradient.dq, t, &c.q[query_row(t) * K], x.dq[i], Real(c.scale));
      unnormalise(gradient.dk, t, &c.k[query_row(t) * K], x.dk[i], 1);
      put_row(gradient.dv, value_row(t), x.dv, i);
      Real d_beta = x.d_beta[i];
      if (c.beta_is_logits) {
        const Real sigmoid = logistic(c.beta[value_row(t)]);
        d_beta *= factor_of_beta() * sigmoid * (1 - sigmoid);
      }
      gradient.d_beta[value_row(t)] = d_beta;
      for (int64_t n = 0; n < K; ++n) {
        const GateValue slopes = gate(t, n);
        const Real dg = slopes.slope * x.dg[i][n];
        gradient.dg[value_row(t) * K + n] = dg;
        if (!c.A_log.empty()) gradient.dA_log[b * c.HV + h] += slopes.slope_of_A_log * x.dg[i][n];
        if (!c.dt_bias.empty()) gradient.d_dt_bias[(b * c.HV + h) * K + n] += dg;
      }
    }
  }

  void walk(const Run& segment) {
    const int64_t end = segment.start + segment.length;
    auto length_at = [&](int64_t first) { return std::min(kSize, end - first); };
    M S = outer_state(c.initial_state, segment.slot);
    std::vector<Chunk<Operands>> chunks;
    for (int64_t first = segment.start; first < end; first += kSize) {
      chunks.push_back(prepared(first, length_at(first)));
      const M o = chunks.back().forward(S);
      for (int64_t i = 0; i < o.rows; ++i) put_row(out.o, value_row(first + i), o, i);
      if (d == nullptr) chunks.pop_back();
    }
    put(out.final_state, segment.slot, S);
    if (d == nullptr) return;
    M dS = outer_state(d->d_final_state, segment.slot);
    for (; !chunks.empty(); chunks.pop_back()) {
      const int64_t first = segment.start + int64_t(chunks.size() - 1) * kSize;
      M d_o(length_at(first), V);
      for (int64_t i = 0; i < d_o.rows; ++i)
        std::copy_n(&d->d_o[value_row(first + i) * V], V, d_o[i]);
      chunks.back().backward(d_o, dS);
      put_gradients(chunks.back(), first, length_at(first));
    }
    put(gradient.d_initial_state, segment.slot, dS);
  }

  const Call& c;
  const Cotangents* d;
  const int64_t b, h;
  Result& out;
  Gradients& gradient;
};

struct Chunked {
  Result forward;
  Gradients backward;  // without sizes and images; empty without cotangents
};

// The chunked form of a call: with Bf16Operands the peer. On one core.
template <class Operands = Bf16Operands>
Chunked chunked(const Call& c, const Cotangents* d) {
  Chunked out;
  Gradients& x = out.backward;
  const int64_t head_tokens = c.B * c.T * c.HV, states = c.B * c.N * c.HV * Call::K * Call::V;
  out.forward.o.assign(head_tokens * Call::V, 0.0);
  out.forward.final_state.assign(states, 0.0);
  if (d != nullptr) {
    for (auto* of_keys : {&x.dq, &x.dk, &x.dg}) of_keys->assign(head_tokens * Call::K, 0.0);
    x.dv.assign(head_tokens * Call::V, 0.0);
    x.d_beta.assign(head_tokens, 0.0);
    x.dA_log.assign(c.A_log.size(), 0.0);
    x.d_dt_bias.assign(c.dt_bias.size(), 0.0);
    x.d_initial_state.assign(states, 0.0);
  }
  for (int64_t i = 0; i < c.B * c.HV; ++i)
    ChunkedHead<Operands>(c, d, i / c.HV, i % c.HV, out.forward, x).run();
  if (d != nullptr) x.dq = sum_over_groups(c, x.dq), x.dk = sum_over_groups(c, x.dk);
  return out;
}

}  // namespace oracle
