// The tensor-core products of a warpgroup, with one operand in registers and one in shared memory:
// CUTLASS's instructions under the names and shapes used here.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "core/ptx.cuh"

namespace jax_flashkda {

// Warpgroup products: the accumulators' earlier register writes come before, commit closes a group,
// wait leaves `Pending` open.
__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<Pending>();
}
// Keeps the compiler from moving uses of accumulators across a wait.
template <int Count>
__device__ __forceinline__ void fence_registers(float (&r)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) cute::warpgroup_fence_operand(r[i]);
}

// Shared-memory operand of 128-byte swizzled tiles. Rows of 128 bytes run along K (transposed: along
// N); groups of eight rows are 1024 bytes apart, and the next 64 columns of a transposed operand
// `bytes_to_next_columns`. Addresses and distances count in 16 bytes.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t shared,
                                                     uint32_t bytes_to_next_columns) {
  cute::GmmaDescriptor operand;
  operand.bitfield.start_address_ = shared >> 4;
  operand.bitfield.leading_byte_offset_ = bytes_to_next_columns >> 4;
  operand.bitfield.stride_byte_offset_ = 1024 >> 4;
  operand.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return operand;
}

// c {+}= a b by one of CUTLASS's instructions, which take every accumulator by name.
template <class Instruction, bool Accumulate, int Count, int... I>
__device__ __forceinline__ void wgmma(float (&c)[Count], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint64_t b, std::integer_sequence<int, I...>) {
  constexpr auto kScale =
      Accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  Instruction::fma(a0, a1, a2, a3, b, c[I]..., kScale);
}

// One warpgroup: c[64x64] {+}= a[64x16] b[16x64]; b has 64 rows of N, K along the row, or
// transposed 16 rows of K, N along the row.
template <bool Accumulate, bool Transposed = false>
__device__ __forceinline__ void wgmma_64x64(float (&c)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint64_t b) {
  using cute::SM90::GMMA::Major;
  using Instruction =
      cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, Transposed ? Major::MN : Major::K>;
  wgmma<Instruction, Accumulate>(c, a0, a1, a2, a3, b, std::make_integer_sequence<int, 32>());
}

// One warpgroup: c[64x128] {+}= a[64x16] b[16x128]; b has 16 rows of K, N along the row.
template <bool Accumulate>
__device__ __forceinline__ void wgmma_64x128_transposed(float (&c)[64], uint32_t a0, uint32_t a1,
                                                        uint32_t a2, uint32_t a3, uint64_t b) {
  using cute::SM90::GMMA::Major;
  using Instruction = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
  wgmma<Instruction, Accumulate>(c, a0, a1, a2, a3, b, std::make_integer_sequence<int, 64>());
}

}  // namespace jax_flashkda
