// segment_ids [B, T] -> chunk table, segment table, counts: the logic, without a word of how its
// threads run. A team of threads works in phases: `team.parallel(f)` calls f(thread) for each and
// returns when all have; between phases the whole team is at the same place. `team.inclusive_scan`
// replaces each value by the combination of all up to it, `team.add` counts. The GPU's team is a
// CTA, the tests' a loop, and both run this code.
//
// A run is a maximal stretch of equal ids inside a row, or of padding, whatever its ids; segments
// are the runs that are not padding. Ids are compared, never used as an index, so every int32 array
// is valid. Rows lie one behind the other: positions 0 .. B T - 1 are tokens, and position B T
// begins a run that nobody ends. So whatever a run has to tell is told where the next one begins,
// and a thread needs to know what came before its positions, never what comes behind.
//
// Chunks stand in the order of their tokens. Segments stand longest first, by powers of two of
// their chunks and then by position, so that the longest chains start first. Nothing depends on who
// comes when.
//
// With kShort > 0, runs of at most so many tokens have no chunks, padding or not, and stand behind
// all segments, by ShortKind.
#pragma once

#include <cstdint>

#include "problem/workspace.h"

#ifdef __CUDACC__
#define JAX_FLASHKDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_FLASHKDA_HOST_DEVICE inline
#endif

namespace jax_flashkda::segment_table {

// The ids of a call and what they mean.
struct Ids {
  const int32_t* ids;  // [tokens]
  int32_t tokens;      // B T
  int32_t T;
  bool has_padding_id;
  int32_t padding_id;
  bool in_token_order = false;  // the segments of the table; else longest first

  JAX_FLASHKDA_HOST_DEVICE bool padding(int32_t id) const {
    return id < 0 || (has_padding_id && id == padding_id);
  }
};

struct Tables {
  ChunkEntry* chunks;
  SegmentEntry* segments;
  TableCounts* counts;
  int32_t* row_segments;
};

// Chunks of a run, or of its first tokens.
JAX_FLASHKDA_HOST_DEVICE int32_t chunks_of(int32_t tokens) {
  return (tokens - 1) / static_cast<int32_t>(kChunk) + 1;
}

// Lengths by powers of two: bucket b holds more than 2^(b-1) and at most 2^b chunks.
JAX_FLASHKDA_HOST_DEVICE int length_bucket(int32_t tokens) {
  const int32_t chunks = chunks_of(tokens);
  int bucket = 0;
#pragma unroll 1
  while (bucket < kLengthBuckets - 1 && chunks > (1 << bucket)) ++bucket;
  return bucket;
}

// Chunks that the table has of a run.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE int32_t listed_chunks(int32_t tokens) {
  return tokens <= kShort ? 0 : chunks_of(tokens);
}

// Segments that end in a few positions, by bucket: sixteen counts of 16 bits. Words are selected,
// never indexed, so that a thread's counts stay in registers.
struct BucketCounts {
  uint64_t packed[kLengthBuckets / 4] = {};

  JAX_FLASHKDA_HOST_DEVICE int get(int bucket) const {
    uint64_t word = 0;
    for (int i = 0; i < kLengthBuckets / 4; ++i) word |= i == bucket / 4 ? packed[i] : 0;
    return static_cast<int>(word >> (16 * (bucket % 4)) & 0xffff);
  }
  JAX_FLASHKDA_HOST_DEVICE void add_one(int bucket) {
    for (int i = 0; i < kLengthBuckets / 4; ++i)
      packed[i] += uint64_t{i == bucket / 4} << (16 * (bucket % 4));
  }
  friend JAX_FLASHKDA_HOST_DEVICE BucketCounts combine(BucketCounts a, const BucketCounts& b) {
    for (int i = 0; i < kLengthBuckets / 4; ++i) a.packed[i] += b.packed[i];
    return a;
  }
};

// A summary that knows which runs have chunks.
template <int32_t kShort>
struct Runs : RunSummary {
  Runs() = default;
  JAX_FLASHKDA_HOST_DEVICE Runs(const RunSummary& runs) : RunSummary(runs) {}
};

// Run `before` is followed by `behind`: chunks of what lies between their starts.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE Runs<kShort> combine(const Runs<kShort>& before,
                                              const Runs<kShort>& behind) {
  if (before.last_start < 0) return behind;
  if (behind.last_start < 0) return before;
  Runs<kShort> both = behind;
  both.first_start = before.first_start;
  both.chunks += before.chunks + listed_chunks<kShort>(behind.first_start - before.last_start);
  both.segments += before.segments;
  both.segments_before_row = behind.segments_before_row < 0
                                 ? before.segments_before_row
                                 : before.segments + behind.segments_before_row;
  return both;
}

