// Calls drawn at random: shapes with tails, segments and padding anywhere, options, states, key and
// gate regimes. Draw i of a run is that of seed + i, so that a line of failure names the one call
// that reproduces it:  PROGRAM --random 1 --seed SEED
//
// They are judged by relative RMS (judged_draws.h), which means something where many tokens and
// heads share it, so a draw has at least kLeastPairs of them (of few, one may be a sum that
// cancels). Regimes are combined as the cases combine them: nothing is drawn for which there is no
// limit yet.
#pragma once

#include <initializer_list>

#include "cases.h"

constexpr int64_t kLeastPairs = 128;  // of valid tokens and value heads

class Draw {
 public:
  Draw(uint64_t seed, int64_t most_pairs) : generator_(seed * 0x9E3779B97F4A7C15ull) {
    for (;;) {
      Call call = sizes(most_pairs);
      layout(call);
      const int64_t pairs = valid_tokens(call) * call.HV;
      if (pairs >= kLeastPairs && pairs <= most_pairs) {
        choose(std::move(call), generator_());
        return;
      }
    }
  }

  Case result;

 private:
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator_);
  }
  bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(generator_) < p; }
  template <class T>
  T one_of(std::initializer_list<T> list) {
    return list.begin()[between(0, int64_t(list.size()) - 1)];
  }

  Call sizes(int64_t most_pairs) {
    const int64_t T = chance(0.5) ? one_of<int64_t>({1,  2,  3,  15,  16,  17,  31,  33,  63,  64,
                                                     65, 66, 80, 127, 128, 129, 130, 191, 193, 257})
                                  : between(1, 700);
    int64_t H = one_of<int64_t>({1, 1, 2, 3, 4, 8}), group = one_of<int64_t>({1, 1, 1, 2, 3, 4});
    if (T <= 20 && chance(0.2)) H = 80, group = 1;  // the state stage's whole heads
    while (T * H * group > most_pairs && group > 1) --group;
    while (T * H * group > most_pairs && H > 1) --H;
    const int64_t least = (kLeastPairs + T * H * group - 1) / (T * H * group);
    const int64_t most = std::max(least, most_pairs / (T * H * group));
    return shape(std::min(most, std::max(least, between(1, 3))), T, H, H * group);
  }

  void layout(Call& c) {
    if (chance(0.35)) return;
    c.has_segment_ids = true;
    c.has_padding_segment_id = chance(0.75);
    c.padding_segment_id = one_of<int32_t>({0, 0, 7});
    c.N = between(1, 4);
    const int kind = int(between(0, 9));  // 0: tokens that are segments of their own
    for (int64_t b = 0; b < c.B; ++b) {
      std::vector<int32_t> ids;
      while (int64_t(ids.size()) < c.T) {
        const int32_t id = one_of<int32_t>({0, -1, 1, 2, 3, 7, INT32_MIN, INT32_MAX});
        const int64_t length = kind == 0 ? 1
                               : chance(0.15)
                                   ? between(1, 700)
                                   : one_of<int64_t>({1, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130});
        ids.insert(ids.end(), length, kind == 0 ? int32_t(ids.size()) + 1 : id);
      }
      ids.resize(c.T);
      c.segment_ids.insert(c.segment_ids.end(), ids.begin(), ids.end());
    }
  }

  // A regime and options with limits, then the data.
  void choose(Call c, uint64_t data_seed) {
    using G = oracle::Gate;
    Regime regime;
    double neg_eigval_limit = 0.0;
    std::string text;
    const int kind = int(between(0, 9));
    if (kind < 2) {  // correlated keys: nothing decays, or as in a layer
      regime.keys = one_of({Regime::kIdentical, Regime::kNear, Regime::kZero});
      regime.gates = chance(0.5) ? Regime::kSlow : Regime::kNone;
      if (regime.gates == Regime::kSlow)
        c.gate = G::kSoftplus, c.beta_is_logits = c.qk_l2norm = true;
    } else if (kind < 6) {
      c.gate = chance(0.5) ? G::kSoftplus : G::kBounded;
      regime.gates =
          one_of({Regime::kSlow, Regime::kSlow, Regime::kFast, Regime::kFast, Regime::kBound});
      c.beta_is_logits = chance(0.8), c.qk_l2norm = chance(0.8);
      c.gate_lower_bound = one_of({-5.0, -5.0, -1.0});
      if (c.gate == G::kSoftplus && regime.gates == Regime::kSlow && c.beta_is_logits &&
          c.qk_l2norm && chance(0.3))
        c.allow_neg_eigval = true, neg_eigval_limit = 0.012;
    } else {
      regime.gates = one_of({Regime::kSlow, Regime::kFast, Regime::kBound, Regime::kReset,
                             Regime::kNone, Regime::kOneAlive});
      // Without decay only so long: what 16-bit operands lose adds up.
      if (regime.gates == Regime::kNone && c.T > 130) regime.gates = Regime::kSlow;
      if (regime.gates == Regime::kOneAlive && c.T > 200) regime.gates = Regime::kFast;
      c.qk_l2norm = chance(0.3), c.beta_is_logits = chance(0.3);
    }
    const std::vector<int32_t> ids = c.segment_ids;
    result = make_case("", std::move(c), regime, data_seed);
    result.call.segment_ids = ids;
    result.call.scale *= one_of({1.0, 1.0, 8.0});
    result.g_bf16 = chance(0.7), result.beta_bf16 = chance(0.7);
    result.want_final = chance(0.6);
    if (chance(0.5)) add_initial_state(result);
    if (regime.keys != Regime::kRandom)
      result.limit = result.gradient_limit = result.gate_limit = 0.06;
    if (neg_eigval_limit > 0.0) result.limit = neg_eigval_limit;
    result.name = describe(result, regime);
  }

  static int64_t valid_tokens(const Call& c) {
    int64_t count = 0;
    for (int64_t at = 0; at < c.B * c.T; ++at) count += is_padding(c, at) ? 0 : 1;
    return count;
  }

  static std::string describe(const Case& c, const Regime& regime) {
    const char* gates[] = {"log_decay", "softplus", "bounded"};
    const char* keys[] = {"random", "identical", "near-identical", "zero"};
    const char* regimes[] = {"slow", "fast", "bound", "none", "reset", "one alive"};
    const Call& x = c.call;
    auto number = [](int64_t n) { return std::to_string(n); };
    std::string text = "B " + number(x.B) + ", T " + number(x.T) + ", heads " + number(x.H) + "/" +
                       number(x.HV) + ", " + gates[int(x.gate)] + " " + regimes[regime.gates] +
                       ", keys " + keys[regime.keys];
    if (x.has_segment_ids) text += ", ids with " + number(x.N) + " slots";
    for (auto [on, what] : {std::pair{x.qk_l2norm, "l2norm"},
                            {x.beta_is_logits, "logits"},
                            {x.allow_neg_eigval, "neg eigval"},
                            {!x.initial_state.empty(), "initial state"},
                            {c.want_final, "final state"},
                            {!c.g_bf16, "f32 g"},
                            {!c.beta_bf16, "f32 beta"}})
      if (on) text += std::string(", ") + what;
    return text;
  }

 public:
  static bool is_padding(const Call& c, int64_t at) {
    if (!c.has_segment_ids) return false;
    const int32_t id = c.segment_ids[at];
    return id < 0 || (c.has_padding_segment_id && id == c.padding_segment_id);
  }

 private:
  std::mt19937_64 generator_;
};
