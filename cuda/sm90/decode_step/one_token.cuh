// A decode step of one token on states in bf16: as the kernel of several tokens, with the state kept
// as it is in memory, in half the registers, so that a CTA has a whole one under way. It is
// converted and decayed twice, for the sums and for the sum with k u^T: bits are those of a state
// held in fp32.
#pragma once

#include "core/ptx.cuh"
#include "sm90/decode_step/kernel.cuh"

namespace jax_flashkda::decode_step {

// The elements of a state that a thread holds, 8 columns of kRowsOfGroup x kGroupsOfLane rows.
template <class Config>
struct Packed : Place<Config> {
  using Place = decode_step::Place<Config>;
  static constexpr int kHalf = Config::kVector / 2;  // columns of a pass
  static_assert(Config::kVector == 8);

  __device__ explicit Packed(const Part<Config>& part) : Place(part) {}

  __device__ __forceinline__ void load(const __nv_bfloat16* state) {
    Place::each([&](int i, int group, int64_t at) {
      raw[i][group] = __ldcs(reinterpret_cast<const uint4*>(state + at));
    });
  }
  __device__ __forceinline__ void store(__nv_bfloat16* state) const {
    Place::each([&](int i, int group, int64_t at) {
      __stcs(reinterpret_cast<uint4*>(state + at), raw[i][group]);
    });
  }

  // S^T k and S^T q, S decayed, over this warp's rows, of the lane's columns half * kHalf ..: with
  // all columns at once the sums would need twice the registers.
  __device__ __forceinline__ void read(const typename Config::Row* rows, int half,
                                       float (&read)[kHalf], float (&out)[kHalf]) const {
    float reads[Place::kGroupsOfLane][kHalf] = {}, outs[Place::kGroupsOfLane][kHalf] = {};
    Place::each([&](int i, int group, int64_t) {
      const typename Config::Row x = rows[Place::first_row + Place::row(i, group)];
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        const float value = element(i, group, half * kHalf + j) * x.decay;
        reads[group][j] = fmaf(value, x.k, reads[group][j]);
        outs[group][j] = fmaf(value, x.q, outs[group][j]);
      }
    });
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      read[j] = Place::sum_of_groups(reads, j);
      out[j] = Place::sum_of_groups(outs, j);
    }
  }

  // Decays these columns and adds k u^T.
  __device__ __forceinline__ void add(const typename Config::Row* rows, int half,
                                      const float (&u)[kHalf]) {
    Place::each([&](int i, int group, int64_t) {
      const typename Config::Row& x = rows[Place::first_row + Place::row(i, group)];
      float value[kHalf];
#pragma unroll
      for (int j = 0; j < kHalf; ++j)
        value[j] = fmaf(x.k, u[j], element(i, group, half * kHalf + j) * x.decay);
      uint4& to = raw[i][group];
      (half == 0 ? to.x : to.z) = pack_bf16(value[0], value[1]);
      (half == 0 ? to.y : to.w) = pack_bf16(value[2], value[3]);
    });
  }

  // Makes the compiler take the elements for new ones: it would rather keep what it made of them
  // for the sums, in twice the registers, than make it again.
  __device__ __forceinline__ void forget_what_was_made() {
    Place::each([&](int i, int group, int64_t) {
      uint4& x = raw[i][group];
      asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
    });
  }

 private:
  __device__ __forceinline__ float element(int i, int group, int j) const {
    const uint4& x = raw[i][group];
    const uint32_t pair = j / 2 == 0 ? x.x : j / 2 == 1 ? x.y : j / 2 == 2 ? x.z : x.w;
    return j % 2 == 0 ? bf16_low(pair) : bf16_high(pair);
  }

  uint4 raw[Config::kRowsOfGroup][Place::kGroupsOfLane];
};

__device__ __forceinline__ void store_columns(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    decode_one_token_kernel(const __grid_constant__ StepParams p) {
  constexpr int kVector = Config::kVector, kHalf = kVector / 2;
  __shared__ typename Config::Shared s;
  const Part<Config> part(p);
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[part.n] : part.n;
  if (slot < 0 || slot >= p.shape.slots) return write_zeros(p, part);
  const int warp = threadIdx.x / 32;
  constexpr int64_t kState = Config::kK * Config::kV;
  auto* state = static_cast<__nv_bfloat16*>(p.state) + (slot * p.shape.HV + part.head) * kState;
  TokenInputs<Config> inputs;
  if (warp == 0) inputs.load(p, part, 0);  // first, so that the state does not delay it
  Packed<Config> held(part);
  held.load(state);
  if (warp == 0) inputs.prepare(p, 0, s);
  __syncthreads();  // the prepared token, before all warps read it

  const typename Config::Row* rows = s.rows[0];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float read[kHalf], out[kHalf];
    held.read(rows, half, read, out);
    const int column = held.own_column + half * kHalf;
    if (held.in_first_row_group()) {
      store_columns(&s.partial[0][0][warp][column], read);
      store_columns(&s.partial[0][1][warp][column], out);
    }
    held.forget_what_was_made();
  }
  __syncthreads();  // all warps' sums, before anybody adds them up
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = held.own_column + half * kHalf;
    float sum[kHalf], u[kHalf];
    sum_of_warps<Config>(s.partial[0][0], column, sum);
#pragma unroll
    for (int j = 0; j < kHalf; ++j) u[j] = s.beta[0] * (s.v[0][column + j] - sum[j]);
    held.add(rows, half, u);
    held.forget_what_was_made();
    if (warp != 0 || !held.in_first_row_group()) continue;
    sum_of_warps<Config>(s.partial[0][1], column, sum);
#pragma unroll
    for (int j = 0; j < kHalf; ++j) sum[j] = p.scale * fmaf(u[j], s.kq[0], sum[j]);
    store_elements(p.o, p.qkv_dtype,
                   part.token(p, 0, p.shape.HV, part.head, Config::kV) + part.first_column + column,
                   sum);
  }
  held.store(state);
  if (p.token_states != nullptr)
    held.store(static_cast<__nv_bfloat16*>(p.token_states) +
               part.token(p, 0, p.shape.HV, part.head, kState));
}

}  // namespace jax_flashkda::decode_step
