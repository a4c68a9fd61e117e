// Values in any of a call's types, between host and device, and how far they are from the truth.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "device.h"
#include "problem/params.h"

using jax_flashkda::DType;

inline float rounded(float x, DType dtype) {
  if (dtype == DType::kBF16) return round_bf16(x);
  if (dtype == DType::kF16) return __half2float(__float2half(x));
  return x;
}

inline DeviceBuffer upload(const std::vector<float>& values, DType dtype) {
  if (dtype != DType::kF16) return upload_as(values, dtype == DType::kBF16);
  std::vector<__half> halves(values.begin(), values.end());
  DeviceBuffer buffer(halves.size() * 2);
  buffer.upload(halves);
  return buffer;
}

inline std::vector<float> download(const DeviceBuffer& buffer, DType dtype) {
  if (dtype == DType::kF32) return buffer.download<float>();
  std::vector<float> values;
  if (dtype == DType::kF16)
    for (__half x : buffer.download<__half>()) values.push_back(__half2float(x));
  else
    for (__nv_bfloat16 x : buffer.download<__nv_bfloat16>()) values.push_back(__bfloat162float(x));
  return values;
}

inline double relative_rms(const std::vector<double>& truth, const std::vector<float>& got) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (got[i] - truth[i]) * (got[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  return std::isnan(error) ? error : size > 0 ? std::sqrt(error / size) : std::sqrt(error);
}

inline double limit_of(DType dtype) {
  return dtype == DType::kF32 ? 2e-6 : dtype == DType::kF16 ? 4e-4 : 3e-3;  // rounding, once
}
