// The gradient stage alone against its formulas in float64: states, state gradients, U and dR are
// random data, not those of a call. Exact-size allocations, poisoned outputs, a canary behind the
// workspace, bitwise repeats, NaN in neighbours, doubled cotangents. Prints a line a case; exit
// status 1 on failure.
//   gradient_test [--quick]
//   --quick: small cases alone, for compute-sanitizer.
#include <algorithm>
#include <random>
#include <string>

#include "gradient_oracle.h"
#include "launch.h"
#include "sm90/launch.h"

namespace {

using namespace jax_flashkda;

struct StageCase : Case {
  oracle::ScanResults scans;
};

// Boundary images [.., V][K] as the scans store them.
std::vector<uint16_t> swizzled_images(const std::vector<float>& images) {
  std::vector<uint16_t> out(images.size());
  for (size_t at = 0; at < images.size(); ++at) {
    const size_t image = at / (128 * 128), v = at / 128 % 128, k = at % 128;
    const size_t piece = k % 64 / 8;
    const __nv_bfloat16 x = __float2bfloat16(images[at]);
    std::memcpy(&out[image * 128 * 128 + k / 64 * 8192 + v * 64 + ((piece ^ (v % 8)) * 8) + k % 8],
                &x, 2);
  }
  return out;
}

struct Launch : Inputs, Runs<Launch> {
  explicit Launch(const StageCase& c)
      : Inputs(c),
        d_final_state(upload_as(c.scans.d_final_state, false)),
        d_o(upload_as(c.scans.d_o, true)),
        d_r(upload_as(c.scans.d_r, true)),
        u(upload_as(c.scans.u, true)),
        states(swizzled_images(c.scans.states)),
        state_gradients(swizzled_images(c.scans.state_gradients)),
        layout(backward_workspace(params.shape)),
        workspace(backward_workspace_bytes(params.shape)) {
    const Call& x = c.call;
    outputs.emplace_back("dq", x.q.size(), true);
    outputs.emplace_back("dk", x.q.size(), true);
    outputs.emplace_back("dg", x.g.size(), c.g_bf16);
    outputs.emplace_back("d_beta", x.beta.size(), c.beta_bf16);
    outputs.emplace_back("dA_log", x.A_log.size(), false);
    outputs.emplace_back("d_dt_bias", x.dt_bias.size(), false);
    outputs.emplace_back("dv", x.v.size(), true);
    auto at = [&](size_t i) { return outputs[i].buffer.data(); };
    call.forward = params;
    call.forward.nonzero_beta = true;
    call.forward.workspace = workspace.aligned();
    call.d_o = d_o.data();
    call.d_final_state = static_cast<float*>(d_final_state.data());
    call.dq = at(0), call.dk = at(1), call.dg = at(2), call.d_beta = at(3);
    call.dA_log = static_cast<float*>(at(4)), call.d_dt_bias = static_cast<float*>(at(5));
    call.dv = at(6);  // in which the stage finds dR
  }

  bool enqueue(cudaStream_t stream) {
    auto copy = [](void* to, const void* from, size_t bytes) {
      if (bytes > 0) CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    };
    auto at = [&](int64_t offset) { return static_cast<char*>(workspace.aligned()) + offset; };
    copy(call.dv, d_r.data(), d_r.bytes());
    copy(at(layout.states), states.data(), states.size() * 2);
    copy(at(layout.state_gradients), state_gradients.data(), state_gradients.size() * 2);
    copy(at(layout.corrected_values), u.data(), u.bytes());
    return (!params.shape.has_segment_ids ||
            accepted(sm90::launch_segment_table(call.forward, layout.forward, stream))) &&
           accepted(sm90::launch_chunk_gradient(call, layout, stream)) &&
           accepted(sm90::launch_gradient_reduce(call, layout, stream));
  }

