// The forward against a float64 recurrence, without XLA: exact-size allocations, poisoned outputs
// and workspace, a canary behind the workspace, bitwise repeats, several streams, isolation and
// packing. Prints a line a case; exit status 1 on failure.
//   forward_test [--quick | --large | --random N [--seed S] [--promise]] [--unpoisoned]
//   --quick: small cases alone, for compute-sanitizer. --large: offsets beyond 2^31 elements and
//   more than 65,535 (segment, head) pairs, some 50 GB. --random: N calls of random_cases.h.
//   --promise: each is held to the promise (judged_draws.h).
//   --unpoisoned: results and workspace as allocated, for initcheck.
#include <algorithm>
#include <random>
#include <string>

#include "judged_draws.h"
#include "backward_oracle.h"
#include "launch.h"

namespace {

using namespace jax_flashkda;

// A call on the device, and its results.
struct Launch : Inputs, Runs<Launch> {
  explicit Launch(const Case& c) : Inputs(c), workspace(forward_workspace_bytes(params.shape)) {
    const Call& x = c.call;
    outputs.emplace_back("o", x.v.size(), true);
    outputs.emplace_back("state", c.want_final ? x.B * x.N * x.HV * kStateFloats : 0, false);
    outputs.emplace_back("chunk states",
                         c.want_chunk_states ? x.B * (x.T / kChunk) * x.HV * kStateFloats : 0,
                         false);
    params.o = outputs[0].buffer.data();
    params.final_state = static_cast<float*>(outputs[1].buffer.data());
    params.chunk_states = static_cast<float*>(outputs[2].buffer.data());
    params.workspace = workspace.data();
  }

  bool enqueue(cudaStream_t stream) { return accepted(forward(params, stream)); }

  std::vector<uint16_t> output_bits() const { return outputs[0].buffer.download<uint16_t>(); }
  std::vector<uint32_t> state_bits() const { return outputs[1].buffer.download<uint32_t>(); }
  std::vector<uint32_t> chunk_state_bits() const { return outputs[2].buffer.download<uint32_t>(); }

