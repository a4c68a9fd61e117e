// The short convolution, its gradients and its step against a float64 oracle, without XLA:
// exact-size allocations, poisoned outputs, bitwise repeats; segments of every length, padding,
// initial states; NaN in neighbours and in padding; a segment alone and packed; more elements than
// 2^31; slots that are negative, past the pool or named twice. Prints a line a case; exit status 1
// on failure.
//   short_conv_test [--quick]      --quick: no large call, for compute-sanitizer
#include <algorithm>
#include <climits>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "dispatch/dispatch.h"
#include "dtypes.h"

namespace {

using namespace jax_flashkda;

constexpr int64_t kW = kShortConvWidth, kJ = kShortConvHistory;
const float kNaN = std::nanf("");

struct Case {
  std::string name;
  int64_t B, T, C;
  DType dtype = DType::kBF16;
  bool silu = true, bias = false, initial = false;
  int64_t N = 1;
  std::vector<int32_t> ids = {};  // [B, T]; with `initial` the segments' slots, -1 at padding
  bool has_padding_id = true;
  int32_t padding_id = 0;

  ShortConvShape shape() const { return {B, T, C, initial ? N : 1}; }
  int32_t id(int64_t b, int64_t t) const { return ids.empty() ? 0 : ids[b * T + t]; }
  bool padding(int64_t b, int64_t t) const {
    return !ids.empty() && (id(b, t) < 0 || (has_padding_id && id(b, t) == padding_id));
  }
  // The first token of the run of token t.
  int64_t begin(int64_t b, int64_t t) const {
    while (t > 0 && id(b, t - 1) == id(b, t)) --t;
    return t;
  }
};

// A case's operands on the host, rounded to their types.
struct Operands {
  explicit Operands(const Case& c) {
    std::mt19937_64 generator(11);
    std::normal_distribution<float> normal;
    auto draw = [&](int64_t count, DType dtype, float scale) {
      std::vector<float> x(count);
      for (float& value : x) value = rounded(scale * normal(generator), dtype);
      return x;
    };
    x = draw(c.B * c.T * c.C, c.dtype, 1);
    d_y = draw(c.B * c.T * c.C, c.dtype, 1);
    kernel = draw(c.B * kW * c.C, DType::kF32, 0.5f);
    if (c.bias) bias = draw(c.B * c.C, DType::kF32, 0.5f);
    if (c.initial) state = draw(c.B * c.N * kJ * c.C, DType::kF32, 1);
  }
  std::vector<float> x, d_y, kernel, bias, state;
};

struct Truth {
  std::vector<double> y, dx, d_kernel, d_bias, d_state;
};

double silu(double z) { return z / (1.0 + std::exp(-z)); }
double silu_derivative(double z) {
  const double s = 1.0 / (1.0 + std::exp(-z));
  return s * (1.0 + z * (1.0 - s));
}

Truth oracle(const Case& c, const Operands& o) {
  const int64_t B = c.B, T = c.T, C = c.C, N = c.N;
  Truth truth;
  truth.y.assign(B * T * C, 0.0);
  truth.dx.assign(B * T * C, 0.0);
  truth.d_kernel.assign(B * kW * C, 0.0);
  truth.d_bias.assign(c.bias ? B * C : 0, 0.0);
  truth.d_state.assign(c.initial ? B * N * kJ * C : 0, 0.0);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t) {
      if (c.padding(b, t)) continue;
      const int64_t begin = c.begin(b, t), slot = c.id(b, t);
      for (int64_t i = 0; i < C; ++i) {
        // The input `age` tokens before, and where its gradient goes.
        auto tap = [&](int64_t age, double** gradient) {
          *gradient = nullptr;
          if (t - age >= begin) {
            *gradient = &truth.dx[(b * T + t - age) * C + i];
            return double(o.x[(b * T + t - age) * C + i]);
          }
          if (!c.initial || slot >= N) return 0.0;
          const int64_t at = ((b * N + slot) * kJ + kJ - age + t - begin) * C + i;
          *gradient = &truth.d_state[at];
          return double(o.state[at]);
        };
        double z = c.bias ? o.bias[b * C + i] : 0.0, *gradient;
        for (int64_t age = 0; age < kW; ++age)
          z += o.kernel[(b * kW + kW - 1 - age) * C + i] * tap(age, &gradient);
        const int64_t at = (b * T + t) * C + i;
        truth.y[at] = c.silu ? silu(z) : z;
        const double dz = o.d_y[at] * (c.silu ? silu_derivative(z) : 1.0);
        for (int64_t age = 0; age < kW; ++age) {
          const int64_t w = (b * kW + kW - 1 - age) * C + i;
          truth.d_kernel[w] += dz * tap(age, &gradient);
          if (gradient != nullptr) *gradient += dz * o.kernel[w];
        }
        if (c.bias) truth.d_bias[b * C + i] += dz;
      }
    }
  return truth;
}