// What a thread sees at its positions: bit i belongs to the i-th.
struct Marks {
  uint32_t starts = 0;  // a run begins
  uint32_t rows = 0;    // a row begins, or the last one has ended
  uint32_t padding = 0;
};

template <int kCount>
JAX_FLASHKDA_HOST_DEVICE Marks mark_positions(const Ids& ids, int64_t low, int64_t high) {
  Marks marks;
  if (low >= high) return marks;
  int32_t seen[kCount + 1];  // the id before, then the thread's own; none of it behind the tokens
  for (int i = 0; i <= kCount; ++i) {
    const int64_t at = low + i - 1;
    seen[i] = at >= 0 && at < ids.tokens ? ids.ids[at] : -1;
  }
  int64_t next_row = (static_cast<uint32_t>(low) + static_cast<uint32_t>(ids.T) - 1) /
                     static_cast<uint32_t>(ids.T) * int64_t{ids.T};
  for (int i = 0; i < kCount; ++i) {
    const bool exists = low + i < high, row = exists && low + i == next_row;
    if (row) next_row += ids.T;
    const bool padding = ids.padding(seen[i + 1]);
    const bool other = padding != ids.padding(seen[i]) || (!padding && seen[i + 1] != seen[i]);
    marks.starts |= static_cast<uint32_t>(exists && (row || other)) << i;
    marks.rows |= static_cast<uint32_t>(row) << i;
    marks.padding |= static_cast<uint32_t>(padding) << i;
  }
  return marks;
}

JAX_FLASHKDA_HOST_DEVICE int lowest_bit(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// The summary of a position at which a run begins.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE Runs<kShort> one_start(const Marks& marks, int i, int32_t position) {
  const bool padding = marks.padding >> i & 1;
  Runs<kShort> start;
  start.first_start = start.last_start = position;
  start.last_is_padding = padding;
  start.segments = padding ? 0 : 1;
  start.segments_before_row = marks.rows >> i & 1 ? 0 : -1;
  return start;
}

// Visits each start of a run with the summary of all before it, and returns that of all.
template <int32_t kShort, class Visit>
JAX_FLASHKDA_HOST_DEVICE Runs<kShort> walk(Runs<kShort> before, const Marks& marks, int64_t low,
                                           Visit visit) {
#pragma unroll 1
  for (uint32_t left = marks.starts; left != 0; left &= left - 1) {
    const int i = lowest_bit(left);
    const int32_t position = static_cast<int32_t>(low + i);
    visit(before, position);
    before = combine(before, one_start<kShort>(marks, i, position));
  }
  return before;
}

// Whether the run that `before` leaves open is known and, ending at `end`, stands among the
// segments.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE bool leaves_entry(const Runs<kShort>& before, int32_t end) {
  return before.last_start >= 0 && (!before.last_is_padding || end - before.last_start <= kShort);
}

// .. and in which bucket. With kShort the short kinds come first, and the order of tokens is one
// bucket for all others.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE int entry_bucket(const Ids& ids, const Runs<kShort>& before, int32_t end) {
  const int32_t tokens = end - before.last_start;
  if (kShort == 0) return length_bucket(tokens);
  if (tokens <= kShort) return short_kind(tokens, before.last_is_padding);
  if (ids.in_token_order) return kShortKinds;
  const int bucket = kShortKinds + length_bucket(tokens);
  return bucket < kLengthBuckets ? bucket : kLengthBuckets - 1;
}

// kThreads threads, each with kPositions consecutive positions of a tile. A block of the table is
// as many tiles, one after the other, as bring the blocks down to a thread each.
template <int kThreads_, int kPositions_, int32_t kShort_ = 0>
struct Shape {
  static constexpr int kThreads = kThreads_, kPositions = kPositions_;
  static constexpr int32_t kShort = kShort_;
  using Runs = segment_table::Runs<kShort>;
  static constexpr int kTile = kThreads * kPositions;
  static constexpr int kBlocks = kThreads < kMostTableBlocks ? kThreads : kMostTableBlocks;
  static_assert(kPositions <= 32, "a bit of Marks each");
  static_assert(kTile < 65536, "BucketCounts");

  static JAX_FLASHKDA_HOST_DEVICE int64_t positions(const Ids& ids) {
    return int64_t{ids.tokens} + 1;
  }
  // 32 bits hold any of this, and divide faster.
  static JAX_FLASHKDA_HOST_DEVICE uint32_t block_positions(int64_t positions) {
    const uint32_t tiles = (static_cast<uint32_t>(positions) + kTile - 1) / kTile;
    return (tiles + kBlocks - 1) / kBlocks * kTile;
  }
  static JAX_FLASHKDA_HOST_DEVICE int blocks(int64_t positions) {
    const uint32_t length = block_positions(positions);
    return static_cast<int>((static_cast<uint32_t>(positions) + length - 1) / length);
  }