  DeviceBuffer d_final_state, d_o, d_r, u;
  std::vector<uint16_t> states, state_gradients;
  BackwardWorkspace layout;
  std::vector<Output> outputs;
  Workspace workspace;
  BackwardParams call{};
};

// The case with random results of the scans.
StageCase with_scans(Case given, uint64_t seed = 2) {
  StageCase c{std::move(given), {}};
  Call& x = c.call;
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  auto fill = [&](std::vector<float>& out, int64_t count, float scale) {
    out.resize(count);
    for (float& value : out) value = round_bf16(scale * normal(generator));
  };
  for (auto* rows : {&c.scans.d_o, &c.scans.d_r, &c.scans.u}) fill(*rows, x.v.size(), 1.0f);
  for (auto* images : {&c.scans.states, &c.scans.state_gradients})
    fill(*images, x.B * x.HV * ((x.T + kChunk - 1) / kChunk) * kStateFloats, 0.3f);
  if (!x.beta_is_logits)  // d_beta of these is <dR, U> / beta^2
    for (float& beta : x.beta) beta = round_bf16(0.05f + beta);
  c.limit = 0.008;
  return c;
}

StageCase stage_case(std::string name, Call shape, Regime regime = {}) {
  return with_scans(make_case(std::move(name), std::move(shape), regime));
}

StageCase with_states(StageCase c) {
  add_initial_state(c);
  c.scans.d_final_state = c.call.initial_state;
  std::reverse(c.scans.d_final_state.begin(), c.scans.d_final_state.end());
  return c;
}

StageCase packed_stage_case(std::string name, int64_t B, int64_t HV, int64_t N,
                            const std::vector<std::pair<int32_t, int64_t>>& runs) {
  return with_states(with_scans(packed_case(std::move(name), B, HV, N, ids_from_lengths(runs))));
}

bool check(const StageCase& c) {
  Launch launch(c);
  bool good = launch.run(0xFF), accurate = true;
  const oracle::Gradients truth = oracle::gradients(c.call, c.scans);
  const std::vector<double>* expected[] = {&truth.dq,     &truth.dk,     &truth.dg,
                                           &truth.d_beta, &truth.dA_log, &truth.d_dt_bias};
  const std::vector<double>* squares[] = {
      nullptr, nullptr, nullptr, nullptr, &truth.dA_log_size, &truth.d_dt_bias_size};
  std::printf("%-40s", c.name.c_str());
  for (int i = 0; i < 6; ++i) {
    const std::vector<float> got = launch.outputs[i].values();
    if (got.empty()) continue;
    const double error =
        relative_rms(*expected[i], [&](size_t at) { return double(got[at]); }, squares[i]);
    std::printf(" %s %.1e", launch.outputs[i].name, error);
    accurate &= error <= (i < 2 ? c.limit : c.gate_limit);  // false for NaN
  }
  const bool repeats = launch.repeats(good);
  std::printf("%s%s%s\n", accurate ? "" : "  INACCURATE", repeats ? "" : "  NOT REPEATABLE",
              good ? "" : "  FAILED");
  std::fflush(stdout);
  return good && accurate && repeats;
}

std::vector<StageCase> stage_cases(bool quick) {
  using G = oracle::Gate;
  std::vector<StageCase> list;
  for (int64_t T : {1, 15, 16, 17, 31, 63, 64, 65, 129})
    list.push_back(stage_case("log_decay T " + std::to_string(T), shape(1, T, 1, 1)));
  list.push_back(stage_case("softplus, logits, l2norm", raw_shape(G::kSoftplus, 2, 100, 2, 2)));
  list.push_back(stage_case("softplus, fast", raw_shape(G::kSoftplus, 1, 200, 2, 2),
                            {Regime::kRandom, Regime::kFast}));
  list.push_back(stage_case("bounded, logits, l2norm", raw_shape(G::kBounded, 1, 200, 1, 1)));
  list.push_back(stage_case("bounded, fast, GVA", raw_shape(G::kBounded, 1, 200, 1, 2),
                            {Regime::kRandom, Regime::kFast}));
  list.push_back(with_states(stage_case("log decay, resets, GVA, states", shape(1, 200, 1, 3),
                                        {Regime::kRandom, Regime::kReset})));
  list.push_back(
      packed_stage_case("packed", 1, 2, 3, {{1, 70}, {2, 1}, {3, 64}, {0, 5}, {9, 100}}));
  {
    StageCase c = stage_case("fp32 gate and beta", raw_shape(G::kSoftplus, 1, 150, 2, 2));
    c.g_bf16 = c.beta_bf16 = false;
    list.push_back(with_states(std::move(c)));
  }
  list.push_back(stage_case("-50 a token", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kFifty}));
  if (quick) return list;
  list.push_back(stage_case("softplus, fp32 gate, tail 17", raw_shape(G::kSoftplus, 1, 81, 1, 1),
                            {Regime::kRandom, Regime::kFast}));
  list.back().g_bf16 = false;
  list.push_back(stage_case("log decay, fp32 gate, resets", shape(1, 200, 1, 1),
                            {Regime::kRandom, Regime::kReset}));
  list.back().g_bf16 = false;
  list.push_back(
      stage_case("log decay, fast", shape(1, 200, 1, 1), {Regime::kRandom, Regime::kFast}));
  list.push_back(
      stage_case("log decay, bound", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kBound}));
  list.push_back(
      stage_case("log decay, none", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kNone}));
  list.push_back(
      stage_case("log decay, mixed", shape(1, 200, 2, 2), {Regime::kRandom, Regime::kMixed}));
  list.push_back(
      stage_case("-1000 a token", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kDead}));
  list.push_back(stage_case("bounded, at the bound", raw_shape(G::kBounded, 1, 130, 1, 1),
                            {Regime::kRandom, Regime::kBound}));
  for (auto keys : {Regime::kIdentical, Regime::kNear, Regime::kZero}) {
    const char* name = keys == Regime::kIdentical ? "identical keys"
                       : keys == Regime::kNear    ? "near keys"
                                                  : "zero keys";
    for (auto gates : {Regime::kSlow, Regime::kFast, Regime::kNone, Regime::kReset})
      list.push_back(stage_case(std::string(name) + ", gates " + std::to_string(gates),
                                shape(1, 130, 1, 1), {keys, gates}));
    list.push_back(stage_case(std::string(name) + ", softplus",
                              raw_shape(G::kSoftplus, 1, 130, 1, 1), {keys, Regime::kSlow}));
  }
  {
    Call c = raw_shape(G::kSoftplus, 1, 130, 2, 2);
    c.allow_neg_eigval = true;
    list.push_back(stage_case("negative eigenvalues", std::move(c)));
    Call d = raw_shape(G::kSoftplus, 1, 130, 2, 4);
    d.qk_l2norm = false;
    list.push_back(with_states(stage_case("softplus, no norm, GVA", std::move(d))));
    StageCase e = stage_case("bounded, no A_log, no dt_bias", raw_shape(G::kBounded, 1, 100, 1, 1));
    e.call.A_log.clear();
    e.call.dt_bias.clear();
    list.push_back(std::move(e));
  }
  list.push_back(packed_stage_case("packed, two rows, few slots", 2, 3, 2,
                                   {{1, 17}, {2, 63}, {3, 15}, {0, 33}, {5, 128}}));
  list.push_back(packed_stage_case("packed, tokens alone", 1, 1, 40, [] {
    std::vector<std::pair<int32_t, int64_t>> runs;
    for (int i = 0; i < 40; ++i) runs.push_back({i + 1, 1 + i % 3});
    return runs;
  }()));
  list.push_back(with_states(stage_case("many chunks", raw_shape(G::kSoftplus, 1, 2000, 2, 2))));
  return list;
}

