// A decode step: the recurrence over 1 to 8 tokens of a sequence,
//   S <- Diag(exp(g)) S;   u = beta (v - S^T k);   o = scale (S^T q + u (k q));   S <- S + k u^T,
// with S^T q taken before u is known, so that both sums over rows are one pass and one meeting.
//
// Grid: a CTA for every kColumns columns of every (sequence, value head); columns are independent.
// Its 4 warps hold kK / 4 rows each, in registers from the one load to the one store: what a step
// costs is reading and writing the state once, and all of the part is in flight while the tokens
// are prepared. Reads q, k, v, g, beta [N, T, ..], writes o and, in place, the state.
//
// A sequence without a slot writes zeros to its outputs. Two sequences with one slot both read and
// write it, in bounds and in no order.
#pragma once

#include "chunk/gate.cuh"
#include "chunk/l2norm.cuh"
#include "problem/elements.cuh"
#include "problem/numerics.cuh"
#include "sm90/decode_step/config.h"

namespace jax_flashkda::decode_step {

// The part of a state that a CTA works on, and where its operands are.
template <class Config>
struct Part {
  __device__ explicit Part(const StepParams& p) {
    using Index = typename Config::Index;
    const Index item = blockIdx.x / Config::kParts, heads = static_cast<Index>(p.shape.HV);
    n = item / heads;
    head = item % heads;
    first_column = blockIdx.x % Config::kParts * Config::kColumns;
  }
  // Elements before token t of this head, in [N, T, heads, size].
  __device__ int64_t token(const StepParams& p, int64_t t, int64_t heads, int64_t h,
                           int64_t size) const {
    return ((int64_t{n} * p.shape.T + t) * heads + h) * size;
  }
  typename Config::Index n, head;
  int first_column;
};

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

__device__ __forceinline__ float decay_of(Gate gate, float g, const GateCoefficients& c) {
  const float log2 = gate == Gate::kSoftplus  ? log2_decay<Gate::kSoftplus>(g, c)
                     : gate == Gate::kBounded ? log2_decay<Gate::kBounded>(g, c)
                                              : log2_decay<Gate::kLogDecay>(g, c);
  return exp2_fast(log2);
}

// What one warp loads of a token, and makes of it: norms, gate and beta.
template <class Config>
class TokenInputs {
 public:
  __device__ __forceinline__ void load(const StepParams& p, const Part<Config>& part, int t) {
    using Index = typename Config::Index;
    const auto group = static_cast<Index>(p.shape.HV) / static_cast<Index>(p.shape.H);
    const int64_t qk = part.token(p, t, p.shape.H, part.head / group, Config::kK) + channel();
    q_.load(p.q, p.qkv_dtype, qk);
    k_.load(p.k, p.qkv_dtype, qk);
    g_.load(p.g, p.g_dtype, part.token(p, t, p.shape.HV, part.head, Config::kK) + channel());
    v_.load(
        p.v, p.qkv_dtype,
        part.token(p, t, p.shape.HV, part.head, Config::kV) + part.first_column + lane() * kValues);
    beta_.load(p.beta, p.beta_dtype, part.token(p, t, p.shape.HV, part.head, 1));
    const int64_t row = (p.parameters_per_sequence ? int64_t{part.n} * p.shape.HV : 0) + part.head;
    if (p.A_log != nullptr) A_log_ = p.A_log[row];
    if (p.dt_bias != nullptr)
      dt_bias_ = *reinterpret_cast<const Biases*>(p.dt_bias + row * Config::kK + channel());
  }

