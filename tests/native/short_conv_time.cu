// Times the short convolution without JAX, by CUDA events, on inputs in rotation that exceed the L2
// cache: forward, backward, both on packed rows, and the step in a CUDA graph. TB/s counts each
// operand and result of size once: x and y; x, d_y and dx; x, y and the state twice.
//   short_conv_time            the launch functions' choices
//   short_conv_time --divide   other vectors, batches and CTAs an SM of forward and backward, and
//                              other numbers of sequences a thread of the step
//   short_conv_time --divide-steps   the step alone
#include <string>
#include <vector>

#include "sm90/short_conv/backward.cuh"
#include "sm90/short_conv/kernel.cuh"
#include "sm90/short_conv/step.cuh"
#include "timing.h"

namespace {

using namespace jax_flashkda;

constexpr int kSets = 3;

DeviceBuffer normal(int64_t count, uint32_t seed) {
  DeviceBuffer buffer(count * 2);
  fill_normal<<<1024, 256>>>(static_cast<__nv_bfloat16*>(buffer.data()), count, seed * 7919, 1, 0);
  return buffer;
}

// Segments of `length` tokens, or one.
struct Timed {
  Timed(int64_t T, int64_t C, int64_t length) : T(T), C(C), length(length) {
    kernel = upload_as(std::vector<float>(kShortConvWidth * C, 0.3f), false);
    d_kernel = DeviceBuffer(kShortConvWidth * C * 4);
    std::vector<int32_t> ids;
    for (int64_t t = 0; length > 0 && t < T; ++t) ids.push_back(int32_t(1 + t / length));
    segment_ids = DeviceBuffer(ids.size() * 4);
    segment_ids.upload(ids);
    workspace = DeviceBuffer(short_conv_workspace_bytes({1, T, C, 1}));
    for (int i = 0; i < kSets; ++i) {
      x.push_back(normal(T * C, 2 * i + 1)), d_y.push_back(normal(T * C, 2 * i + 2));
      out.emplace_back(T * C * 2);
    }
  }
  ShortConvParams forward(int i) const {
    ShortConvParams p{};
    p.shape = {1, T, C, 1};
    p.dtype = DType::kBF16;
    p.x = x[i % kSets].data(), p.y = out[i % kSets].data();
    p.kernel = static_cast<float*>(kernel.data());
    p.segment_ids = static_cast<int32_t*>(segment_ids.data());
    p.silu = p.has_padding_segment_id = true;
    return p;
  }
  ShortConvBackwardParams backward(int i) const {
    ShortConvBackwardParams p{};
    p.forward = forward(i);
    p.forward.y = nullptr;
    p.d_y = d_y[i % kSets].data(), p.dx = out[i % kSets].data();
    p.d_kernel = static_cast<float*>(d_kernel.data());
    p.workspace = workspace.data();
    return p;
  }
  void print(const char* what, double ms, int operands) const {
    std::printf("T %5ld  C %5ld  segments of %5ld  %-36s %7.4f ms  %.2f TB/s\n", long(T), long(C),
                long(length > 0 ? length : T), what, ms, operands * 2e-9 * T * C / ms);
    std::fflush(stdout);
  }