int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// A case on the device.
struct Launch {
  Launch(const Case& c, const Operands& o)
      : x(upload(o.x, c.dtype)),
        d_y(upload(o.d_y, c.dtype)),
        kernel(upload(o.kernel, DType::kF32)),
        bias(upload(o.bias, DType::kF32)),
        state(upload(o.state, DType::kF32)),
        ids(c.ids.size() * 4),
        y(o.x.size() * size_of(c.dtype)),
        dx(o.x.size() * size_of(c.dtype)),
        d_kernel(o.kernel.size() * 4),
        d_bias(o.bias.size() * 4),
        d_state(o.state.size() * 4),
        workspace(short_conv_workspace_bytes(c.shape())) {
    ids.upload(c.ids);
    ShortConvParams& f = params.forward;
    f.shape = c.shape();
    f.dtype = c.dtype;
    f.x = x.data(), f.kernel = floats(kernel), f.bias = floats(bias);
    f.initial_state = floats(state);
    f.segment_ids = static_cast<int32_t*>(ids.data());
    f.silu = c.silu;
    f.has_padding_segment_id = c.has_padding_id, f.padding_segment_id = c.padding_id;
    params.d_y = d_y.data(), params.dx = dx.data();
    params.d_kernel = floats(d_kernel), params.d_bias = floats(d_bias);
    params.d_initial_state = floats(d_state), params.workspace = workspace.data();
  }
  static float* floats(const DeviceBuffer& buffer) { return static_cast<float*>(buffer.data()); }

  bool run(int byte) {
    for (DeviceBuffer* buffer : {&y, &dx, &d_kernel, &d_bias, &d_state, &workspace})
      buffer->fill(byte);
    ShortConvParams forward = params.forward;
    forward.y = y.data();
    for (const Status& status : {convolve(forward, nullptr), convolve_backward(params, nullptr)}) {
      if (status.ok()) continue;
      std::printf("  %s\n", status.message.c_str());
      return false;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    return true;
  }
  bool same_bits(const Launch& other) const {
    auto equal = [](const DeviceBuffer& a, const DeviceBuffer& b) {
      return a.download<uint8_t>() == b.download<uint8_t>();
    };
    return equal(y, other.y) && equal(dx, other.dx) && equal(d_kernel, other.d_kernel) &&
           equal(d_bias, other.d_bias) && equal(d_state, other.d_state);
  }

  DeviceBuffer x, d_y, kernel, bias, state, ids, y, dx, d_kernel, d_bias, d_state, workspace;
  ShortConvBackwardParams params{};
};

// The largest error in units of what is allowed: a rounding of each value to its type, and fp32's
// own error of the largest. Infinite for NaN; exact zeros where all is zero.
double excess(const std::vector<double>& truth, const std::vector<float>& got, DType dtype) {
  double largest = 0.0, worst = 0.0;
  for (double x : truth) largest = std::max(largest, std::fabs(x));
  const double eps = dtype == DType::kF32 ? 4e-6 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::fabs(got[i] - truth[i]);
    if (error == 0.0) continue;
    const double units = error / (eps * std::fabs(truth[i]) + 4e-6 * largest);
    worst = std::isnan(units) ? INFINITY : std::max(worst, units);
  }
  return worst;
}

