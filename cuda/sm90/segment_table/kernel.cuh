// segment_ids [B, T] -> chunk table, segment table, counts: everything the later stages know of
// segments, built on the device. A segment is a maximal run of equal ids; a run of padding tokens
// is one too, with the ordinal kPadding, and its chunks are listed so that somebody clears their
// output. Ids are compared, never used as an index, so every int32 array is valid. Grid: one CTA a
// row; each thread walks its own stretch of tokens, and three scans over the threads tell it what
// came before. The order of rows in the tables is whoever comes first: no result depends on it.
#pragma once

#include "problem/segments.cuh"
#include "sm90/segment_table/config.h"

namespace jax_flashkda::segment_table {

__global__ void clear_counts_kernel(TableCounts* counts) { *counts = TableCounts{}; }

// Exclusive scan over the CTA's threads, from thread 0 upwards; total is the whole.
template <class Combine>
__device__ int scan(int value, int identity, Combine combine, Config::Shared& s, int& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int inclusive = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive = combine(other, inclusive);
  }
  int exclusive = __shfl_up_sync(0xffffffffu, inclusive, 1);
  if (lane == 0) exclusive = identity;
  __syncthreads();  // the last scan's results have been read
  if (lane == 31) s.warp_results[warp] = inclusive;
  __syncthreads();  // every warp's result, before all of them are read
  int before = identity;
  total = identity;
  for (int i = 0; i < Config::kWarps; ++i) {
    if (i == warp) before = total;
    total = combine(total, s.warp_results[i]);
  }
  return combine(before, exclusive);
}

struct Row {
  const int32_t* ids;
  int T;
  bool has_padding_id;
  int32_t padding_id;

  __device__ bool padding(int t) const {
    return ids[t] < 0 || (has_padding_id && ids[t] == padding_id);
  }
  // Padding tokens of different ids are still one run.
  __device__ bool starts_run(int t) const {
    if (t == 0) return true;
    const bool now = padding(t), before = padding(t - 1);
    return now != before || (!now && ids[t] != ids[t - 1]);
  }
};

// First chunk start of the run at or after t.
__device__ __forceinline__ int next_chunk_start(int run_start, int t) {
  const int chunk = static_cast<int>(kChunk);
  return run_start + (t - run_start + chunk - 1) / chunk * chunk;
}

// Reserves `count` places of a global list for the row.
__device__ int reserve(int32_t* counter, int count, Config::Shared& s) {
  __syncthreads();  // the last base has been read
  if (threadIdx.x == 0) s.base = atomicAdd(counter, count);
  __syncthreads();  // the base is there
  return s.base;
}

__global__ void __launch_bounds__(Config::kThreads)
    segment_table_kernel(const __grid_constant__ ForwardParams p,
                         const __grid_constant__ ForwardWorkspace w) {
  __shared__ Config::Shared s;
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  ChunkEntry* chunk_table = reinterpret_cast<ChunkEntry*>(workspace + w.chunk_table);
  SegmentEntry* segment_table = reinterpret_cast<SegmentEntry*>(workspace + w.segment_table);
  TableCounts* counts = reinterpret_cast<TableCounts*>(workspace + w.counts);
  const int row_index = blockIdx.x, T = static_cast<int>(p.shape.T);
  const Row row = {p.segment_ids + row_index * p.shape.T, T, p.has_padding_segment_id,
                   p.padding_segment_id};
  const int64_t stretch = (p.shape.T + Config::kThreads - 1) / Config::kThreads;
  const int low = static_cast<int>(clamp_to<int64_t>(threadIdx.x * stretch, 0, T));
  const int high = static_cast<int>(clamp_to<int64_t>((threadIdx.x + 1) * stretch, 0, T));

  int segments = 0, first_start = T, last_start = -1;
  for (int t = low; t < high; ++t) {
    if (!row.starts_run(t)) continue;
    if (first_start == T) first_start = t;
    last_start = t;
    segments += row.padding(t) ? 0 : 1;
  }
  auto add = [](int a, int b) { return a + b; };
  int total_segments, total_chunks, unused;
  int ordinal =
      scan(segments, 0, add, s, total_segments) - 1;  // of the run that the stretch begins in
  const int entry_start = scan(last_start, -1, [](int a, int b) { return max(a, b); }, s, unused);
  // The first start behind the stretch: a scan from the other end, over first starts negated and
  // thread order reversed.
  __shared__ int first_starts[Config::kThreads];
  first_starts[Config::kThreads - 1 - threadIdx.x] = first_start;
  __syncthreads();  // all first starts, before they are read in reverse
  const int reversed =
      scan(first_starts[threadIdx.x], T, [](int a, int b) { return min(a, b); }, s, unused);
  __syncthreads();  // all have been read, before they are replaced
  first_starts[Config::kThreads - 1 - threadIdx.x] = reversed;
  __syncthreads();  // all results, before each thread takes its own
  const int start_behind = first_starts[threadIdx.x];

  // Calls visit(run start, first and last + 1 token of the stretch in the run, end of the run) for
  // each run of the stretch.
  auto for_each_run = [&](auto visit) {
    int run_start = entry_start;
    for (int t = low; t < high;) {
      if (row.starts_run(t)) run_start = t;
      int next = t + 1;
      while (next < high && !row.starts_run(next)) ++next;
      visit(run_start, t, next, next < high ? next : start_behind);
      t = next;
    }
  };
  int chunks = 0;
  for_each_run([&](int run_start, int t, int next, int) {
    for (int at = next_chunk_start(run_start, t); at < next; at += static_cast<int>(kChunk))
      ++chunks;
  });
  int chunk_at = scan(chunks, 0, add, s, total_chunks);
  chunk_at += reserve(&counts->chunks, total_chunks, s);
  const int segment_base = reserve(&counts->segments, total_segments, s);
  if (threadIdx.x == 0)
    reinterpret_cast<int32_t*>(workspace + w.row_segments)[row_index] = total_segments;
  for_each_run([&](int run_start, int t, int next, int end) {
    const bool padding = row.padding(t);
    if (t == run_start && !padding) {
      ++ordinal;
      segment_table[segment_base + ordinal] = {row_index, run_start, end - run_start, ordinal};
    }
    for (int at = next_chunk_start(run_start, t); at < next; at += static_cast<int>(kChunk))
      chunk_table[chunk_at++] = {row_index, at, min(static_cast<int>(kChunk), end - at),
                                 padding ? kPadding : ordinal};
  });
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