  int64_t T, C, length;
  DeviceBuffer kernel, d_kernel, segment_ids, workspace;
  std::vector<DeviceBuffer> x, d_y, out;
};

std::string division(const char* what, int vector, int batch, int ctas, int walk) {
  return std::string(what) + " vector " + std::to_string(vector) + " batch " +
         std::to_string(batch) + " ctas " + std::to_string(ctas) + " walk " + std::to_string(walk);
}

template <class Config>
unsigned ctas_of(const Timed& timed, int walk) {
  return unsigned(short_conv_tiles({1, timed.T, timed.C, 1}, walk) *
                  ((timed.C + Config::kChannels - 1) / Config::kChannels));
}

template <int kVector, int kBatch, int kCtasPerSm>
void divide_forward(const Timed& timed) {
  using Config = short_conv::Config<__nv_bfloat16, kVector, kBatch, kCtasPerSm>;
  for (int walk : {16, 32})
    timed.print(division("forward", kVector, kBatch, kCtasPerSm, walk).c_str(),
                median_ms([&](int i) {
                  short_conv::short_conv_kernel<Config>
                      <<<ctas_of<Config>(timed, walk), Config::kThreads>>>(timed.forward(i), walk);
                }),
                2);
}

// Without the sum over tiles.
template <int kVector, int kBatch, int kCtasPerSm>
void divide_backward(const Timed& timed) {
  using Config = short_conv::Config<__nv_bfloat16, kVector, kBatch, kCtasPerSm>;
  const int walk = int(short_conv_walk({1, timed.T, timed.C, 1}));  // the workspace is for it
  timed.print(division("backward", kVector, kBatch, kCtasPerSm, walk).c_str(),
              median_ms([&](int i) {
                short_conv::short_conv_backward_kernel<Config>
                    <<<ctas_of<Config>(timed, walk), Config::kThreads>>>(timed.backward(i), walk);
              }),
              3);
}

void time_convolution(int64_t T, int64_t C, int64_t length, bool divide) {
  const Timed timed(T, C, length);
  timed.print("forward", median_ms([&](int i) { require(convolve(timed.forward(i), nullptr)); }),
              2);
  timed.print("backward",
              median_ms([&](int i) { require(convolve_backward(timed.backward(i), nullptr)); }), 3);
  if (!divide) return;
  divide_forward<8, 4, 3>(timed);
  divide_forward<8, 4, 4>(timed);
  divide_forward<4, 4, 6>(timed);
  divide_forward<4, 8, 6>(timed);
  divide_backward<4, 4, 3>(timed);
  divide_backward<4, 4, 4>(timed);
  divide_backward<4, 8, 3>(timed);
  divide_backward<8, 4, 2>(timed);
  CHECK_CUDA(cudaDeviceSynchronize());
}

// As 32 calls in a CUDA graph on states in rotation.
template <class Launch>
void time_step(const char* what, int64_t N, int64_t T, int64_t C, Launch launch) {
  constexpr int kCalls = 32;
  const int64_t state_bytes = N * kShortConvHistory * C * 2;
  const int sets = int(std::min<int64_t>(kCalls, 1 + 120'000'000 / state_bytes));
  std::vector<DeviceBuffer> x, y, states;
  for (int i = 0; i < sets; ++i) {
    x.push_back(normal(N * T * C, 2 * i + 1)), states.push_back(normal(state_bytes / 2, 2 * i + 2));
    y.emplace_back(N * T * C * 2);
  }
  const DeviceBuffer kernel = upload_as(std::vector<float>(kShortConvWidth * C, 0.3f), false);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) {
    ShortConvStepParams p{};
    p.shape = {N, T, C, N};
    p.dtype = p.state_dtype = DType::kBF16;
    p.kernel_dtype = DType::kF32;
    p.x = x[i % sets].data(), p.y = y[i % sets].data(), p.state = states[i % sets].data();
    p.kernel = kernel.data();
    p.silu = true;
    launch(p, stream);
  }
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const double ms = median_ms([&](int) { CHECK_CUDA(cudaGraphLaunch(exec, nullptr)); }) / kCalls;
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
  std::printf("step  N %3ld  T %ld  C %5ld  %-12s %7.2f us  %.2f TB/s\n", long(N), long(T), long(C),
              what, ms * 1e3, (2.0 * state_bytes + 4.0 * N * T * C) / ms * 1e-9);
  std::fflush(stdout);
}

template <int kSequences>
void divide_step(int64_t N, int64_t C) {
  using Config = short_conv::StepConfig<1, kSequences>;
  const int64_t channels = Config::kThreads * Config::kVector;
  const auto ctas = unsigned((N + kSequences - 1) / kSequences * ((C + channels - 1) / channels));
  const std::string what = std::to_string(kSequences) + " sequences";
  time_step(what.c_str(), N, 1, C, [&](const ShortConvStepParams& p, cudaStream_t stream) {
    short_conv::short_conv_step_kernel<Config><<<ctas, Config::kThreads, 0, stream>>>(p);
  });
}

void time_steps(bool divide) {
  const auto chosen = [](const ShortConvStepParams& p, cudaStream_t stream) {
    require(convolve_step(p, stream));
  };
  for (int64_t C : {32 * 128, 3 * 32 * 128}) {
    for (int64_t N : {1, 64, 256}) {
      time_step("", N, 1, C, chosen);
      if (!divide) continue;
      divide_step<1>(N, C);
      divide_step<2>(N, C);
      divide_step<4>(N, C);
    }
    time_step("", 64, 4, C, chosen);
  }
}

}  // namespace

int main(int argc, char** argv) {
  require(initialize(0));
  const std::string argument = argc > 1 ? argv[1] : "";
  const bool divide = argument == "--divide";
  time_steps(divide || argument == "--divide-steps");
  if (argument == "--divide-steps") return 0;
  for (int64_t H : {32, 96}) {
    time_convolution(8192, H * 128, 0, divide);
    time_convolution(8192, 3 * H * 128, 0, divide);
    for (int64_t length : {1024, 16, 1}) time_convolution(8192, 3 * H * 128, length, false);
  }
}