bool check(const Case& c) {
  const Operands o(c);
  const Truth truth = oracle(c, o);
  Launch launch(c, o), again(c, o);
  bool good = launch.run(0xFF);
  const double errors[] = {
      excess(truth.y, download(launch.y, c.dtype), c.dtype),
      excess(truth.dx, download(launch.dx, c.dtype), c.dtype),
      excess(truth.d_kernel, download(launch.d_kernel, DType::kF32), DType::kF32),
      excess(truth.d_bias, download(launch.d_bias, DType::kF32), DType::kF32),
      excess(truth.d_state, download(launch.d_state, DType::kF32), DType::kF32),
  };
  const bool accurate = *std::max_element(std::begin(errors), std::end(errors)) <= 1.0;
  bool repeats = true;
  for (int byte : {0x3C, 0xFF, 0xFF}) {
    good &= again.run(byte);
    repeats &= again.same_bits(launch);
  }
  std::printf("%-44s y %.2f  dx %.2f  d_kernel %.2f  d_bias %.2f  d_initial_state %.2f%s%s\n",
              c.name.c_str(), errors[0], errors[1], errors[2], errors[3], errors[4],
              accurate ? "" : "  INACCURATE", repeats ? "" : "  NOT REPEATABLE");
  return good && accurate && repeats;
}

bool report(const char* name, bool good, const char* word) {
  std::printf("%-44s %s\n", name, good ? word : "FAILED");
  return good;
}

// Ids of segments with these lengths; a negative length is padding.
std::vector<int32_t> ids_of(const std::vector<int64_t>& lengths, int32_t padding = 0) {
  std::vector<int32_t> ids;
  int32_t segment = 0;
  for (int64_t length : lengths)
    ids.insert(ids.end(), std::abs(length), length < 0 ? padding : ++segment);
  return ids;
}

// The same as slots: segments count from 0, padding is -1.
std::vector<int32_t> slots_of(std::vector<int32_t> ids) {
  for (int32_t& id : ids) --id;
  return ids;
}

std::vector<int64_t> random_lengths(int64_t T, int64_t longest, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int64_t> lengths;
  while (T > 0) {
    const int64_t length = std::min<int64_t>(T, 1 + generator() % longest);
    lengths.push_back(generator() % 5 == 0 ? -length : length);
    T -= length;
  }
  return lengths;
}

// Bits of x [T, C] at tokens [low, high).
std::vector<uint16_t> tokens_of(const DeviceBuffer& x, int64_t C, int64_t low, int64_t high) {
  const auto all = x.download<uint16_t>();
  return {all.begin() + low * C, all.begin() + high * C};
}

// What lies outside a segment, NaN included, changes none of its bits; a segment's bits are those
// it has alone.
bool check_isolation() {
  const std::vector<int64_t> lengths = {3, 1, 1, 2, -3, 40, 1, -1, 200, 9, -30, 64, 4};
  Case c{"", 1, 359, 520};
  c.ids = ids_of(lengths);
  const Operands o(c);
  Launch clean(c, o);
  bool good = clean.run(0xFF);
  int64_t low = 0;
  for (int64_t length : lengths) {
    const int64_t high = low + std::abs(length);
    Operands poisoned = o;
    for (int64_t t = 0; t < c.T; ++t)
      if (t < low || t >= high)
        for (int64_t i = 0; i < c.C; ++i)
          poisoned.x[t * c.C + i] = poisoned.d_y[t * c.C + i] = i % 2 ? kNaN : INFINITY;
    Launch launch(c, poisoned);
    good &= launch.run(0x3C);
    for (auto buffer : {&Launch::y, &Launch::dx})
      good &= tokens_of(launch.*buffer, c.C, low, high) == tokens_of(clean.*buffer, c.C, low, high);
    if (length > 0) {
      Case one{"", 1, length, c.C};
      Operands alone = o;
      for (auto values : {&Operands::x, &Operands::d_y})
        alone.*values = {(o.*values).begin() + low * c.C, (o.*values).begin() + high * c.C};
      Launch own(one, alone);
      good &= own.run(0xFF);
      for (auto buffer : {&Launch::y, &Launch::dx})
        good &= tokens_of(own.*buffer, c.C, 0, length) == tokens_of(clean.*buffer, c.C, low, high);
    }
    low = high;
  }
  return report("neighbours full of NaN, and alone", good, "equal bits");
}