  std::vector<Output> outputs;
  Workspace workspace;
};

// Whether a token's run is short, for each.
std::vector<bool> in_short_runs(const Call& x) {
  std::vector<bool> is_short(x.B * x.T, x.T <= kShortTokens);
  if (!x.has_segment_ids) return is_short;
  auto key = [&](int64_t at) {
    const int32_t id = x.segment_ids[at];
    return id < 0 || (x.has_padding_segment_id && id == x.padding_segment_id) ? -1 : id;
  };
  for (int64_t row = 0; row < x.B; ++row)
    for (int64_t start = row * x.T, end; start < (row + 1) * x.T; start = end) {
      for (end = start; end < (row + 1) * x.T && key(end) == key(start); ++end) {
      }
      std::fill(is_short.begin() + start, is_short.begin() + end, end - start <= kShortTokens);
    }
  return is_short;
}

// Equal outputs; but for short runs, where one of the calls has them apart and the other has not.
bool equal_outputs(const Case& c, const Launch& a, const Launch& b) {
  const auto x = a.output_bits(), y = b.output_bits();
  if (leaves_short_runs(a.params) == leaves_short_runs(b.params)) return x == y;
  const std::vector<bool> is_short = in_short_runs(c.call);
  const int64_t row = c.call.HV * Call::V;
  bool equal = true;
  for (size_t token = 0; token < is_short.size(); ++token) {
    const auto from = x.begin() + token * row;
    equal &= is_short[token] || std::equal(from, from + row, y.begin() + token * row);
  }
  return equal;
}

bool check(const Case& c) {
  Launch launch(c);
  bool good = launch.run(0xFF);  // NaN in every type
  const auto first = launch.bits();
  const oracle::Result truth = oracle::forward(c.call);
  auto error_of = [](const Output& output, const std::vector<double>& expected) {
    const std::vector<float> got = output.values();
    return got.empty() ? 0.0 : relative_rms(expected, [&](size_t i) { return double(got[i]); });
  };
  const double o_error = error_of(launch.outputs[0], truth.o),
               state_error = error_of(launch.outputs[1], truth.final_state);
  bool accurate = o_error <= c.limit && state_error <= c.limit;  // false for NaN
  bool repeats = launch.repeats(good);
  for (StageOrder order : {StageOrder::kSerial, StageOrder::kOverlapped}) {
    launch.params.stage_order = order;
    good &= launch.run(0xFF);
    repeats &= launch.bits() == first;
  }
  // The output is the same whether or not anybody asks for the final state.
  Case other = c;
  other.want_final = !c.want_final;
  Launch without(other);
  good &= without.run(0xFF);
  const bool same = equal_outputs(c, without, launch);
  if (leaves_short_runs(without.params)) {
    accurate &= error_of(without.outputs[0], truth.o) <= c.limit;
    repeats &= without.repeats(good);
  }
  std::printf("%-44s o %.2e  state %.2e  (limit %.3f)%s%s%s\n", c.name.c_str(), o_error,
              state_error, c.limit, accurate ? "" : "  INACCURATE",
              repeats ? "" : "  NOT REPEATABLE", same ? "" : "  DEPENDS ON THE FINAL STATE");
  std::fflush(stdout);
  return good && accurate && repeats && same;
}

Verdict judge_draw(const Case& c, uint64_t seed, bool promise) {
  Verdict verdict;
  Launch launch(c);
  launch.params.stage_order =
      std::vector{StageOrder::kByShape, StageOrder::kSerial, StageOrder::kOverlapped}[seed % 3];
  if (!launch.run(0xFF)) verdict.failures += "  did not run";
  const oracle::Result truth = oracle::forward(c.call, /*workers=*/1);
  judge_outputs(verdict, c, truth, launch.outputs[0].values(), launch.outputs[1].values(), promise);
  return verdict;
}

// Segments of every short length beside longer ones and padding, in calls without states, which
// leave them to a stage of their own; and rows of such lengths.
std::vector<Case> short_cases() {
  using G = oracle::Gate;
  std::vector<std::pair<int32_t, int64_t>> runs;
  for (int32_t length = 1; length <= kShortTokens + 1; ++length) {
    runs.push_back({length, length});
    if (length % 4 == 0) runs.push_back({length % 8 == 0 ? 0 : -length, length % 7 + 1});
    if (length % 16 == 0) runs.push_back({100 + length, 60 + length});
  }
  for (int32_t i = 0; i < 9; ++i) runs.push_back({200 + i, 1 + i % 3});
  runs.push_back({0, 40});
  const std::vector<int32_t> ids = ids_from_lengths(runs);
  std::vector<Case> list;
  auto add = [&](const char* name, Call call, Regime regime = {}) -> Case& {
    call.has_segment_ids = call.has_padding_segment_id = true;
    list.push_back(make_case(std::string("short, ") + name, std::move(call), regime));
    list.back().call.segment_ids = ids;
    list.back().want_final = false;
    if (regime.keys != Regime::kRandom) list.back().limit = 0.06;
    return list.back();
  };
  const int64_t T = int64_t(ids.size());
  const Call raw = raw_shape(G::kSoftplus, 1, T, 2, 2), plain = shape(1, T, 1, 2),
             bounded = raw_shape(G::kBounded, 1, T, 1, 3);
  add("softplus", raw);
  add("softplus, fast", raw, {Regime::kRandom, Regime::kFast});
  add("softplus, raw 30: every block pairwise", raw, {Regime::kRandom, Regime::kBound});
  add("bounded, GVA 1 / 3, fast", bounded, {Regime::kRandom, Regime::kFast});
  add("bounded, GVA 1 / 3, at the bound", bounded, {Regime::kRandom, Regime::kBound});
  add("log decay", plain);
  for (auto [gates, text] : {std::pair{Regime::kFast, "log decay, fast"},
                             {Regime::kBound, "log decay, bound"},
                             {Regime::kNone, "log decay, none"},
                             {Regime::kReset, "log decay, resets"},
                             {Regime::kOneAlive, "log decay, one channel alive"},
                             {Regime::kFifty, "log decay, -50"},
                             {Regime::kDead, "log decay, -1000"},
                             {Regime::kMixed, "log decay, mixed"}})
    add(text, plain, {Regime::kRandom, gates});
  for (auto [keys, text] : {std::pair{Regime::kIdentical, "identical keys"},
                            {Regime::kNear, "near-identical keys"},
                            {Regime::kZero, "zero keys"}}) {
    add(text, raw, {keys, Regime::kSlow});
    add((std::string(text) + ", no decay").c_str(), plain, {keys, Regime::kNone});
  }
  Case& wide = add("f32 gate and beta", plain);
  wide.g_bf16 = wide.beta_bf16 = false;
  Call negative = raw;
  negative.allow_neg_eigval = true;
  add("allow_neg_eigval", negative).limit = 0.012;
  for (int64_t rows : {1, 2, 16, 17, 32}) {
    list.push_back(make_case("short rows of " + std::to_string(rows),
                             raw_shape(G::kSoftplus, 3, rows, 2, 4)));
    list.back().want_final = false;
  }
  return list;
}

// The forward of what state_maps has prepared leaves the bits of one that prepares for itself and
// cuts no row, and reads no q, k, g and beta.
bool check_prepared(const Case& c, const Prepared& prepared) {
  Launch whole(c), handed(c);
  whole.params.stage_order = StageOrder::kWholeRows;
  const bool ran = whole.run(0xFF);
  handed.poison(0xFF);
  for (DeviceBuffer* unread : {&handed.q, &handed.k, &handed.g, &handed.beta}) unread->fill(0xFF);
  Workspace workspace(prepared_forward_workspace_bytes(handed.params.shape));
  workspace.fill(0xFF);
  workspace.set_canary();
  ForwardParams params = handed.params;
  params.workspace = workspace.data();
  prepared.give_to(params);
  const auto before = prepared.bytes();
  const bool accepted_it = accepted(prepared_forward(params, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const bool same = handed.bits() == whole.bits() && prepared.bytes() == before;
  if (!same) std::printf("  the prepared forward differs");
  return ran && accepted_it && workspace.intact() && same;
}

// state_maps: M S + B of the segment that ends a row is its final state, from any state S. Slots for
// all segments and one more.
bool check_maps(Case c) {
  c.call.N = c.call.has_segment_ids ? 1 + oracle::most_segments(c.call) : 1;
  add_initial_state(c);
  Inputs inputs(c);
  const ForwardShape& s = inputs.params.shape;
  const int64_t maps = s.B * s.HV, state = s.K * s.V;
  DeviceBuffer factor(maps * state * 4), offset(maps * state * 4);
  const Prepared prepared(s);
  Workspace workspace(prepared_forward_workspace_bytes(s));
  StateMapsParams params{inputs.params, static_cast<float*>(factor.data()),
                         static_cast<float*>(offset.data())};
  params.forward.initial_state = nullptr;
  params.forward.workspace = workspace.data();
  prepared.give_to(params.forward);
  bool good = true;
  std::vector<uint32_t> bits[2];
  for (auto& of_run : bits) {
    if (poisoned) factor.fill(0xFF), offset.fill(0xFF), workspace.fill(0xFF);
    workspace.set_canary();
    const Status status = state_maps(params, nullptr);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    good &= status.ok() && workspace.intact();
    of_run = factor.download<uint32_t>();
    const auto more = offset.download<uint32_t>();
    of_run.insert(of_run.end(), more.begin(), more.end());
  }
  const bool repeats = bits[0] == bits[1];
  const auto M = factor.download<float>(), B = offset.download<float>();
  const auto final_state = oracle::forward(c.call).final_state;
  std::vector<double> behind, expected;
  for (int64_t b = 0; b < s.B; ++b) {
    const auto segments = oracle::runs(c.call, b);
    if (segments.empty() || segments.back().start + segments.back().length < s.T) continue;
    for (int64_t h = 0; h < s.HV; ++h) {
      const int64_t map = (b * s.HV + h) * state;
      const int64_t slot = ((b * s.N + segments.back().slot) * s.HV + h) * state;
      for (int64_t row = 0; row < s.K; ++row)
        for (int64_t v = 0; v < s.V; ++v) {
          double x = B[map + row * s.V + v];
          for (int64_t j = 0; j < s.K; ++j)
            x += double(M[map + row * s.K + j]) * c.call.initial_state[slot + j * s.V + v];
          behind.push_back(x);
          expected.push_back(final_state[slot + row * s.V + v]);
        }
    }
  }
  const double error = relative_rms(expected, [&](size_t i) { return behind[i]; });
  const bool accurate = error <= c.limit;  // false for NaN
  std::printf("%-44s M S + B %.2e  (limit %.3f)%s%s\n", c.name.c_str(), error, c.limit,
              accurate ? "" : "  INACCURATE", repeats ? "" : "  NOT REPEATABLE");
  return good && accurate && repeats && check_prepared(c, prepared);
}

std::vector<Case> map_cases() {
  using G = oracle::Gate;
  std::vector<Case> list;
  for (int64_t T : {1, 63, 64, 65, 200})
    list.push_back(make_case("maps, T " + std::to_string(T), raw_shape(G::kSoftplus, 2, T, 1, 2),
                             {Regime::kRandom, Regime::kSlow}));
  list.push_back(make_case("maps, GVA 2 / 6", raw_shape(G::kBounded, 2, 90, 2, 6)));
  list.push_back(
      make_case("maps, no decay", shape(1, 130, 1, 1), {Regime::kRandom, Regime::kNone}));
  list.push_back(make_case("maps, more than one a CTA", raw_shape(G::kSoftplus, 2, 280, 80, 80)));
  // A row that ends in padding, which has no maps, and segments before the one that ends a row.
  list.push_back(packed_case("maps, packed", 2, 2, 1,
                             ids_from_lengths({{0, 7}, {3, 150}, {-1, 43}, {5, 70}, {6, 130}})));
  return list;
}

// One segment of a packed row against the same tokens alone: equal bits, though its neighbours are
// NaN.
bool check_packing(int64_t HV, bool states) {
  std::vector<int64_t> lengths = {70, 1, 200, 64, 129};
  if (!states) lengths.insert(lengths.end(), {2, 1, 8, 9, 15, 16, 17, 31, 32, 33, 1});
  std::vector<std::pair<int32_t, int64_t>> runs;
  for (size_t i = 0; i < lengths.size(); ++i) runs.push_back({int32_t(i + 1), lengths[i]});
  Case packed =
      packed_case("packed", 1, HV, int64_t(lengths.size()), ids_from_lengths(runs), states);
  packed.want_final = states;
  bool good = true;
  int64_t start = 0;
  for (size_t n = 0; n < lengths.size(); start += lengths[n++]) {
    const int64_t state = HV * Call::K * Call::V;
    Launch a(packed), b(cut_out(packed, start, lengths[n], n)),
        c(spoil_around(packed, start, lengths[n], n));
    good &= a.run(0xFF) && b.run(0xFF) && c.run(0xFF);
    const auto ao = a.output_bits(), bo = b.output_bits(), co = c.output_bits();
    const auto as = a.state_bits(), bs = b.state_bits(), cs = c.state_bits();
    const int64_t slot = states ? n * state : 0;
    const bool outputs = std::equal(bo.begin(), bo.end(), ao.begin() + start * HV * 128) &&
                         std::equal(bo.begin(), bo.end(), co.begin() + start * HV * 128);
    const bool same_states = std::equal(bs.begin(), bs.end(), as.begin() + slot) &&
                             std::equal(bs.begin(), bs.end(), cs.begin() + slot);
    if (!outputs || !same_states)
      std::printf("  segment %zu of length %ld differs from itself alone (output %d, state %d)\n",
                  n, lengths[n], outputs, same_states);
    good &= outputs && same_states;
  }
  std::printf("%-44s %s\n",
              ("packed equals alone, NaN neighbours, H " + std::to_string(HV) +
               (states ? "" : ", no states"))
                  .c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// The states after every 64 tokens of a segment against the final states of calls that end there,
// zeros between them: equal bits; and they change no bit of the other results.
bool check_chunk_states(int64_t HV) {
  const std::vector<std::pair<int32_t, int64_t>> layout = {{1, 150}, {2, 64}, {0, 20}, {3, 63},
                                                           {4, 193}, {0, 3},  {5, 70}};
  const Case plain = packed_case("", 1, HV, 4, ids_from_lengths(layout));  // the fifth has no slot
  Case c = plain;
  c.want_chunk_states = true;
  const size_t state = HV * Call::K * Call::V;
  std::vector<uint32_t> expected(c.call.T / kChunk * state, 0);
  bool good = true;
  int64_t start = 0, slot = 0;
  for (const auto& [id, length] : layout) {
    for (int64_t end = kChunk; id > 0 && end <= length; end += kChunk) {
      Launch alone(cut_out(plain, start, end, slot));
      good &= alone.run(0xFF);
      const auto bits = alone.state_bits();
      std::copy(bits.begin(), bits.end(), expected.begin() + ((start + end) / kChunk - 1) * state);
    }
    start += length, slot += id > 0;
  }
  Launch without(plain), with(c);
  good &= without.run(0xFF);
  for (int byte : {0xFF, 0x3C})
    good &= with.run(byte) && with.chunk_state_bits() == expected &&
            with.output_bits() == without.output_bits() &&
            with.state_bits() == without.state_bits();
  std::printf("%-44s %s\n", ("states inside rows, H " + std::to_string(HV)).c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// A row that would be cut into pieces goes on from a state inside it: equal bits where both calls
// ask for such states.
bool check_continued() {
  Case c = make_case("", raw_shape(oracle::Gate::kSoftplus, 1, 4133, 1, 2));
  add_initial_state(c);
  c.want_chunk_states = true;
  Launch whole(c);
  bool good = state_pieces(whole.params.shape).count > 1 && whole.run(0xFF);
  const std::vector<float> states = whole.outputs[2].values();
  const int64_t state = 2 * Call::K * Call::V;
  for (int64_t cut : {64, 2048}) {
    Case rest = cut_out(c, cut, c.call.T - cut, 0);
    const auto from = states.begin() + (cut / kChunk - 1) * state;
    rest.call.initial_state = std::vector<float>(from, from + state);
    Launch tail(rest);
    good &= tail.run(0xFF) && tail.state_bits() == whole.state_bits();
    const auto a = tail.output_bits(), b = whole.output_bits();
    good &= std::equal(a.begin(), a.end(), b.end() - a.size());
    const auto x = tail.chunk_state_bits(), y = whole.chunk_state_bits();
    good &= std::equal(x.begin(), x.end(), y.end() - x.size());
  }
  std::printf("%-44s %s\n", "continued from a state inside", good ? "equal bits" : "FAILED");
  return good;
}

// Calls on four streams at once: the stages of a call overlap, in fewer places than they would have
// alone.
bool check_streams(int rounds, StageOrder order, bool of_short) {
  Case c = make_case("streams", raw_shape(oracle::Gate::kSoftplus, 1, 700, 4, 4));
  if (of_short) {
    c = packed_case("", 1, 4, 3, ids_from_lengths({{1, 5}, {2, 200}, {3, 1}, {4, 30}, {5, 290}}),
                    /*states=*/false);
    c.want_final = false;
  }
  std::vector<Launch> launches;
  for (int i = 0; i < 4; ++i) {
    launches.emplace_back(c);
    launches.back().params.stage_order = order;
  }
  const bool good = equal_on_streams(std::move(launches), Launch(c), rounds, 100);
  std::printf("%-44s %s\n",
              ("four streams, " + std::to_string(rounds) + " rounds" +
               (order == StageOrder::kOverlapped ? ", overlapped" : "") +
               (of_short ? ", short segments" : ""))
                  .c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// Captured into a graph and replayed.
bool check_graph(int replays, bool of_short) {
  bool good = true;
  Case c = packed_case("graph", 1, 4, 3,
                       ids_from_lengths({{1, 500}, {2, 200}, {3, of_short ? 9 : 90}}), !of_short);
  c.want_final = !of_short;
  for (StageOrder order : {StageOrder::kSerial, StageOrder::kOverlapped}) {
    Launch launch(c);
    good &= launch.run(0xFF);
    const auto o = launch.output_bits();
    launch.params.stage_order = order;
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    good &= launch.enqueue(stream) && launch.enqueue(stream);
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < replays; ++i) {
      launch.poison(0xFF);
      CHECK_CUDA(cudaDeviceSynchronize());
      CHECK_CUDA(cudaGraphLaunch(executable, stream));
      CHECK_CUDA(cudaDeviceSynchronize());
      good &= launch.output_bits() == o;
    }
    CHECK_CUDA(cudaGraphExecDestroy(executable));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
  }
  std::printf("%-44s %s\n",
              ("a graph, " + std::to_string(replays) + " replays" +
               (of_short ? ", short segments" : ""))
                  .c_str(),
              good ? "equal bits" : "FAILED");
  return good;
}

// A call whose operands were made on the device; segments of the given lengths fill its one row.
struct LargeCall {
  // N: slots of final states, 0 for none.
  LargeCall(int64_t H, const std::vector<int64_t>& lengths, int64_t N) {
    std::vector<int32_t> ids;
    for (size_t n = 0; n < lengths.size(); ++n) ids.insert(ids.end(), lengths[n], int32_t(n + 1));
    const int64_t T = int64_t(ids.size());
    uint32_t seed = 0;
    auto normal = [&](DeviceBuffer& buffer, int64_t count, float scale, float shift) {
      buffer = DeviceBuffer(count * 2);
      fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(buffer.data()), count, ++seed, scale,
                                 shift);
    };
    normal(q, T * H * 128, 1, 0);
    normal(k, T * H * 128, 1, 0);
    normal(v, T * H * 128, 1, 0);
    normal(g, T * H * 128, 0.1f, -0.5f);
    normal(beta, T * H, 1, 0);
    segment_ids = DeviceBuffer(ids.size() * 4);
    segment_ids.upload(ids);
    o = DeviceBuffer(T * H * 256);
    final_state = DeviceBuffer(N * H * Call::K * Call::V * 4);
    params.shape = {1, T, H, H, Call::K, Call::V, std::max<int64_t>(N, 1), true};
    params.qkv_dtype = params.g_dtype = params.beta_dtype = DType::kBF16;
    params.q = q.data(), params.k = k.data(), params.v = v.data(), params.g = g.data(),
    params.beta = beta.data();
    params.segment_ids = static_cast<int32_t*>(segment_ids.data());
    params.o = o.data();
    params.final_state = N > 0 ? static_cast<float*>(final_state.data()) : nullptr;
    params.beta_is_logits = params.qk_l2norm = true;
    params.scale = 0.125f;
  }

  // Tokens start .. start + length - 1 in a call of their own, against segment n of this one.
  bool equals_alone(int64_t start, int64_t length, int64_t n) {
    const int64_t H = params.shape.H, row = H * 128, state = H * Call::K * Call::V;
    ForwardParams alone = params;
    auto shift = [&](const void*& pointer, int64_t elements) {
      pointer = static_cast<const char*>(pointer) + start * elements * 2;
    };
    shift(alone.q, row), shift(alone.k, row), shift(alone.v, row), shift(alone.g, row),
        shift(alone.beta, H);
    alone.shape.T = length, alone.shape.N = 1, alone.shape.has_segment_ids = false,
    alone.segment_ids = nullptr;
    const bool states = params.final_state != nullptr;
    DeviceBuffer own_o(length * row * 2), own_state(states ? state * 4 : 0),
        scratch(forward_workspace_bytes(alone.shape));
    own_o.fill(0xFF), own_state.fill(0xFF);
    alone.o = own_o.data(), alone.workspace = scratch.data();
    alone.final_state = states ? static_cast<float*>(own_state.data()) : nullptr;
    if (!forward(alone, nullptr).ok()) return false;
    const auto expected = own_o.download<uint16_t>();
    const auto expected_state = own_state.download<uint32_t>();
    std::vector<uint16_t> got(expected.size());
    std::vector<uint32_t> got_state(expected_state.size());
    CHECK_CUDA(cudaMemcpy(got.data(), static_cast<char*>(params.o) + start * row * 2,
                          got.size() * 2, cudaMemcpyDeviceToHost));
    if (states)
      CHECK_CUDA(cudaMemcpy(got_state.data(), params.final_state + n * state, got_state.size() * 4,
                            cudaMemcpyDeviceToHost));
    const bool finite =
        std::none_of(got.begin(), got.end(), [](uint16_t x) { return (x & 0x7f80) == 0x7f80; });
    return finite && got == expected && got_state == expected_state;
  }

  bool run() {
    DeviceBuffer scratch(forward_workspace_bytes(params.shape));
    scratch.fill(0xFF), o.fill(0xFF), final_state.fill(0xFF);
    params.workspace = scratch.data();
    const Status status = forward(params, nullptr);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    return status.ok();
  }

  DeviceBuffer q, k, v, g, beta, segment_ids, o, final_state;
  ForwardParams params{};
};

bool check_large_offsets() {
  bool good = true;
  {
    LargeCall call(128, {131100, 100}, 2);  // 2.15e9 elements an operand
    good &= call.run() && call.equals_alone(131100, 100, 1);
  }
  LargeCall call(128, {131100, 17, 1, 32}, 0);
  good &= call.run() && call.equals_alone(131100, 17, 1) && call.equals_alone(131117, 1, 2) &&
          call.equals_alone(131118, 32, 3);
  std::printf("%-44s %s\n", "T H K beyond 2^31, the last tokens", good ? "equal bits" : "FAILED");
  return good;
}

bool check_many_pairs(bool states) {
  std::vector<int64_t> lengths(1100);
  std::vector<int64_t> starts(lengths.size());
  int64_t T = 0;
  for (size_t n = 0; n < lengths.size(); T += lengths[n++])
    starts[n] = T, lengths[n] = 1 + int64_t(n * 7 % 70);
  LargeCall call(64, lengths, states ? int64_t(lengths.size()) : 0);
  bool good = call.run();
  for (int64_t n : {0, 1, 511, 1023, 1024, 1099})
    good &= call.equals_alone(starts[n], lengths[n], n);
  std::printf("%-44s %s\n",
              states ? "70,400 (segment, head) pairs" : "70,400 (segment, head) pairs, no states",
              good ? "equal bits" : "FAILED");
  return good;
}

bool check_refusals() {
  Case c = make_case("refusals", shape(1, 10, 1, 1));
  Launch launch(c);
  auto refused_after = [&](auto change, const char* word) {
    ForwardParams params = launch.params;
    change(params);
    return refused(forward(params, nullptr), word);
  };
  bool good = true;
  good &= refused_after([](ForwardParams& p) { p.shape.HV = 3, p.shape.H = 2; }, "HV");
  good &= refused_after([](ForwardParams& p) { p.shape.K = 64; }, "K = 64");
  good &= refused_after([](ForwardParams& p) { p.q = static_cast<const char*>(p.q) + 2; },
                        "q is not aligned");
  good &= refused_after([](ForwardParams& p) { p.gate = Gate::kBounded, p.gate_lower_bound = -6; },
                        "gate_lower_bound");
  good &= refused_after([](ForwardParams& p) { p.gate = Gate::kSoftplus; }, "A_log");
  good &= launch.run(0xFF);  // the next valid call works
  std::printf("%-44s %s\n", "refusals", good ? "told" : "FAILED");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false, large = false;
  RandomRun random;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (read_random_option(argc, argv, i, random)) continue;
    quick |= option == "--quick";
    large |= option == "--large";
    poisoned &= option != "--unpoisoned";
  }
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  if (random.count > 0)
    return judge_draws("forward_test", random, kMostForwardPairs, judge_draw) == 0 ? 0 : 1;
  Tally tally;
  if (large) {
    tally(check_large_offsets());
    for (bool states : {true, false}) tally(check_many_pairs(states));
  } else {
    for (const Case& c : cases(quick)) tally(check(c));
    for (const Case& c : map_cases()) tally(check_maps(c));
    for (const Case& c : short_cases()) tally(check(c));
    for (bool states : {true, false}) {
      tally(check_packing(2, states));
      if (!quick) tally(check_packing(70, states));
    }
    tally(check_chunk_states(2));
    if (!quick) tally(check_chunk_states(70));
    tally(check_continued());
    for (StageOrder order : {StageOrder::kByShape, StageOrder::kOverlapped})
      for (bool of_short : {false, true}) tally(check_streams(quick ? 3 : 1000, order, of_short));
    for (bool of_short : {false, true}) tally(check_graph(quick ? 3 : 100, of_short));
    tally(check_refusals());
  }
  return tally.exit_status();
}
