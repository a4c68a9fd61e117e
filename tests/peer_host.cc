// The oracles of the native tests, for tests/test_peer_oracle.py. Needs no CUDA.
//   peer_host results < CALL: the results of a call by the recurrence, by the peer, and by the
//       chunked form without rounding, each [count, doubles]..; then the sizes of the sums.
//   peer_host promise < RESULT: the share of the promise of one result.
//   peer_host forward|backward COUNT SEED FACTOR [--promise]: draws judged, with results that err
//       by FACTOR times what the peer errs, in its direction.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "native/judged_draws.h"

namespace {

template <typename T>
T number() {
  T value;
  if (!std::cin.read(reinterpret_cast<char*>(&value), sizeof(T))) std::exit(2);
  return value;
}

template <typename T>
std::vector<T> array() {
  std::vector<T> values(number<int64_t>());
  for (T& value : values) value = number<T>();
  return values;
}

void write(const std::vector<double>& values) {
  const int64_t count = int64_t(values.size());
  std::cout.write(reinterpret_cast<const char*>(&count), 8);
  std::cout.write(reinterpret_cast<const char*>(values.data()), count * 8);
}

void write(const oracle::Result& forward, const oracle::Gradients& backward) {
  write(forward.o), write(forward.final_state);
  for (size_t i = 0; i < kGradients; ++i) write(gradient_of(backward, i));
}

int results() {
  oracle::Call c{};
  for (int64_t* size : {&c.B, &c.T, &c.H, &c.HV, &c.N}) *size = number<int64_t>();
  c.gate = oracle::Gate(number<int64_t>());
  for (bool* option : {&c.beta_is_logits, &c.allow_neg_eigval, &c.qk_l2norm, &c.has_segment_ids,
                       &c.has_padding_segment_id})
    *option = number<int64_t>() != 0;
  c.padding_segment_id = int32_t(number<int64_t>());
  c.gate_lower_bound = number<double>(), c.scale = number<double>();
  oracle::Cotangents d;
  for (auto* x : {&c.q, &c.k, &c.v, &c.g, &c.beta, &c.A_log, &c.dt_bias, &c.initial_state, &d.d_o,
                  &d.d_final_state})
    *x = array<float>();
  c.segment_ids = array<int32_t>();
  const oracle::Gradients truth = oracle::backward(c, d);
  write(oracle::forward(c), truth);
  const oracle::Chunked peer = oracle::chunked(c, &d);
  write(peer.forward, peer.backward);
  const oracle::Chunked exact = oracle::chunked<oracle::ExactOperands>(c, &d);
  write(exact.forward, exact.backward);
  write(truth.dA_log_size), write(truth.d_dt_bias_size);
  return EXIT_SUCCESS;
}

int promise() {
  enum Kind { kTokens, kStates, kSums, kSumsOneByOne };
  const auto kind = Kind(number<int64_t>());
  const auto T = number<int64_t>(), heads = number<int64_t>(), D = number<int64_t>();
  const auto eps = number<double>();
  const auto truth = array<double>(), peer = array<double>();
  const auto got = array<float>();
  const auto sizes = array<double>();
  const oracle::BlockOf blocks = kind == kTokens   ? oracle::token_blocks(T, heads, D)
                                 : kind == kStates ? oracle::state_block
                                                   : oracle::BlockOf();
  const oracle::PromiseShare result =
      oracle::share_of_promise(truth, peer, got, eps, blocks, kind >= kSums ? &sizes : nullptr,
                               kind == kSumsOneByOne);
  write({result.share, result.error, result.peer});
  return EXIT_SUCCESS;
}

// What a kernel would return that errs `factor` times as much as the peer.
std::vector<float> fake(const std::vector<double>& truth, const std::vector<double>& peer,
                        double factor, bool is_bf16) {
  std::vector<float> got(truth.size());
  for (size_t i = 0; i < truth.size(); ++i) {
    got[i] = float(truth[i] + factor * (peer[i] - truth[i]));
    if (is_bf16) got[i] = round_bf16(got[i]);
  }
  return got;
}

Verdict judge_forward(const Case& c, double factor, bool promise) {
  const oracle::Result truth = oracle::forward(c.call, 1),
                       peer = oracle::chunked(c.call, nullptr).forward;
  Verdict verdict;
  judge_outputs(verdict, c, truth, fake(truth.o, peer.o, factor, true),
                fake(truth.final_state, peer.final_state, factor, false), promise);
  return verdict;
}

Verdict judge_backward(const Case& c, uint64_t seed, double factor, bool promise) {
  const oracle::Cotangents d = drawn_cotangents(c, seed);
  const oracle::Gradients truth = oracle::backward(c.call, d, 1),
                          peer = oracle::chunked(c.call, &d).backward;
  std::vector<std::vector<float>> got;
  for (size_t i = 0; i < kGradients; ++i) {
    const bool is_bf16 = i < 3 || (i == 3 && c.g_bf16) || (i == 4 && c.beta_bf16);
    got.push_back(fake(gradient_of(truth, i), gradient_of(peer, i), factor, is_bf16));
  }
  if (c.call.initial_state.empty()) got.back().clear();
  Verdict verdict;
  judge_gradients(verdict, c, d, truth, got, promise);
  return verdict;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "results") return results();
  if (what == "promise") return promise();
  if (argc < 5) return 2;
  RandomRun run;
  run.count = std::atoi(argv[2]), run.seed = std::strtoull(argv[3], nullptr, 10);
  run.promise = argc > 5 && argv[5] == std::string("--promise");
  const double factor = std::atof(argv[4]);
  const bool backward = what == "backward";
  const int64_t most_pairs = backward ? kMostBackwardPairs : kMostForwardPairs;
  return judge_draws("peer_host", run, most_pairs,
                     [&](const Case& c, uint64_t seed, bool promise) {
                       return backward ? judge_backward(c, seed, factor, promise)
                                       : judge_forward(c, factor, promise);
                     }) == 0
             ? EXIT_SUCCESS
             : EXIT_FAILURE;
}