bool check_padding() {
  Case c{"", 2, 150, 136};
  c.bias = c.initial = true, c.N = 9;
  c.ids = slots_of(ids_of({-2, 30, -1, 1, -40, 5, -21, 33, -17, 60, -1, 3, 20, -66}));
  const Operands o(c);
  Operands poisoned = o;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t t = 0; t < c.T; ++t)
      if (c.padding(b, t))
        for (int64_t i = 0; i < c.C; ++i) {
          const int64_t at = (b * c.T + t) * c.C + i;
          poisoned.x[at] = kNaN, poisoned.d_y[at] = i % 2 ? INFINITY : kNaN;
        }
  Launch clean(c, o), launch(c, poisoned);
  return report("padding full of NaN",
                clean.run(0xFF) && launch.run(0x3C) && launch.same_bits(clean), "equal bits");
}

// The last segment of a row of more than 2^31 elements has the bits that it has alone.
bool check_large() {
  const int64_t T = 60'000, C = 36'864, tail = 100;
  Case c{"", 1, tail, C};
  Operands small(c);
  const size_t bytes = T * C * 2, tail_bytes = tail * C * 2;
  DeviceBuffer x(bytes), d_y(bytes), y(bytes), dx(bytes);
  for (DeviceBuffer* buffer : {&x, &d_y, &y, &dx}) buffer->fill(0x3C);
  Launch alone(c, small);
  bool good = alone.run(0xFF);
  for (auto [large, own] : {std::pair(&x, &alone.x), std::pair(&d_y, &alone.d_y)})
    CHECK_CUDA(cudaMemcpy(static_cast<char*>(large->data()) + bytes - tail_bytes, own->data(),
                          tail_bytes, cudaMemcpyDeviceToDevice));
  std::vector<int32_t> ids(T, 1);
  std::fill(ids.end() - tail, ids.end(), 2);
  DeviceBuffer device_ids(T * 4), workspace(short_conv_workspace_bytes({1, T, C, 1}));
  device_ids.upload(ids);
  ShortConvBackwardParams params = alone.params;
  params.forward.shape.T = T;
  params.forward.x = x.data(), params.d_y = d_y.data(), params.dx = dx.data();
  params.forward.segment_ids = static_cast<int32_t*>(device_ids.data());
  params.workspace = workspace.data();
  ShortConvParams forward = params.forward;
  forward.y = y.data();
  good &= convolve(forward, nullptr).ok() && convolve_backward(params, nullptr).ok();
  CHECK_CUDA(cudaDeviceSynchronize());
  for (auto [large, own] : {std::pair(&y, &alone.y), std::pair(&dx, &alone.dx)}) {
    std::vector<uint8_t> bits(tail_bytes);
    CHECK_CUDA(cudaMemcpy(bits.data(), static_cast<char*>(large->data()) + bytes - tail_bytes,
                          tail_bytes, cudaMemcpyDeviceToHost));
    good &= bits == own->download<uint8_t>();
  }
  return report("2.2e9 elements", good, "equal bits");
}

