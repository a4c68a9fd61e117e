// How the results of drawn calls (random_cases.h) are judged.
//
// First by limits that are the same for all draws. A relative RMS over the whole tensor is what the
// cases of cases.h are held to. Beyond that no block, 64 tokens of a head or one state, may err
// more than twice the limit, relative to the larger of its own RMS and the tensor's: a row that is
// wrong in a long tensor is not hidden by the others. The gradients of A_log and dt_bias are sums
// over tokens, few of them in a draw: they are held to twice what the chunked reference with 16-bit
// operands errs at most over such draws, 0.028 and 0.018 (slow gates: what a chunk's states lose
// errs alike in all of its tokens).
//
// That is a screen. What the library promises depends on the draw (promise.h): one that is over a
// limit fails if any of its results breaks the promise, and says both in either case. --promise:
// every draw is held to it, to look with: of few numbers a ratio of two errors is chance.
#pragma once

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backward_oracle.h"
#include "cases.h"
#include "peer_oracle.h"
#include "promise.h"
#include "random_cases.h"

// Tokens and heads of a call.
constexpr int64_t kMostForwardPairs = 3000, kMostBackwardPairs = 1500;
constexpr double kALogLimit = 2 * 0.028, kDtBiasLimit = 2 * 0.018;

// A result of a draw, and what it is held to.
struct Judged {
  std::string name;
  const std::vector<double>& truth;
  std::vector<float> got;
  bool is_bf16;
  double limit;
  oracle::BlockOf block_of;                    // of sums null
  const std::vector<double>* sizes = nullptr;  // of sums over tokens: see promise.h
};

// What one draw was found to be: the largest share of a limit by tensor, what is over one, and what
// makes the draw fail.
struct Verdict {
  std::map<std::string, double> shares;
  std::string over, promise, failures;

  void screen(const std::vector<Judged>& results) {
    for (const Judged& x : results)
      if (x.sizes != nullptr)
        screen_sums(x);
      else
        screen_blocks(x);
    for (const auto& [name, share] : shares)
      if (share > 1.0) over += "  " + name + " " + std::to_string(share) + " of its limit";
  }

  // Whatever the screen says.
  void hold_to_promise(const Judged& x, const std::vector<double>& peer, bool well_conditioned) {
    const auto [share, error, peer_error] = oracle::share_of_promise(
        x.truth, peer, x.got, x.is_bf16 ? oracle::kBf16Eps : FLT_EPSILON, x.block_of, x.sizes,
        /*one_by_one=*/x.name == "dA_log");
    char text[200];
    std::snprintf(text, sizeof(text), "  %s %.3f of the promise (errs %.2e, the peer %.2e)",
                  x.name.c_str(), share, error, peer_error);
    double& worst = shares[x.name + " promise"];
    worst = std::max(worst, share);
    if (over.find("  " + x.name + " ") != std::string::npos) promise += text;
    if (!(share <= 1.0)) failures += text;
    if (well_conditioned && x.sizes == nullptr && !(error <= x.limit)) {
      std::snprintf(text, sizeof(text), "  %s errs %.2e, its cap is %.3f", x.name.c_str(), error,
                    x.limit);
      failures += text;
    }
  }

  // Padding gets zeros: x is [B, T, row].
  void judge_padding(const std::string& name, const Call& c, const std::vector<float>& x,
                     int64_t row) {
    for (int64_t i = 0; i < int64_t(x.size()); ++i)
      if (x[i] != 0.0f && Draw::is_padding(c, i / row)) {
        failures += "  " + name + " of padding is not zero";
        return;
      }
  }

 private:
  void add(const std::string& name, double share) {
    shares[name] = std::max(shares[name], std::isnan(share) ? HUGE_VAL : share);
  }