void set_nan(std::vector<float>& x, int64_t from, int64_t to) {
  std::fill(x.begin() + from, x.begin() + to, NAN);
}

// NaN in one segment and in padding changes no bit of the other segments' gradients.
bool check_isolation() {
  const StageCase clean = packed_stage_case("", 1, 2, 4, {{1, 70}, {2, 100}, {0, 20}, {3, 65}});
  StageCase c = clean;
  Call& x = c.call;
  const int64_t slots = (x.T + 63) / 64;
  const std::pair<int64_t, int64_t> ranges[] = {{70, 170}, {170, 190}};
  for (const auto& [low, high] : ranges) {
    for (auto [rows, row] : token_rows(x)) set_nan(*rows, low * row, high * row);
    for (auto* rows : {&c.scans.d_o, &c.scans.d_r, &c.scans.u})
      set_nan(*rows, low * x.HV * 128, high * x.HV * 128);
  }
  for (int64_t h = 0; h < x.HV; ++h) {
    // The one boundary inside the second segment is at token 134, and slot 0 is nobody's.
    for (auto* images : {&c.scans.states, &c.scans.state_gradients})
      for (int64_t slot : {int64_t{2}, int64_t{0}})
        set_nan(*images, (h * slots + slot) * 16384, (h * slots + slot + 1) * 16384);
    for (auto* states : {&x.initial_state, &c.scans.d_final_state})
      set_nan(*states, (x.HV + h) * 16384, (x.HV + h + 1) * 16384);
  }
  Launch a(clean), b(c);
  const bool good = a.run(0xFF) && b.run(0xFF);
  bool same = true, cleared = true;
  for (size_t i = 0; i < a.outputs.size(); ++i) {
    if (i == 4 || i == 5) continue;  // sums over tokens
    const auto clean_bytes = a.outputs[i].bytes(), bytes = b.outputs[i].bytes();
    const int64_t row = int64_t(bytes.size()) / x.T;
    auto equal = [&](int64_t low, int64_t high) {
      return std::equal(bytes.begin() + low * row, bytes.begin() + high * row,
                        clean_bytes.begin() + low * row);
    };
    same &= equal(0, 70) && equal(170, x.T);
    cleared &= std::all_of(bytes.begin() + 170 * row, bytes.begin() + 190 * row,
                           [](uint8_t byte) { return byte == 0; });
  }
  std::printf("%-40s %s%s\n", "NaN in neighbours", same ? "no bit changed" : "BITS CHANGED",
              cleared ? "" : ", PADDING NOT CLEARED");
  return good && same && cleared;
}