std::vector<Case> cases() {
  std::vector<Case> list;
  auto add = [&](const std::string& name, int64_t B, int64_t T, int64_t C) -> Case& {
    list.push_back({name, B, T, C});
    return list.back();
  };
  for (int64_t T : {1, 2, 3, 4, 7, 31, 32, 33, 129, 300}) add("T " + std::to_string(T), 1, T, 264);
  add("walks of 16", 1, 2100, 4096);
  add("walks of 32", 1, 4100, 2312);
  add("8 channels", 3, 77, 8);
  add("rows", 5, 45, 520);
  add("not a token", 2, 0, 264).bias = true;
  add("linear", 2, 45, 264).silu = false;
  add("bias", 2, 145, 264).bias = true;
  for (DType dtype : {DType::kBF16, DType::kF32})
    for (int64_t longest : {1, 3, 20, 90}) {
      Case& c = add("segments up to " + std::to_string(longest), 2, 333, 264);
      c.dtype = dtype;
      if (dtype == DType::kF32) c.name += ", f32";
      for (uint32_t row : {1, 2})
        for (int32_t id : ids_of(random_lengths(c.T, longest, row + uint32_t(longest))))
          c.ids.push_back(id);
      Case stateful = c;
      stateful.name += ", initial states";
      stateful.ids = slots_of(c.ids);
      stateful.initial = stateful.bias = true;
      stateful.N = longest == 1 ? 400 : 7;
      list.push_back(stateful);
    }
  Case& odd = add("ids of any value", 1, 40, 136);
  for (int i = 0; i < 40; ++i)
    odd.ids.push_back(std::vector<int32_t>{7, 7, 0, 7, INT_MAX, INT_MIN, 5, 5, 5, 5}[i % 10]);
  odd.padding_id = 5;
  Case& none = add("no padding id", 1, 40, 136);
  none.ids = ids_of({-3, 20, -1, 10, -6});
  none.has_padding_id = false;
  add("all padding", 1, 70, 136).ids = std::vector<int32_t>(70, 0);
  Case& row = add("initial state of a row", 3, 50, 264);
  row.initial = true;
  for (int64_t T : {1, 2}) {
    Case& few = add("initial state, T " + std::to_string(T), 2, T, 264);
    few.initial = few.bias = true;
  }
  Case& empty = add("initial state, not a token", 2, 0, 264);
  empty.initial = true;
  return list;
}

// ------------------------------------------------------------------------------------- the step

struct Step {
  std::string name;
  ShortConvStepShape shape;
  DType dtype = DType::kBF16, kernel_dtype = DType::kF32, state_dtype = DType::kBF16;
  bool silu = true, bias = false, per_sequence = false;
  std::vector<int32_t> indices = {};

  int64_t slots() const { return indices.empty() ? shape.N : shape.slots; }
  int64_t slot(int64_t n) const { return indices.empty() ? n : indices[n]; }
  bool has_slot(int64_t n) const { return slot(n) >= 0 && slot(n) < slots(); }
};

struct StepRun {
  explicit StepRun(const Step& c) {
    std::mt19937_64 generator(3);
    std::normal_distribution<float> normal;
    auto draw = [&](int64_t count, DType dtype) {
      std::vector<float> values(count);
      for (float& value : values) value = rounded(normal(generator), dtype);
      return values;
    };
    const int64_t rows = c.per_sequence ? c.shape.N : 1, C = c.shape.C;
    x = draw(c.shape.N * c.shape.T * C, c.dtype);
    kernel = draw(rows * kW * C, c.kernel_dtype);
    if (c.bias) bias = draw(rows * C, c.kernel_dtype);
    state = draw(c.slots() * kJ * C, c.state_dtype);
  }

  bool run(const Step& c, int byte) {
    device_x = upload(x, c.dtype), device_kernel = upload(kernel, c.kernel_dtype);
    device_bias = upload(bias, c.kernel_dtype), device_state = upload(state, c.state_dtype);
    device_y = DeviceBuffer(x.size() * size_of(c.dtype));
    device_y.fill(byte);
    DeviceBuffer indices(c.indices.size() * 4);
    indices.upload(c.indices);
    ShortConvStepParams p{};
    p.shape = c.shape;
    p.shape.slots = c.slots();
    p.dtype = c.dtype, p.kernel_dtype = c.kernel_dtype, p.state_dtype = c.state_dtype;
    p.x = device_x.data(), p.kernel = device_kernel.data(), p.bias = device_bias.data();
    p.state_indices = static_cast<int32_t*>(indices.data());
    p.state = device_state.data(), p.y = device_y.data();
    p.silu = c.silu, p.parameters_per_sequence = c.per_sequence;
    const Status status = convolve_step(p, nullptr);
    if (!status.ok()) std::printf("  %s\n", status.message.c_str());
    CHECK_CUDA(cudaDeviceSynchronize());
    return status.ok();
  }

  std::vector<float> x, kernel, bias, state;
  DeviceBuffer device_x, device_kernel, device_bias, device_state, device_y;
};

