// segment_ids [B, T] -> chunk table, segment table, counts: everything the later stages know of
// segments, built on the device by problem/segment_table.h. Grid of both kernels: a CTA for each
// block of positions, at most kMostTableBlocks; the first tells what each block holds, the second
// reads that of all blocks and writes the tables. One block needs one launch.
#pragma once

#include <cstring>

#include "core/ptx.cuh"
#include "problem/segments.cuh"
#include "sm90/segment_table/config.h"

namespace jax_flashkda::segment_table {

template <class Value>
__device__ __forceinline__ Value shuffle_up(const Value& value, int distance) {
  constexpr int kWords = sizeof(Value) / 4;
  static_assert(sizeof(Value) % 4 == 0, "whole words");
  int words[kWords];
  memcpy(words, &value, sizeof(Value));
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_up_sync(0xffffffffu, words[i], distance);
  Value shuffled;
  memcpy(&shuffled, words, sizeof(Value));
  return shuffled;
}

struct Cta {
  template <class Phase>
  __device__ void parallel(Phase phase) {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();  // all threads' writes of this phase, before anybody's reads in the next
  }
  // A value a thread: scanned inside each warp, then behind the totals of the warps before.
  template <class Value>
  __device__ void inclusive_scan(Value (&values)[Config::kThreads]) {
    const int thread = threadIdx.x, lane = thread % 32;
    Value value = values[thread];
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
      const Value before = shuffle_up(value, distance);
      if (lane >= distance) value = combine(before, value);
    }
    values[thread] = value;
    __syncthreads();  // the totals of all warps, in their last lanes' places, before they are read
    if (thread >= 32) {
      Value before = values[31];
      for (int last = 63; last < thread - lane; last += 32) before = combine(before, values[last]);
      value = combine(before, value);
    }
    __syncthreads();  // the totals have been read, before the last lanes replace them
    values[thread] = value;
    __syncthreads();  // the scan, before anybody reads it
  }
  // Counts alone: nobody sees in which order they were added.
  __device__ void add(int32_t* count, int32_t more) { atomicAdd(count, more); }
};

__device__ __forceinline__ Ids ids_of(const ForwardParams& p, const ForwardWorkspace& w) {
  return {p.segment_ids,
          static_cast<int32_t>(p.shape.B * p.shape.T),
          static_cast<int32_t>(p.shape.T),
          p.has_padding_segment_id,
          p.padding_segment_id,
          w.overlap.processors > 0};
}

__device__ __forceinline__ TableBlock* blocks_of(const ForwardParams& p,
                                                 const ForwardWorkspace& w) {
  return reinterpret_cast<TableBlock*>(static_cast<uint8_t*>(p.workspace) + w.table_blocks);
}

template <class Shape>
__global__ void __launch_bounds__(Config::kThreads)
    segment_blocks_kernel(const __grid_constant__ ForwardParams p,
                          const __grid_constant__ ForwardWorkspace w) {
  __shared__ typename Shape::Shared s;
  let_next_kernel_start();
  Cta cta;
  summarize_block<Shape>(cta, s, ids_of(p, w), blockIdx.x, blocks_of(p, w));
}

template <class Shape>
__global__ void __launch_bounds__(Config::kThreads)
    segment_table_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  __shared__ typename Shape::Shared s;
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  const Tables tables = {reinterpret_cast<ChunkEntry*>(workspace + w.chunk_table),
                         reinterpret_cast<SegmentEntry*>(workspace + w.segment_table),
                         reinterpret_cast<TableCounts*>(workspace + w.counts),
                         reinterpret_cast<int32_t*>(workspace + w.row_segments)};
  let_next_kernel_start();
  wait_for_earlier_kernel();  // what each block holds
  Cta cta;
  if (gridDim.x == 1) summarize_block<Shape>(cta, s, ids_of(p, w), 0, blocks_of(p, w));
  write_block<Shape>(cta, s, ids_of(p, w), blockIdx.x, blocks_of(p, w), tables);
}

// Slots past a row's last segment keep their initial state, or zero.
__global__ void __launch_bounds__(Config::kCopyThreads)
    unused_states_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  const int32_t* row_segments =
      reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(p.workspace) + w.row_segments);
  const int64_t state_size = p.shape.K * p.shape.V;
  for (int64_t item = blockIdx.x; item < p.shape.B * p.shape.N * p.shape.HV; item += gridDim.x) {
    const int64_t row = item / (p.shape.N * p.shape.HV), slot = item / p.shape.HV % p.shape.N;
    if (p.shape.T > 0 && slot < row_segments[row]) continue;
    float4* to = reinterpret_cast<float4*>(p.final_state + item * state_size);
    const float4* from = reinterpret_cast<const float4*>(p.initial_state + item * state_size);
    for (int64_t i = threadIdx.x; i < state_size / 4; i += Config::kCopyThreads)
      to[i] = p.initial_state != nullptr ? from[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

}  // namespace jax_flashkda::segment_table
