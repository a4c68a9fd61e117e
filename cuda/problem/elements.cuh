// Consecutive elements of an operand whose type is known when the kernel runs, as fp32: the few
// that are read once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem/params.h"

namespace jax_flashkda {

// kCount elements that are loaded or stored at once, aligned to their size.
template <class Element, int kCount>
struct alignas(sizeof(Element) * kCount) Elements {
  Element values[kCount];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half(x); }

// Calls body(Element{}) with the type that `dtype` names.
template <class Body>
__device__ __forceinline__ void with_type(DType dtype, Body body) {
  if (dtype == DType::kBF16) return body(__nv_bfloat16{});
  if (dtype == DType::kF16) return body(__half{});
  body(float{});
}

template <int kCount>
__device__ __forceinline__ void load_elements(float (&x)[kCount], const void* from, DType dtype,
                                              int64_t first) {
  with_type(dtype, [&](auto type) {
    using Loaded = Elements<decltype(type), kCount>;
    const Loaded loaded =
        *reinterpret_cast<const Loaded*>(static_cast<const decltype(type)*>(from) + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(loaded.values[i]);
  });
}

template <int kCount>
__device__ __forceinline__ void store_elements(void* to, DType dtype, int64_t first,
                                               const float (&x)[kCount]) {
  with_type(dtype, [&](auto type) {
    using Stored = Elements<decltype(type), kCount>;
    Stored stored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(stored.values[i], x[i]);
    *reinterpret_cast<Stored*>(static_cast<decltype(type)*>(to) + first) = stored;
  });
}

}  // namespace jax_flashkda