bool check(const Step& c) {
  StepRun run(c), again(c);
  const int64_t N = c.shape.N, T = c.shape.T, C = c.shape.C;
  std::vector<double> y(N * T * C, 0.0), state(run.state.begin(), run.state.end());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < C && c.has_slot(n); ++i) {
      std::vector<double> inputs;
      for (int64_t j = 0; j < kJ; ++j) inputs.push_back(run.state[(c.slot(n) * kJ + j) * C + i]);
      for (int64_t t = 0; t < T; ++t) inputs.push_back(run.x[(n * T + t) * C + i]);
      const int64_t row = c.per_sequence ? n : 0;
      for (int64_t t = 0; t < T; ++t) {
        double z = c.bias ? run.bias[row * C + i] : 0.0;
        for (int64_t w = 0; w < kW; ++w) z += run.kernel[(row * kW + w) * C + i] * inputs[t + w];
        y[(n * T + t) * C + i] = c.silu ? silu(z) : z;
      }
      for (int64_t j = 0; j < kJ; ++j)
        state[(c.slot(n) * kJ + j) * C + i] = rounded(float(inputs[T + j]), c.state_dtype);
    }
  bool good = run.run(c, 0xFF);
  const double error = excess(y, download(run.device_y, c.dtype), c.dtype);
  const auto after = download(run.device_state, c.state_dtype);
  const bool exact = std::equal(after.begin(), after.end(), state.begin());  // a copy, or untouched
  good &= again.run(c, 0x3C);
  const bool repeats =
      again.device_y.download<uint8_t>() == run.device_y.download<uint8_t>() &&
      again.device_state.download<uint8_t>() == run.device_state.download<uint8_t>();
  std::printf("%-44s y %.2f%s%s%s\n", c.name.c_str(), error, error <= 1.0 ? "" : "  INACCURATE",
              exact ? "" : "  WRONG STATE", repeats ? "" : "  NOT REPEATABLE");
  return good && error <= 1.0 && exact && repeats;
}

std::vector<Step> steps() {
  const DType F32 = DType::kF32, BF16 = DType::kBF16, F16 = DType::kF16;
  std::vector<Step> list;
  auto add = [&](const std::string& name, ShortConvStepShape shape) -> Step& {
    list.push_back({"step, " + name, shape});
    return list.back();
  };
  for (int64_t T : {1, 2, 3, 4, 8}) add("T " + std::to_string(T), {5, T, 520, 0});
  add("8 channels", {3, 1, 8, 0});
  add("4096 channels", {64, 1, 4096, 0});
  // So many that a thread has four sequences, and the last one of them two.
  add("70 sequences of 8192 channels", {70, 1, 8192, 0}).bias = true;
  for (DType dtype : {F32, F16}) {
    Step& c = add("many, types", {70, 1, 8192, 0});
    c.dtype = c.state_dtype = dtype, c.kernel_dtype = dtype;
  }
  Step& many = add("many, parameters of each sequence", {70, 1, 8192, 0});
  many.bias = many.per_sequence = true;
  Step& many_slots = add("many in a pool, missing slots", {70, 1, 8192, 80});
  for (int32_t n = 0; n < 70; ++n)
    many_slots.indices.push_back(n % 7 == 3 ? -n : n % 9 ? 79 - n : 80);
  for (int64_t T : {1, 2})
    for (DType dtype : {F32, BF16, F16})
      for (DType state : {F32, BF16, F16}) {
        Step& c = add("types, T " + std::to_string(T), {3, T, 264, 0});
        c.dtype = c.kernel_dtype = dtype, c.state_dtype = state;
        c.bias = true;
      }
  add("linear", {3, 1, 264, 0}).silu = false;
  Step& own = add("parameters of each sequence", {3, 1, 264, 0});
  own.bias = own.per_sequence = true;
  add("pool", {3, 2, 264, 7}).indices = {6, 0, 3};
  add("pool, missing slots", {6, 5, 264, 4}).indices = {2, -1, 4, INT_MIN, INT_MAX, 0};
  add("nobody has a slot", {2, 1, 264, 1}).indices = {-1, 1};
  return list;
}

