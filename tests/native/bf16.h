// bf16 on the host, without CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// To nearest, ties to even.
inline float round_bf16(float x) {
  if (std::isnan(x)) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16_value(uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
}