  struct Shared {
    Marks marks[kThreads];
    Runs runs[kThreads];             // of a thread's positions; scanned: of those and all before
    BucketCounts ended[kThreads];    // the same of the segments that end at them
    int32_t all[kLengthBuckets];     // segments of the call
    int32_t places[kLengthBuckets];  // where the next segment of a bucket goes
  };
};

// Calls tile(low, runs before the tile, runs before each thread) for each tile of a block; returns
// the summary of all to its end. `before` is what is known of the runs before the block.
template <class Shape, class Team, class Tile>
JAX_FLASHKDA_HOST_DEVICE typename Shape::Runs for_each_tile(Team& team, typename Shape::Shared& s,
                                                            const Ids& ids, int block,
                                                            typename Shape::Runs before,
                                                            Tile tile) {
  using Runs = typename Shape::Runs;
  const int64_t positions = Shape::positions(ids), length = Shape::block_positions(positions);
  const int64_t end = (block + 1) * length < positions ? (block + 1) * length : positions;
  for (int64_t low = block * length; low < end; low += Shape::kTile) {
    team.parallel([&](int thread) {
      const int64_t at = low + thread * Shape::kPositions;
      s.marks[thread] = mark_positions<Shape::kPositions>(ids, at, end);
      s.runs[thread] = walk(Runs{}, s.marks[thread], at, [](const Runs&, int32_t) {});
    });
    team.inclusive_scan(s.runs);
    // Read before the tile's last phase: the next tile writes there.
    const Runs all = combine(before, s.runs[Shape::kThreads - 1]);
    tile(low,
         [&](int thread) { return thread == 0 ? before : combine(before, s.runs[thread - 1]); });
    before = all;
  }
  return before;
}

// First pass, a block by itself: its runs, and the segments that begin and end in it.
template <class Shape, class Team>
JAX_FLASHKDA_HOST_DEVICE void summarize_block(Team& team, typename Shape::Shared& s, const Ids& ids,
                                              int block, TableBlock* blocks) {
  using Runs = typename Shape::Runs;
  team.parallel([&](int thread) {
    for (int i = thread; i < kLengthBuckets; i += Shape::kThreads) s.all[i] = 0;
  });
  const Runs runs =
      for_each_tile<Shape>(team, s, ids, block, Runs{}, [&](int64_t low, auto before_thread) {
        team.parallel([&](int thread) {
          walk(before_thread(thread), s.marks[thread], low + thread * Shape::kPositions,
               [&](const Runs& before, int32_t position) {
                 if (leaves_entry(before, position))
                   team.add(&s.all[entry_bucket(ids, before, position)], 1);
               });
        });
      });
  team.parallel([&](int thread) {
    if (thread == 0) blocks[block].runs = runs;
    for (int i = thread; i < kLengthBuckets; i += Shape::kThreads)
      blocks[block].ended[i] = s.all[i];
  });
}

// What the blocks before this one hold, and where its segments go.
template <class Shape, class Team>
JAX_FLASHKDA_HOST_DEVICE typename Shape::Runs place_block(Team& team, typename Shape::Shared& s,
                                                          const Ids& ids, int block,
                                                          const TableBlock* blocks) {
  using Runs = typename Shape::Runs;
  const int count = Shape::blocks(Shape::positions(ids));
  auto add = [&](int of_block, int bucket, int32_t segments) {
    if (segments == 0) return;
    team.add(&s.all[bucket], segments);
    if (of_block < block) team.add(&s.places[bucket], segments);
  };
  team.parallel([&](int thread) {
    for (int i = thread; i < kLengthBuckets; i += Shape::kThreads) s.all[i] = s.places[i] = 0;
  });
  team.parallel([&](int thread) {
    const TableBlock of_thread = thread < count ? blocks[thread] : TableBlock{};
    s.runs[thread] = of_thread.runs;
    for (int i = 0; i < kLengthBuckets; ++i) add(thread, i, of_thread.ended[i]);
  });
  team.inclusive_scan(s.runs);
  team.parallel(
      [&](int thread) {  // and the segment that began before block `thread` and ends in it
        if (thread == 0 || thread >= count || blocks[thread].runs.first_start < 0) return;
        const Runs before = s.runs[thread - 1];
        const int32_t end = blocks[thread].runs.first_start;
        if (leaves_entry(before, end)) add(thread, entry_bucket(ids, before, end), 1);
      });
  const Runs before = block == 0 ? Runs{} : s.runs[block - 1];
  team.parallel([&](int thread) {
    for (int i = thread; i < kLengthBuckets; i += Shape::kThreads)
      for (int longer = 0; longer < kLengthBuckets; ++longer)
        s.places[i] += longer > i ? s.all[longer] : 0;
  });
  return before;
}