bool check_named_twice() {
  Step c{"", {5, 1, 264, 5}};
  c.indices = {1, 3, 1, 1, 0};
  Step once = c;
  once.indices = {-1, 3, -1, -1, 0};
  StepRun twice(c), alone(once);
  bool good = twice.run(c, 0xFF) && alone.run(once, 0xFF);
  const auto states = twice.device_state.download<uint16_t>(),
             wanted = alone.device_state.download<uint16_t>();
  const size_t size = kJ * c.shape.C;
  for (size_t slot : {0, 2, 3, 4})
    good &= std::equal(states.begin() + slot * size, states.begin() + (slot + 1) * size,
                       wanted.begin() + slot * size);
  return report("a slot named twice harms no other", good, "equal bits");
}

// Steps of one and of three tokens have the bits of the whole.
bool check_continuation() {
  const int64_t T = 10, C = 264;
  Case c{"", 2, T, C};
  c.bias = true;
  Operands o(c);
  std::copy_n(o.kernel.begin(), kW * C, o.kernel.begin() + kW * C);
  std::copy_n(o.bias.begin(), C, o.bias.begin() + C);
  Launch whole(c, o);
  bool good = whole.run(0xFF);
  const auto wanted = whole.y.download<uint16_t>();
  std::vector<float> state(2 * kJ * C, 0.0f);
  int64_t begin = 0;
  for (int64_t tokens : {1, 3, 1, 5}) {
    Step step{"", {2, tokens, C, 0}};
    step.bias = true;
    StepRun run(step);
    run.kernel.assign(o.kernel.begin(), o.kernel.begin() + kW * C);
    run.bias.assign(o.bias.begin(), o.bias.begin() + C);
    run.state = state;
    for (int64_t n = 0; n < 2; ++n)
      std::copy_n(o.x.begin() + (n * T + begin) * C, tokens * C, run.x.begin() + n * tokens * C);
    good &= run.run(step, 0xFF);
    const auto y = run.device_y.download<uint16_t>();
    for (int64_t n = 0; n < 2; ++n)
      good &= std::equal(y.begin() + n * tokens * C, y.begin() + (n + 1) * tokens * C,
                         wanted.begin() + (n * T + begin) * C);
    state = download(run.device_state, DType::kBF16);
    begin += tokens;
  }
  return report("steps continue the whole", good, "equal bits");
}

bool check_refusals() {
  Case c{"", 2, 9, 264};
  const Operands o(c);
  Launch launch(c, o);
  bool good = launch.run(0xFF);
  auto refused = [&](auto change, const char* word) {
    ShortConvBackwardParams params = launch.params;
    change(params);
    const Status status = convolve_backward(params, nullptr);
    const bool told = !status.ok() && status.message.find(word) != std::string::npos;
    if (!told) std::printf("  no refusal that names %s: '%s'\n", word, status.message.c_str());
    return told;
  };
  good &= refused([](auto& p) { p.forward.shape.C = 260; }, "260 channels");
  good &= refused([](auto& p) { p.forward.dtype = DType::kF16; }, "x is f16");
  good &= refused([](auto& p) { p.d_bias = p.d_kernel; }, "d_bias was asked for");
  good &= refused([](auto& p) { p.dx = static_cast<char*>(p.dx) + 2; }, "dx is not aligned");
  good &= refused([](auto& p) { p.workspace = nullptr; }, "workspace is missing");
  good &= launch.run(0xFF);  // the next valid call works
  return report("refusals", good, "told");
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  const Status status = initialize(0);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  int failures = 0, count = 0;
  auto tally = [&](bool good) { ++count, failures += good ? 0 : 1; };
  for (const Case& c : cases()) tally(check(c));
  for (const Step& c : steps()) tally(check(c));
  tally(check_isolation());
  tally(check_padding());
  tally(check_named_twice());
  tally(check_continuation());
  tally(check_refusals());
  if (!quick) tally(check_large());
  std::printf("%d of %d passed\n", count - failures, count);
  return failures == 0 ? 0 : 1;
}