  // The whole tensor, and its blocks.
  void screen_blocks(const Judged& x) {
    struct Sums {
      double error = 0.0, size = 0.0;
      int64_t count = 0;
    };
    Sums whole;
    std::map<int64_t, Sums> blocks;
    for (size_t i = 0; i < x.truth.size(); ++i) {
      const double expected = oracle::held(x.truth[i]);
      const double error = (x.got[i] - expected) * (x.got[i] - expected);
      for (Sums* sums : {&whole, &blocks[x.block_of(int64_t(i))]})
        sums->error += error, sums->size += expected * expected, ++sums->count;
    }
    auto share = [&](const Sums& sums, double size_per_element, double most) {
      if (sums.error == 0.0) return 0.0;
      return std::sqrt(sums.error / sums.count / size_per_element) / most;  // NaN, inf: over
    };
    if (whole.count == 0) return;
    const double size = whole.size / whole.count;
    add(x.name, share(whole, size, x.limit));
    for (const auto& [_, sums] : blocks)
      add(x.name + " block", share(sums, std::max(size, sums.size / sums.count), 2.0 * x.limit));
  }

  // Sums over tokens, which may cancel: against the root of the sum of their summands' squares.
  void screen_sums(const Judged& x) {
    double error = 0.0, size = 0.0;
    for (size_t i = 0; i < x.truth.size(); ++i) {
      error += (x.got[i] - x.truth[i]) * (x.got[i] - x.truth[i]);
      size += (*x.sizes)[i] * (*x.sizes)[i];
    }
    if (!x.truth.empty()) add(x.name, error == 0.0 ? 0.0 : std::sqrt(error / size) / x.limit);
  }
};

// Screens the results of a draw and, if one is over its limit or `always`, holds all of them to the
// promise. `peers` has the peer's in their order.
inline void judge_results(Verdict& verdict, const std::vector<Judged>& results,
                          bool well_conditioned, bool always,
                          const std::function<std::vector<std::vector<double>>()>& peers) {
  verdict.screen(results);
  if (verdict.over.empty() && !always) return;
  const std::vector<std::vector<double>> of_peer = peers();
  for (size_t i = 0; i < results.size(); ++i)
    verdict.hold_to_promise(results[i], of_peer[i], well_conditioned);
}

inline void judge_outputs(Verdict& verdict, const Case& c, const oracle::Result& truth,
                          std::vector<float> o, std::vector<float> final_state, bool promise) {
  const Call& x = c.call;
  verdict.judge_padding("o", x, o, x.HV * Call::V);
  std::vector<Judged> results{
      {"o", truth.o, std::move(o), true, c.limit, oracle::token_blocks(x.T, x.HV, Call::V)}};
  if (c.want_final)
    results.push_back({"final_state", truth.final_state, std::move(final_state), false, c.limit,
                       oracle::state_block});
  judge_results(verdict, results, c.well_conditioned, promise, [&] {
    oracle::Result peer = oracle::chunked(x, nullptr).forward;
    return std::vector{std::move(peer.o), std::move(peer.final_state)};
  });
}

inline oracle::Cotangents make_cotangents(const Case& c, uint32_t seed = 11) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  oracle::Cotangents d;
  d.d_o.resize(c.call.v.size());
  for (float& value : d.d_o) value = round_bf16(normal(generator));
  if (c.want_final) {
    d.d_final_state.resize(c.call.B * c.call.N * c.call.HV * Call::K * Call::V);
    for (float& value : d.d_final_state) value = 0.3f * normal(generator);
  }
  return d;
}

// Of a draw: in some one of the two alone.
inline oracle::Cotangents drawn_cotangents(const Case& c, uint64_t seed) {
  oracle::Cotangents d = make_cotangents(c, uint32_t(seed));
  if (seed % 8 == 0) std::fill(d.d_o.begin(), d.d_o.end(), 0.0f);
  if (seed % 8 == 1) d.d_final_state.clear();
  return d;
}

// In the order of the backward's results.
constexpr size_t kGradients = 8;
inline const std::vector<double>& gradient_of(const oracle::Gradients& x, size_t i) {
  const std::vector<double>* all[kGradients] = {
      &x.dq, &x.dk, &x.dv, &x.dg, &x.d_beta, &x.dA_log, &x.d_dt_bias, &x.d_initial_state};
  return *all[i];
}

