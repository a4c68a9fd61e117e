// The short runs of a call, and where a worker finds its share of them.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/short_segments/config.h"

namespace jax_flashkda::short_segments {

__device__ __forceinline__ int lane_index() { return static_cast<int>(thread_index() % 32); }
// Of all warps.
__device__ __forceinline__ uint32_t warp_number() {
  return blockIdx.x * Config::kWarps + thread_index() / 32;
}
__device__ __forceinline__ uint32_t warps() { return gridDim.x * Config::kWarps; }

// To the worker's first item of a kind.
__device__ __forceinline__ Walk start_walk(const ForwardParams& p, const ForwardWorkspace& w,
                                           ShortKind kind, uint32_t worker, uint32_t workers) {
  Walk walk = {};
  if (!p.shape.has_segment_ids) {
    if (short_kind(static_cast<int32_t>(p.shape.T), false) == kind)
      walk.count = static_cast<uint32_t>(p.shape.B);
  } else {
    const uint8_t* workspace = static_cast<const uint8_t*>(p.workspace);
    const TableCounts& counts = *reinterpret_cast<const TableCounts*>(workspace + w.counts);
    const int64_t places = p.shape.B * p.shape.T;
    int64_t first = clamp_to<int64_t>(counts.segments, 0, places), count = 0;
#pragma unroll
    for (int i = kShortKinds - 1; i >= 0; --i) {
      if (i < kind) break;
      first += count;
      count = clamp_to<int64_t>(counts.short_runs[i], 0, places - first);
    }
    walk.entries = reinterpret_cast<const SegmentEntry*>(workspace + w.segment_table) + first;
    walk.count = static_cast<uint32_t>(count);
  }
  if (walk.count == 0) return walk;
  const uint32_t heads = static_cast<uint32_t>(p.shape.HV);
  walk.run = worker / heads;
  walk.head = worker - walk.run * heads;
  walk.step_runs = workers / heads;
  walk.step_heads = workers - walk.step_runs * heads;
  return walk;
}

__device__ __forceinline__ void advance(Walk& walk, const ForwardParams& p) {
  const uint32_t heads = static_cast<uint32_t>(p.shape.HV);
  walk.run += walk.step_runs;
  walk.head += walk.step_heads;
  if (walk.head >= heads) walk.head -= heads, ++walk.run;
}

// No branch, so that several are looked up at once; there is a run. Clamped as segments.cuh does.
__device__ __forceinline__ Item item_at(const Walk& walk, const ForwardParams& p) {
  const ForwardShape& shape = p.shape;
  const int32_t T = static_cast<int32_t>(shape.T);
  const uint32_t index = min(walk.run, walk.count - 1);
  int4 run = {static_cast<int32_t>(index), 0, T, 0};  // a SegmentEntry, in one load
  if (walk.entries != nullptr) run = reinterpret_cast<const int4*>(walk.entries)[index];
  const int32_t row = clamp_to(run.x, 0, static_cast<int32_t>(shape.B) - 1),
                start = clamp_to(run.y, 0, T - 1);
  const int64_t token = row * shape.T + start;
  const uint32_t group = static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H);
  Item item;
  item.qk_row = token * shape.H + (group == 1 ? walk.head : walk.head / group);
  item.value_row = token * shape.HV + walk.head;
  item.gate_row = static_cast<int32_t>(row * shape.HV + walk.head);
  item.length = walk.run < walk.count ? clamp_to(run.z, 1, min(T - start, kShortTokens)) : 0;
  return item;
}

}  // namespace jax_flashkda::short_segments
