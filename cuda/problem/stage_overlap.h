// Whether the two stages of a call overlap, and how they share the device: a choice by the shape
// alone. It decides when the state stage runs, never what it computes.
#pragma once

#include <cstdint>

#include "problem/params.h"

namespace jax_flashkda {

inline constexpr int64_t kChunk = 64;  // tokens in a whole chunk

// chunk_prepare leaves some multiprocessors to chunk_state_output, which follows a few chunks
// behind it. It works on a few tracks at a time, from their first chunks to their last, and each of
// these tracks has a CTA (or two, of half a head each) of the state stage. A track is a value head
// of a row; with segment_ids of all rows, and its segments are walked in the order of their tokens.
struct StageOverlap {
  int64_t processors = 0;  // left to the state stage; 0: one stage after the other
  int64_t tracks = 0;      // prepared side by side
  bool half_heads = false;
};

// What a call takes, in microseconds as measured on an H200.
struct StageTimes {
  static constexpr int64_t kProcessors = 132;
  static constexpr double kItem = 10.0;           // prepare: a chunk and head, two at a time
  static constexpr double kHalfHead = 1.2;        // state: a chunk of half a head
  static constexpr double kWholeHead = 1.85;      // .. of a whole one
  static constexpr double kSegment = 0.6;         // .. a segment's start
  static constexpr double kItemBytes = 0.024;     // .. of all heads together, what memory allows
  static constexpr double kHalfHeadBehind = 1.3;  // the same behind chunk_prepare
  static constexpr double kWholeHeadBehind = 2.0;
  static constexpr double kSegmentBehind = 1.5;
  static constexpr double kSerialStart = 10;   // two kernels one after the other
  static constexpr double kOverlapStart = 15;  // until the state stage has its first chunk

  int64_t tracks, chunks, segments;  // chunks and segments of a track, as far as the shape tells

  explicit StageTimes(const ForwardShape& s)
      : tracks(s.has_segment_ids ? s.HV : s.B * s.HV), chunks((s.T + kChunk - 1) / kChunk) {
    segments = s.has_segment_ids && s.B * s.N > 0 ? s.B * s.N : 1;
    if (s.has_segment_ids) chunks = s.B * chunks + segments / 2;  // some end in the midst of one
  }

  static double prepare(int64_t items, int64_t processors) {
    return static_cast<double>((items + 2 * processors - 1) / (2 * processors)) * kItem;
  }
  double prepare() const { return prepare(tracks * chunks, kProcessors); }

  double serial() const {
    const bool half = 2 * tracks <= kProcessors;
    const int64_t chains = tracks * segments * (half ? 2 : 1);
    const double rounds = static_cast<double>((chains + kProcessors - 1) / kProcessors);
    const double chain = static_cast<double>(chunks) / static_cast<double>(segments) *
                             (half ? kHalfHead : kWholeHead) +
                         kSegment;
    const double bytes = static_cast<double>(tracks * chunks) * kItemBytes;
    return kSerialStart + prepare() + (rounds * chain > bytes ? rounds * chain : bytes);
  }

  // Groups of tracks one after the other, and of each the slower stage.
  double overlapped(const StageOverlap& o) const {
    const double walk =
        static_cast<double>(chunks) * (o.half_heads ? kHalfHeadBehind : kWholeHeadBehind) +
        static_cast<double>(segments) * kSegmentBehind;
    const auto group = [&](int64_t tracks_of_group) {
      const double ahead = prepare(tracks_of_group * chunks, kProcessors - o.processors);
      return walk > ahead ? walk : ahead;
    };
    const int64_t whole = tracks / o.tracks, rest = tracks % o.tracks;
    return kOverlapStart + static_cast<double>(whole) * group(o.tracks) +
           (rest > 0 ? group(rest) : 0.0);
  }

  // Of all that leave at most half of the multiprocessors to the state stage.
  StageOverlap best_overlap() const {
    StageOverlap best;
    double least = 0;
    for (int split = 1; split <= 2; ++split)
      for (int64_t n = 1; n * split <= kProcessors / 2 && n <= (tracks > 1 ? tracks : 1); ++n) {
        const StageOverlap candidate = {n * split, n, split == 2};
        const double time = overlapped(candidate);
        if (best.processors == 0 || time < least) best = candidate, least = time;
      }
    return best;
  }
};

}  // namespace jax_flashkda