// `got` in the order of gradient_of; empty: the call has no such operand.
inline void judge_gradients(Verdict& verdict, const Case& c, const oracle::Cotangents& d,
                            const oracle::Gradients& truth,
                            const std::vector<std::vector<float>>& got, bool promise) {
  const Call& x = c.call;
  struct Kind {
    const char* name;
    bool is_bf16;
    double limit;
    int64_t heads, width;  // of tensors with tokens
    const std::vector<double>* sizes = nullptr;
  };
  const Kind kinds[kGradients] = {{"dq", true, c.gradient_limit, x.H, Call::K},
                                  {"dk", true, c.gradient_limit, x.H, Call::K},
                                  {"dv", true, c.gradient_limit, x.HV, Call::V},
                                  {"dg", c.g_bf16, c.gate_limit, x.HV, Call::K},
                                  {"d_beta", c.beta_bf16, c.gate_limit, x.HV, 1},
                                  {"dA_log", false, kALogLimit, 0, 0, &truth.dA_log_size},
                                  {"d_dt_bias", false, kDtBiasLimit, 0, 0, &truth.d_dt_bias_size},
                                  {"d_initial_state", false, c.gradient_limit, 0, 0}};
  std::vector<Judged> results;
  std::vector<size_t> present;
  for (size_t i = 0; i < kGradients; ++i) {
    if (got[i].empty()) continue;
    const Kind& kind = kinds[i];
    oracle::BlockOf blocks = oracle::state_block;
    if (kind.heads > 0) {
      blocks = oracle::token_blocks(x.T, kind.heads, kind.width);
      verdict.judge_padding(kind.name, x, got[i], kind.heads * kind.width);
    }
    if (kind.sizes != nullptr) blocks = nullptr;
    results.push_back(
        {kind.name, gradient_of(truth, i), got[i], kind.is_bf16, kind.limit, blocks, kind.sizes});
    present.push_back(i);
  }
  judge_results(verdict, results, c.well_conditioned, promise, [&] {
    const oracle::Gradients peer = oracle::chunked(x, &d).backward;
    std::vector<std::vector<double>> values;
    for (size_t i : present) values.push_back(gradient_of(peer, i));
    return values;
  });
}

struct RandomRun {
  int count = 0;
  uint64_t seed = 1;
  bool promise = false;  // hold every draw to it
};

// Judges `run.count` draws on all cores; the number of those that failed.
inline int judge_draws(const char* program, const RandomRun& run, int64_t most_pairs,
                       const std::function<Verdict(const Case&, uint64_t, bool promise)>& judge) {
  std::atomic<int> next{0}, failures{0}, over{0};
  std::map<std::string, double> worst;
  std::mutex printing;
  auto work = [&] {
    for (int i = next++; i < run.count; i = next++) {
      const uint64_t seed = run.seed + i;
      const Case c = Draw(seed, most_pairs).result;
      const Verdict verdict = judge(c, seed, run.promise);
      const std::lock_guard<std::mutex> lock(printing);
      for (const auto& [name, share] : verdict.shares) worst[name] = std::max(worst[name], share);
      over += verdict.over.empty() ? 0 : 1;
      failures += verdict.failures.empty() ? 0 : 1;
      if (verdict.over.empty() && verdict.failures.empty()) continue;
      std::printf("%s --random 1 --seed %llu: %s:%s%s%s%s\n", program,
                  static_cast<unsigned long long>(seed), c.name.c_str(), verdict.over.c_str(),
                  verdict.promise.c_str(),
                  verdict.failures.empty() ? "" : "  FAILED:", verdict.failures.c_str());
      std::fflush(stdout);
    }
  };
  std::vector<std::thread> threads;
  const int workers = std::max(1u, std::thread::hardware_concurrency());
  for (int i = 0; i < std::min(workers, run.count); ++i) threads.emplace_back(work);
  for (auto& thread : threads) thread.join();
  std::printf("largest shares of the limits:");
  for (const auto& [name, share] : worst) std::printf("  %s %.2f", name.c_str(), share);
  std::printf("\n%d of %d draws passed, %d were over a limit\n", run.count - failures, run.count,
              over.load());
  return failures;
}

// Reads --random N, --seed S or --promise at argv[i]; whether it was one of them.
inline bool read_random_option(int argc, char** argv, int& i, RandomRun& run) {
  const std::string option = argv[i];
  if (option == "--promise") return run.promise = true;
  if ((option != "--random" && option != "--seed") || i + 1 == argc) return false;
  const unsigned long long value = std::stoull(argv[++i]);
  if (option == "--random")
    run.count = int(value);
  else
    run.seed = value;
  return true;
}
