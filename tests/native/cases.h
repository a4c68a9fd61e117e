// The calls that the native tests make: shapes, key and gate regimes, segments.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bf16.h"
#include "oracle.h"

using oracle::Call;

struct Case {
  std::string name;
  Call call;
  bool g_bf16 = true, beta_bf16 = true;
  bool want_final = true, want_chunk_states = false;
  double limit = 0.007;           // relative RMS over the whole tensor
  double gradient_limit = 0.008;  // the same of a gradient
  double gate_limit = 0.015;      // the same of the gradients of g, beta, A_log and dt_bias
  // Random keys and decays, beta <= 1: the promise has caps too, which are these limits.
  bool well_conditioned = false;
};

struct Regime {
  enum Keys { kRandom, kIdentical, kNear, kZero } keys = kRandom;
  enum Gates {
    kSlow,
    kFast,
    kBound,
    kNone,
    kReset,
    kOneAlive,
    kFifty,
    kDead,
    kMixed  // each channel of its own kind, some tokens far from others
  } gates = kSlow;
};

inline Case make_case(std::string name, Call shape, Regime regime = {}, uint64_t seed = 1) {
  Case c{std::move(name), std::move(shape)};
  Call& x = c.call;
  c.well_conditioned = regime.keys == Regime::kRandom && !x.allow_neg_eigval &&
                       (regime.gates == Regime::kSlow || regime.gates == Regime::kFast);
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
      case Regime::kFifty:
        return -50.0f;
      case Regime::kDead:
        return -1000.0f;
      case Regime::kMixed:
        return uniform(generator) < 0.2f ? -40.0f * uniform(generator) : -0.02f;
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

// Relative to the truth, or to `squares` of sizes.
inline double relative_rms(const std::vector<double>& truth,
                           const std::function<double(size_t)>& got,
                           const std::vector<double>* squares = nullptr) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (got(i) - truth[i]) * (got(i) - truth[i]);
    size += squares != nullptr ? (*squares)[i] : truth[i] * truth[i];
  }
  if (std::isnan(error)) return error;
  return size > 0.0 ? std::sqrt(error / size) : std::sqrt(error);
}

inline Call shape(int64_t B, int64_t T, int64_t H, int64_t HV, int64_t N = 1) {
  Call c{};
  c.B = B, c.T = T, c.H = H, c.HV = HV, c.N = N;
  return c;
}

inline Call raw_shape(oracle::Gate gate, int64_t B, int64_t T, int64_t H, int64_t HV) {
  Call c = shape(B, T, H, HV);
  c.gate = gate;
  c.beta_is_logits = c.qk_l2norm = true;
  return c;
}

inline void add_initial_state(Case& c) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  c.call.initial_state.resize(c.call.B * c.call.N * c.call.HV * Call::K * Call::V);
  for (float& value : c.call.initial_state) value = 0.3f * normal(generator);
}

inline std::vector<int32_t> ids_from_lengths(const std::vector<std::pair<int32_t, int64_t>>& runs) {
  std::vector<int32_t> ids;
  for (const auto& [id, length] : runs) ids.insert(ids.end(), length, id);
  return ids;
}

inline Case packed_case(std::string name, int64_t B, int64_t HV, int64_t N,
                        std::vector<int32_t> ids, bool states = true) {
  Call c = raw_shape(oracle::Gate::kSoftplus, B, int64_t(ids.size()) / B, HV, HV);
  c.N = N;
  c.has_segment_ids = true;
  c.has_padding_segment_id = true;
  Case packed = make_case(std::move(name), std::move(c));
  packed.call.segment_ids = std::move(ids);
  if (states) add_initial_state(packed);
  return packed;
}

// Tokens start .. start + length - 1 of rows [T, ..] of `row` floats, and NaN in all others.
inline void cut_tokens(std::vector<float>& x, int64_t row, int64_t start, int64_t length) {
  x = std::vector<float>(x.begin() + start * row, x.begin() + (start + length) * row);
}
inline void spoil_other_tokens(std::vector<float>& x, int64_t row, int64_t start, int64_t length) {
  std::fill_n(x.begin(), start * row, NAN);
  std::fill(x.begin() + (start + length) * row, x.end(), NAN);
}

// What a call has of every token, with the floats of one.
inline std::vector<std::pair<std::vector<float>*, int64_t>> token_rows(Call& x) {
  return {{&x.q, x.H * Call::K},
          {&x.k, x.H * Call::K},
          {&x.v, x.HV * Call::V},
          {&x.g, x.HV * Call::K},
          {&x.beta, x.HV}};
}

// A segment of the one row of a call, or its first tokens, alone. `slot`: its state's.
inline Case cut_out(const Case& packed, int64_t start, int64_t length, int64_t slot) {
  Case alone = packed;
  Call& x = alone.call;
  for (auto [rows, row] : token_rows(x)) cut_tokens(*rows, row, start, length);
  x.T = length;
  if (!x.initial_state.empty()) {
    if (slot < x.N)
      cut_tokens(x.initial_state, x.HV * Call::K * Call::V, slot, 1);
    else
      x.initial_state.clear();
  }
  x.N = 1;
  x.has_segment_ids = x.has_padding_segment_id = false;
  x.segment_ids.clear();
  return alone;
}

// The call with NaN in all that does not belong to the segment.
inline Case spoil_around(const Case& packed, int64_t start, int64_t length, int64_t slot) {
  Case spoiled = packed;
  Call& x = spoiled.call;
  for (auto [rows, row] : token_rows(x)) spoil_other_tokens(*rows, row, start, length);
  if (!x.initial_state.empty())
    spoil_other_tokens(x.initial_state, x.HV * Call::K * Call::V, slot, 1);
  return spoiled;
}

inline std::vector<Case> cases(bool quick) {
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
    list.back().limit = list.back().gradient_limit = list.back().gate_limit = 0.06;
    list.push_back(make_case(std::string("keys ") + text + ", no decay", shape(1, 300, 1, 1),
                             {keys, Regime::kNone}));
    list.back().limit = list.back().gradient_limit = list.back().gate_limit = 0.06;
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
  for (int64_t HV : {2, 80})
    list.push_back(packed_case(
        "short segments without states, H " + std::to_string(HV), 1, HV, 2,
        ids_from_lengths({{1, 16}, {2, 17}, {3, 32}, {0, 3}, {4, 33}, {5, 48}, {6, 63}, {7, 64},
                          {8, 1}, {9, 65}, {1, 49}}),
        /*states=*/false));
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
  for (auto keys : {Regime::kRandom, Regime::kNear}) {
    Case c = make_case(std::string("in pieces, ") +
                           (keys == Regime::kRandom ? "random keys" : "near-identical keys"),
                       raw_shape(G::kSoftplus, 1, 4133, 1, 2), {keys, Regime::kSlow});
    if (keys == Regime::kNear) c.limit = c.gradient_limit = c.gate_limit = 0.06;
    add_initial_state(c);
    list.push_back(c);
  }
  list.push_back(make_case("in pieces, B 2, fast", raw_shape(G::kBounded, 2, 6400, 1, 1),
                           {Regime::kRandom, Regime::kFast}));
  list.push_back(make_case("B 5, GVA 8 / 16", raw_shape(G::kSoftplus, 5, 333, 8, 16)));
  return list;
}
