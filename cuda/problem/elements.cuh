// Consecutive elements of an operand whose type is known when the kernel runs, as fp32: the few
// that are read once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "core/ptx.cuh"
#include "problem/params.h"

namespace jax_flashkda {

// kCount elements that are loaded or stored at once, aligned to their size.
template <class Element, int kCount>
struct alignas(sizeof(Element) * kCount) Elements {
  Element values[kCount];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half(x); }

// From one of the types to the same or to fp32, and from fp32.
template <class Element>
__device__ __forceinline__ void convert(Element& to, Element x) {
  to = x;
}
__device__ __forceinline__ void convert(float& to, __nv_bfloat16 x) { to = to_float(x); }
__device__ __forceinline__ void convert(__nv_bfloat16& to, float x) { from_float(to, x); }

// kCount elements as they are in memory. Loading and converting are two calls, so that many loads
// are under way before the first is waited for: a conversion beside its load, behind a branch on
// the type, would make every load wait for the one before it.
template <int kCount>
class RawElements {
 public:
  __device__ __forceinline__ void load(const void* from, DType dtype, int64_t first) {
    const bool wide = dtype == DType::kF32;
    const auto* address =
        reinterpret_cast<const Halves*>(static_cast<const char*>(from) + first * (wide ? 4 : 2));
    low_ = address[0];
    if (wide) high_ = address[1];
  }
  __device__ __forceinline__ void convert(DType dtype, float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (dtype == DType::kF32)
        x[i] = __uint_as_float(half(2 * i) | half(2 * i + 1) << 16);
      else if (dtype == DType::kBF16)
        x[i] = __uint_as_float(half(i) << 16);
      else
        x[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(half(i))));
    }
  }

 private:
  using Halves = Elements<uint16_t, kCount>;

  __device__ uint32_t half(int i) const {
    return i < kCount ? low_.values[i] : high_.values[i - kCount];
  }

  Halves low_ = {}, high_ = {};  // the second is there for fp32 alone
};

// In as few stores as there are 16-byte pieces.
template <class Element, int kCount>
__device__ __forceinline__ void store_pieces(Element* to, const Elements<Element, kCount>& x) {
  using Piece = std::conditional_t<sizeof(x) % 16 == 0, uint4, uint2>;
  if constexpr (sizeof(x) % sizeof(Piece) == 0) {
    Piece pieces[sizeof(x) / sizeof(Piece)];
    memcpy(pieces, &x, sizeof(x));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(Piece)); ++i)
      store_whole(reinterpret_cast<Piece*>(to) + i, pieces[i]);
  } else {
    *reinterpret_cast<Elements<Element, kCount>*>(to) = x;
  }
}

template <int kCount>
__device__ __forceinline__ void store_elements(void* to, DType dtype, int64_t first,
                                               const float (&x)[kCount]) {
  const auto store = [&](auto type) {
    using Stored = Elements<decltype(type), kCount>;
    Stored stored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(stored.values[i], x[i]);
    store_pieces(static_cast<decltype(type)*>(to) + first, stored);
  };
  if (dtype == DType::kBF16)
    store(__nv_bfloat16{});
  else if (dtype == DType::kF16)
    store(__half{});
  else
    store(float{});
}

}  // namespace jax_flashkda