// d_beta of chunks of few tokens, behind others and alone, with slots and without, is fp32.
bool check_few_tokens(oracle::Gate gate, bool g_bf16) {
  // Two rows of 260 tokens.
  const std::vector<std::pair<int32_t, int64_t>> runs = {
      {1, 65}, {2, 1},   {3, 2}, {0, 2}, {4, 131}, {5, 3},  {6, 1},
      {7, 55}, {8, 194}, {9, 4}, {8, 2}, {9, 1},   {3, 55}, {1, 4}};
  StageCase c = packed_stage_case("", 2, 3, 5, runs);
  Call& x = c.call;
  x.gate = gate, c.g_bf16 = g_bf16, c.beta_bf16 = false;
  if (gate == oracle::Gate::kLogDecay) {
    x.A_log.clear(), x.dt_bias.clear();
    for (float& value : x.g) value = -std::fabs(value);
    x.beta_is_logits = x.qk_l2norm = false;
  }
  Launch launch(c);
  const bool good = launch.run(0xFF);
  const std::vector<float> got = launch.outputs[3].values();
  const oracle::Gradients truth = oracle::gradients(x, c.scans);
  double error = 0.0, size = 0.0;
  int64_t count = 0;
  for (const oracle::ChunkRange& chunk : oracle::chunks_of(x))
    for (int64_t i = 0; i < chunk.length * x.HV; ++i) {
      if (chunk.length > jax_flashkda::chunk_gradient::Config::kFewTokens || chunk.segment < 0) break;
      const int64_t at = (chunk.row * x.T + chunk.start) * x.HV + i;
      const double difference = got[at] - truth.d_beta[at];
      error += difference * difference, size += truth.d_beta[at] * truth.d_beta[at], ++count;
    }
  const double relative = std::sqrt(error / size);
  const bool fine = count > 0 && relative <= 2e-5;  // false for NaN
  std::printf("%-40s d_beta %.1e of %ld%s\n", "chunks of few tokens", relative, long(count),
              fine ? "" : "  INACCURATE");
  return good && fine;
}

// Twice the cotangents, twice the gradients, bit by bit.
bool check_doubling(Regime::Gates gates) {
  const StageCase once = with_states(stage_case("", shape(1, 200, 1, 2), {Regime::kRandom, gates}));
  StageCase twice = once;
  oracle::ScanResults& scans = twice.scans;
  for (auto* x : {&scans.d_o, &scans.d_r, &scans.state_gradients, &scans.d_final_state})
    for (float& value : *x) value *= 2.0f;
  Launch a(once), b(twice);
  const bool good = a.run(0xFF) && b.run(0xFF);
  bool same = true;
  for (int i = 0; i < 4; ++i) {
    const auto x = a.outputs[i].values(), y = b.outputs[i].values();
    for (size_t at = 0; at < x.size(); ++at) same &= 2.0f * x[at] == y[at];
  }
  std::printf("%-40s %s\n", "doubled cotangents", same ? "doubled gradients" : "NOT DOUBLED");
  return good && same;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && argv[1] == std::string("--quick");
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  Tally tally;
  for (const StageCase& c : stage_cases(quick)) tally(check(c));
  for (auto gate : {oracle::Gate::kSoftplus, oracle::Gate::kBounded, oracle::Gate::kLogDecay})
    for (bool g_bf16 : {true, false}) tally(check_few_tokens(gate, g_bf16));
  tally(check_isolation());
  tally(check_doubling(Regime::kSlow));
  tally(check_doubling(Regime::kMixed));
  return tally.exit_status();
}