// The chunk of the run left open by `before` that ends at `end`.
JAX_FLASHKDA_HOST_DEVICE void write_chunk(const Tables& tables, const Ids& ids,
                                          const RunSummary& before, int32_t end) {
  const int32_t whole = chunks_of(end - before.last_start) - 1;
  const int32_t start = before.last_start + whole * static_cast<int32_t>(kChunk);
  const int32_t row = before.last_start / ids.T;
  tables.chunks[before.chunks + whole] = {
      row, start - row * ids.T, end - start,
      before.last_is_padding ? kPadding : before.segments - before.segments_before_row - 1};
}

// Counts of the call, of which `all` has the segments by bucket.
template <int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE void write_counts(TableCounts& counts, const Runs<kShort>& runs,
                                           const int32_t* all) {
  if (kShort == 0) {
    counts.chunks = runs.chunks;
    counts.segments = runs.segments;
    return;
  }
  int32_t others = 0;
  for (int i = kShortKinds; i < kLengthBuckets; ++i) others += all[i];
  counts.chunks = runs.chunks;
  counts.segments = others;
  for (int i = 0; i < kShortKinds; ++i) counts.short_runs[i] = all[i];
}

// A thread's share of the tables: the chunks and the segments that end at its positions.
template <int kCount, int32_t kShort>
JAX_FLASHKDA_HOST_DEVICE void write_entries(const Tables& tables, const Ids& ids,
                                            Runs<kShort> before, const Marks& marks, int64_t low,
                                            int64_t high, const int32_t* all, const int32_t* places,
                                            BucketCounts ended) {
  int64_t from = low;  // what ended before has been written
#pragma unroll 1
  for (uint32_t left = marks.starts;; left &= left - 1) {
    const int i = left != 0 ? lowest_bit(left) : kCount;
    const int64_t next = low + i < high ? low + i : high;
    if (before.last_start >= 0) {
      int64_t end =
          before.last_start + chunks_of(static_cast<int32_t>(from - before.last_start)) * kChunk;
#pragma unroll 1
      for (; end < next; end += kChunk) write_chunk(tables, ids, before, static_cast<int32_t>(end));
    }
    if (left == 0) return;
    const int32_t position = static_cast<int32_t>(next);
    if (before.last_start >= 0 && position - before.last_start > kShort)
      write_chunk(tables, ids, before, position);
    if (leaves_entry(before, position)) {
      const int32_t length = position - before.last_start, row = before.last_start / ids.T;
      const int bucket = entry_bucket(ids, before, position);
      const int32_t place = kShort == 0 && ids.in_token_order ? before.segments - 1
                                                              : places[bucket] + ended.get(bucket);
      tables.segments[place] = {
          row, before.last_start - row * ids.T, length,
          before.last_is_padding ? kPadding : before.segments - before.segments_before_row - 1};
      ended.add_one(bucket);
    }
    if (marks.rows >> i & 1 && position > 0)
      tables.row_segments[position / ids.T - 1] = before.segments - before.segments_before_row;
    before = combine(before, one_start<kShort>(marks, i, position));
    if (position == ids.tokens) write_counts(*tables.counts, before, all);
    from = next + 1;
  }
}

// Second pass: the tables.
template <class Shape, class Team>
JAX_FLASHKDA_HOST_DEVICE void write_block(Team& team, typename Shape::Shared& s, const Ids& ids,
                                          int block, const TableBlock* blocks,
                                          const Tables& tables) {
  using Runs = typename Shape::Runs;
  const int64_t positions = Shape::positions(ids);
  const Runs before_block = place_block<Shape>(team, s, ids, block, blocks);
  for_each_tile<Shape>(team, s, ids, block, before_block, [&](int64_t low, auto before_thread) {
    team.parallel([&](int thread) {
      BucketCounts ended;
      walk(before_thread(thread), s.marks[thread], low + thread * Shape::kPositions,
           [&](const Runs& before, int32_t position) {
             if (leaves_entry(before, position)) ended.add_one(entry_bucket(ids, before, position));
           });
      s.ended[thread] = ended;
    });
    team.inclusive_scan(s.ended);
    team.parallel([&](int thread) {
      write_entries<Shape::kPositions>(tables, ids, before_thread(thread), s.marks[thread],
                                       low + thread * Shape::kPositions, positions, s.all, s.places,
                                       thread == 0 ? BucketCounts{} : s.ended[thread - 1]);
    });
    team.parallel([&](int thread) {
      for (int i = thread; i < kLengthBuckets; i += Shape::kThreads)
        s.places[i] += s.ended[Shape::kThreads - 1].get(i);
    });
  });
}

}  // namespace jax_flashkda::segment_table
