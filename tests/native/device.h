// Exact-size device allocations: one cudaMalloc an operand, so that a memory checker sees every
// byte outside.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bf16.h"

#define CHECK_CUDA(call)                                                 \
  do {                                                                   \
    const cudaError_t error_ = (call);                                   \
    if (error_ != cudaSuccess) {                                         \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(error_));                          \
      std::exit(2);                                                      \
    }                                                                    \
  } while (0)

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    if (bytes > 0) CHECK_CUDA(cudaMalloc(&data_, bytes));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) cudaFree(data_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void fill(int byte) {
    if (bytes_ > 0) CHECK_CUDA(cudaMemset(data_, byte, bytes_));
  }
  template <typename T>
  void upload(const std::vector<T>& host) {
    if (!host.empty())
      CHECK_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <typename T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    if (bytes_ > 0) CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void swap(DeviceBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Values as the call's type, on the device.
inline DeviceBuffer upload_as(const std::vector<float>& values, bool bf16) {
  DeviceBuffer buffer(values.size() * (bf16 ? 2 : 4));
  if (bf16) {
    std::vector<__nv_bfloat16> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) rounded[i] = __float2bfloat16(values[i]);
    buffer.upload(rounded);
  } else {
    buffer.upload(values);
  }
  return buffer;
}

// Counter-based normal numbers: the same on every machine.
static __global__ void fill_normal(__nv_bfloat16* out, int64_t count, uint32_t seed, float scale,
                                   float shift) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    const float u = (static_cast<uint32_t>(x) + 1.0f) * 2.3283064e-10f,
                angle = static_cast<uint32_t>(x >> 32) * 1.4629180e-9f;
    out[i] = __float2bfloat16(shift + scale * sqrtf(-2.0f * logf(u)) * cosf(angle));
  }
}
