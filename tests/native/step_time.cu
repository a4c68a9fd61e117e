// Times the decode step without JAX: 32 calls in a CUDA graph on states in rotation that exceed the
// L2 cache together, median over replays, a call's share. Bytes count the state read and written.
//   step_time            the launch function's choice
//   step_time --divide   other divisions of a state among CTAs, and CTAs an SM
#include <algorithm>
#include <string>
#include <vector>

#include "device.h"
#include "dispatch/dispatch.h"
#include "sm90/decode_step/kernel.cuh"
#include "sm90/decode_step/one_token.cuh"

namespace {

using namespace jax_flashkda;

constexpr int kCalls = 32;
constexpr double kL2Bytes = 60e6;

void require(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message.c_str());
  std::exit(1);
}

template <class Launch>
double graph_us(Launch launch) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) launch(i, stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int repeat = 0; repeat < 9; ++repeat) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (repeat > 1) times.push_back(ms);
  }
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e3 / kCalls;
}

// Inputs of a layer, drawn on the device; as many states as exceed the cache.
struct Timed {
  Timed(int64_t N, int64_t T, int64_t H, DType state_dtype) {
    uint32_t seed = 0;
    auto normal = [&](int64_t count, float scale) {
      DeviceBuffer buffer(count * 2);
      fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(buffer.data()), count, ++seed * 7919,
                                 scale, 0);
      return buffer;
    };
    q = normal(N * T * H * 128, 1), k = normal(N * T * H * 128, 1), v = normal(N * T * H * 128, 1);
    g = normal(N * T * H * 128, 0.3f), beta = normal(N * T * H, 1);
    A_log = upload_as(std::vector<float>(H, 0.0f), false);
    dt_bias = upload_as(std::vector<float>(H * 128, -4.0f), false);
    o = DeviceBuffer(N * T * H * 256);
    const int64_t elements = N * H * 128 * 128,
                  bytes = elements * (state_dtype == DType::kF32 ? 4 : 2);
    bytes_moved = 2.0 * bytes;
    const int sets = std::min<int>(kCalls, 1 + int(2 * kL2Bytes / bytes));
    for (int i = 0; i < sets; ++i) {
      states.emplace_back(bytes);
      if (state_dtype == DType::kF32) {
        states.back() = upload_as(std::vector<float>(elements, 0.01f * (i + 1)), false);
      } else {
        fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(states.back().data()), elements,
                                   ++seed, 1.0f, 0);
      }
    }
    params.shape = {N, T, H, H, 128, 128, N};
    params.qkv_dtype = params.g_dtype = params.beta_dtype = DType::kBF16;
    params.state_dtype = state_dtype;
    params.q = q.data(), params.k = k.data(), params.v = v.data(), params.g = g.data();
    params.beta = beta.data(), params.o = o.data();
    params.A_log = static_cast<float*>(A_log.data());
    params.dt_bias = static_cast<float*>(dt_bias.data());
    params.gate = Gate::kSoftplus;
    params.beta_is_logits = params.qk_l2norm = true;
    params.scale = 0.0884f;
  }
  StepParams with_state(int i) const {
    StepParams p = params;
    p.state = states[i % states.size()].data();
    return p;
  }
  DeviceBuffer q, k, v, g, beta, A_log, dt_bias, o;
  std::vector<DeviceBuffer> states;
  StepParams params{};
  double bytes_moved;
};

void print(const char* what, const Timed& timed, double us) {
  const StepShape& s = timed.params.shape;
  std::printf("N %4ld  T %ld  H %2ld  %-4s  %-30s %8.2f us  %.2f TB/s\n", long(s.N), long(s.T),
              long(s.H), name(timed.params.state_dtype), what, us, timed.bytes_moved / us * 1e-6);
  std::fflush(stdout);
}

template <class Config>
void time_division(const char* what, void (*kernel)(StepParams), const Timed& timed) {
  const unsigned ctas = unsigned(timed.params.shape.N * timed.params.shape.HV * Config::kParts);
  const double us = graph_us([&](int i, cudaStream_t stream) {
    kernel<<<ctas, Config::kThreads, 0, stream>>>(timed.with_state(i));
  });
  CHECK_CUDA(cudaGetLastError());
  const std::string words =
      what + std::to_string(Config::kParts) + " parts, " + std::to_string(Config::kCtasPerSm);
  print(words.c_str(), timed, us);
}

template <class State, int kLanes, int kCtasPerSm, int kTokens = kMostStepTokens,
          class Index = int64_t>
void time_division(const Timed& timed, const char* what = "") {
  using Config = decode_step::Config<State, 128, kLanes, kCtasPerSm, kTokens, Index>;
  time_division<Config>(what, decode_step::decode_step_kernel<Config>, timed);
}

template <int kLanes, int kCtasPerSm>
void time_one_token(const Timed& timed) {
  using Config = decode_step::Config<__nv_bfloat16, 128, kLanes, kCtasPerSm, 1, uint32_t>;
  time_division<Config>("packed, ", decode_step::decode_one_token_kernel<Config>, timed);
}

void time_shape(int64_t N, int64_t T, int64_t H, DType state, bool divide) {
  const Timed timed(N, T, H, state);
  print("", timed,
        graph_us([&](int i, cudaStream_t stream) { require(step(timed.with_state(i), stream)); }));
  if (!divide) return;
  if (state == DType::kF32) {
    time_division<float, 16, 4, kMostStepTokens, uint32_t>(timed, "index 32, ");
    if (T == 1) time_division<float, 16, 4, 1, uint32_t>(timed, "index 32, 1 token, ");
  } else if (T == 1) {
    time_division<__nv_bfloat16, 8, 4>(timed);
    time_one_token<8, 5>(timed);
    time_one_token<8, 7>(timed);
    time_one_token<16, 3>(timed);
    time_one_token<16, 4>(timed);
    time_one_token<16, 5>(timed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  require(initialize(0));
  const bool divide = argc > 1 && std::string(argv[1]) == "--divide";
  for (int64_t N : {1, 64, 256})
    for (DType state : {DType::kF32, DType::kBF16}) time_shape(N, 1, 32, state, divide);
  time_shape(64, 1, 96, DType::kF32, divide);
  time_shape(64, 4, 32, DType::kF32, divide);
  time_shape(8, 1, 32, DType::kF32, divide);
}