  __device__ __forceinline__ void prepare(const StepParams& p, int t,
                                          typename Config::Shared& s) const {
    const int lane = this->lane(), channel = this->channel();
    float q[kChannels], k[kChannels], g[kChannels], v[kValues], beta[1];
    q_.convert(p.qkv_dtype, q);
    k_.convert(p.qkv_dtype, k);
    g_.convert(p.g_dtype, g);
    v_.convert(p.qkv_dtype, v);
    beta_.convert(p.beta_dtype, beta);
    float q_factor = 1.0f, k_factor = 1.0f, kq = 0.0f;
    if (p.qk_l2norm) {
      float q_squares = 0.0f, k_squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        q_squares = fmaf(q[i], q[i], q_squares);
        k_squares = fmaf(k[i], k[i], k_squares);
      }
      q_factor = l2norm_factor(sum_over_warp(q_squares));
      k_factor = l2norm_factor(sum_over_warp(k_squares));
    }
    const float a = expf(A_log_);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const GateCoefficients gate =
          gate_coefficients(p.gate, a, dt_bias_.values[i], p.gate_lower_bound);
      const float qi = q[i] * q_factor, ki = k[i] * k_factor;
      kq = fmaf(ki, qi, kq);
      s.rows[t][channel + i] = {ki, decay_of(p.gate, g[i], gate), qi, 0.0f};
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) s.v[t][lane * kValues + i] = v[i];
    kq = sum_over_warp(kq);
    if (lane == 0) {
      s.kq[t] = kq;
      s.beta[t] = beta_value(beta[0], p.beta_is_logits, p.allow_neg_eigval);
    }
  }

 private:
  static constexpr int kChannels = Config::kK / 32, kValues = Config::kColumns / 32;
  using Biases = Elements<float, kChannels>;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int channel() { return lane() * kChannels; }

  RawElements<kChannels> q_, k_, g_;
  RawElements<kValues> v_;
  RawElements<1> beta_;
  float A_log_ = 0.0f;  // absent: unit amplitude
  Biases dt_bias_ = {};
};

// Which elements of a state a thread holds: kVector columns of kRowsOfGroup x kGroupsOfLane rows.
template <class Config>
struct Place {
  static constexpr int kGroupsOfLane = Config::kGroupsOfLane;

  __device__ explicit Place(const Part<Config>& part)
      : first_row(threadIdx.x / 32 * Config::kRowsOfWarp +
                  threadIdx.x % 32 / Config::kLanes * kGroupsOfLane),
        own_column(threadIdx.x % Config::kLanes * Config::kVector),
        offset(int64_t{first_row} * Config::kV + part.first_column + own_column) {}

  static __device__ constexpr int row(int i, int group) { return i * Config::kGroups + group; }

  // visit(i, group, the first of its elements in the state of a head), for all of a thread's rows.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < Config::kRowsOfGroup; ++i)
#pragma unroll
      for (int group = 0; group < kGroupsOfLane; ++group)
        visit(i, group, offset + row(i, group) * Config::kV);
  }

  // (group 0 + group 1) + (group 2 + group 3), be they in one lane or in four.
  template <int kColumns>
  static __device__ float sum_of_groups(const float (&x)[kGroupsOfLane][kColumns], int j) {
    constexpr unsigned kAll = 0xffffffffu;
    if constexpr (kGroupsOfLane == 4) return (x[0][j] + x[1][j]) + (x[2][j] + x[3][j]);
    float sum = x[0][j];
    if constexpr (kGroupsOfLane == 2) sum += x[1][j];
    if constexpr (kGroupsOfLane == 1) sum += __shfl_xor_sync(kAll, sum, Config::kLanes);
    return sum + __shfl_xor_sync(kAll, sum, 16);
  }

  __device__ bool in_first_row_group() const { return threadIdx.x % 32 < Config::kLanes; }

  int first_row, own_column;
  int64_t offset;  // of the first element, in the state of a head
};

// A thread's elements in fp32.
template <class Config>
struct Held : Place<Config> {
  using Place = decode_step::Place<Config>;
  using State = typename Config::State;
  using Vector = Elements<State, Config::kVector>;
  static constexpr int kGroupsOfLane = Place::kGroupsOfLane, kVector = Config::kVector;

  __device__ explicit Held(const Part<Config>& part) : Place(part) {}

  // Read once and by nobody else: past the first-level cache, and first to leave the second.
  __device__ void load(const State* state) {
    Place::each([&](int i, int group, int64_t at) {
      const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(state + at));
      const Vector vector = *reinterpret_cast<const Vector*>(&raw);
#pragma unroll
      for (int j = 0; j < kVector; ++j) convert(values[i][group].values[j], vector.values[j]);
    });
  }
  __device__ void store(State* state) const {
    Place::each([&](int i, int group, int64_t at) {
      Vector vector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) convert(vector.values[j], values[i][group].values[j]);
      __stcs(reinterpret_cast<uint4*>(state + at), *reinterpret_cast<const uint4*>(&vector));
    });
  }

  // Decays the state; S^T k and S^T q over this warp's rows.
  __device__ void decay_and_read(const typename Config::Row* rows, float (&read)[kVector],
                                 float (&out)[kVector]) {
    float reads[kGroupsOfLane][kVector] = {}, outs[kGroupsOfLane][kVector] = {};
    Place::each([&](int i, int group, int64_t) {
      const typename Config::Row x = rows[Place::first_row + Place::row(i, group)];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float& value = values[i][group].values[j];
        value *= x.decay;
        reads[group][j] = fmaf(value, x.k, reads[group][j]);
        outs[group][j] = fmaf(value, x.q, outs[group][j]);
      }
    });
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      read[j] = Place::sum_of_groups(reads, j);
      out[j] = Place::sum_of_groups(outs, j);
    }
  }

  // Adds k u^T to the decayed state.
  __device__ void add(const typename Config::Row* rows, const float (&u)[kVector]) {
    Place::each([&](int i, int group, int64_t) {
      const typename Config::Row& x = rows[Place::first_row + Place::row(i, group)];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float& value = values[i][group].values[j];
        value = fmaf(x.k, u[j], value);
      }
    });
  }

  Elements<float, kVector> values[Config::kRowsOfGroup][kGroupsOfLane];
};

