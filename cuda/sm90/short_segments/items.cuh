// The short runs of a call, and where a warp finds its share of them.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/short_segments/config.h"

namespace jax_flashkda::short_segments {

// Runs of one kind: entries of the segment table, or whole rows.
struct Runs {
  const SegmentEntry* entries;  // null: rows
  uint32_t count;
};

__device__ __forceinline__ Runs runs_of(const ForwardParams& p, const ForwardWorkspace& w,
                                        ShortKind kind) {
  if (!p.shape.has_segment_ids) {
    const bool of_kind = short_kind(static_cast<int32_t>(p.shape.T), false) == kind;
    return {nullptr, of_kind ? static_cast<uint32_t>(p.shape.B) : 0u};
  }
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
  return {reinterpret_cast<const SegmentEntry*>(workspace + w.segment_table) + first,
          static_cast<uint32_t>(count)};
}

// A run and value head.
struct Item {
  int64_t qk_row;     // of q and k, as [B T H]: of its first token
  int64_t value_row;  // of g, beta, v and o, as [B T HV]
  int32_t gate_row;   // of A_log and dt_bias, as [B HV]
  int32_t length;     // 1 .. kShortTokens; 0: there is none
};

// The items of a worker, every `workers`th: heads are neighbours.
class Walk {
 public:
  __device__ Walk(const ForwardParams& p, const Runs& runs, uint32_t worker, uint32_t workers)
      : runs_(runs),
        heads_(static_cast<uint32_t>(p.shape.HV)),
        run_(worker / heads_),
        head_(worker % heads_),
        step_runs_(workers / heads_),
        step_heads_(workers % heads_) {}

  __device__ Item next(const ForwardParams& p) {
    Item item = {};
    if (run_ < runs_.count) item = item_of(p, head_);
    run_ += step_runs_;
    head_ += step_heads_;
    if (head_ >= heads_) head_ -= heads_, ++run_;
    return item;
  }

 private:
  __device__ Item item_of(const ForwardParams& p, uint32_t head) const {
    const ForwardShape& shape = p.shape;
    const int32_t T = static_cast<int32_t>(shape.T);
    const SegmentEntry whole_row = {static_cast<int32_t>(run_), 0, T, 0};
    const Segment run = segment_from_entry(
        shape, runs_.entries != nullptr ? runs_.entries[run_] : whole_row);
    const int64_t token = run.row * shape.T + run.start;
    const uint32_t group = heads_ / static_cast<uint32_t>(shape.H);
    return {token * shape.H + (group == 1 ? head : head / group), token * shape.HV + head,
            static_cast<int32_t>(run.row * shape.HV + head),
            static_cast<int32_t>(min(run.length, int64_t{kShortTokens}))};
  }

  Runs runs_;
  uint32_t heads_, run_, head_, step_runs_, step_heads_;
};

}  // namespace jax_flashkda::short_segments