// Columns own_column .. of the sum over the four warps, in a fixed order.
template <class Config, int kCount>
__device__ __forceinline__ void sum_of_warps(
    const float (&partial)[Config::kWarps][Config::kColumns], int column, float (&sum)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    sum[j] = (partial[0][column + j] + partial[1][column + j]) +
             (partial[2][column + j] + partial[3][column + j]);
}

template <class Config>
__device__ void write_zeros(const StepParams& p, const Part<Config>& part) {
  const float zero[1] = {};
  for (int64_t t = 0; t < p.shape.T; ++t) {
    for (int column = threadIdx.x; column < Config::kColumns; column += Config::kThreads)
      store_elements(
          p.o, p.qkv_dtype,
          part.token(p, t, p.shape.HV, part.head, Config::kV) + part.first_column + column, zero);
    if (p.token_states == nullptr) continue;
    const int64_t state = part.token(p, t, p.shape.HV, part.head, Config::kK * Config::kV);
    for (int i = threadIdx.x; i < Config::kK * Config::kColumns; i += Config::kThreads)
      store_elements(
          p.token_states, p.state_dtype,
          state + i / Config::kColumns * Config::kV + part.first_column + i % Config::kColumns,
          zero);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    decode_step_kernel(const __grid_constant__ StepParams p) {
  using State = typename Config::State;
  constexpr int kVector = Config::kVector;
  __shared__ typename Config::Shared s;
  const Part<Config> part(p);
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[part.n] : part.n;
  if (slot < 0 || slot >= p.shape.slots) return write_zeros(p, part);
  State* state =
      static_cast<State*>(p.state) + (slot * p.shape.HV + part.head) * (Config::kK * Config::kV);
  const int warp = threadIdx.x / 32;
  TokenInputs<Config> inputs;
  if (warp < p.shape.T) inputs.load(p, part, warp);  // first, so that the state does not delay it
  Held<Config> held(part);
  held.load(state);
  for (int t = warp; t < p.shape.T; t += Config::kWarps) {
    if (t != warp) inputs.load(p, part, t);
    inputs.prepare(p, t, s);
  }
  __syncthreads();  // the prepared tokens, before all warps read them

  for (int t = 0; t < p.shape.T; ++t) {
    float read[kVector], out[kVector], u[kVector];
    held.decay_and_read(s.rows[t], read, out);
    auto& partial = s.partial[t % 2];
    if (held.in_first_row_group()) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        partial[0][warp][held.own_column + j] = read[j];
        partial[1][warp][held.own_column + j] = out[j];
      }
    }
    // All warps' sums, before anybody adds them up. They are overwritten two tokens later, and the
    // next token's barrier is in between.
    __syncthreads();
    sum_of_warps<Config>(partial[0], held.own_column, read);
#pragma unroll
    for (int j = 0; j < kVector; ++j) u[j] = s.beta[t] * (s.v[t][held.own_column + j] - read[j]);
    held.add(s.rows[t], u);
    if (warp == 0 && held.in_first_row_group()) {
      sum_of_warps<Config>(partial[1], held.own_column, out);
#pragma unroll
      for (int j = 0; j < kVector; ++j) out[j] = p.scale * fmaf(u[j], s.kq[t], out[j]);
      store_elements(
          p.o, p.qkv_dtype,
          part.token(p, t, p.shape.HV, part.head, Config::kV) + part.first_column + held.own_column,
          out);
    }
    if (p.token_states != nullptr)
      held.store(static_cast<State*>(p.token_states) +
                 part.token(p, t, p.shape.HV, part.head, Config::kK * Config::kV));
  }
  held.store(state);
}

}  // namespace jax_flashkda::decode_step
