// Answers one line of input, segment ids and what they mean, with one line: the
// tables that the device's code makes of them with a team of threads that a
// loop plays. tests/test_segment_table.py writes the lines. Needs no CUDA.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <vector>

#include "problem/segment_table.h"

using namespace jax_flashkda;
using namespace jax_flashkda::segment_table;

namespace {

constexpr int32_t kUntouched = -77;

// A phase must not depend on the order of its threads: every other one runs
// backwards.
struct LoopTeam {
  int threads;
  bool backwards = false;

  template <class Phase>
  void parallel(Phase phase) {
    for (int i = 0; i < threads; ++i) phase(backwards ? threads - 1 - i : i);
    backwards = !backwards;
  }
  template <class Value, size_t kThreads>
  void inclusive_scan(Value (&values)[kThreads]) {
    for (size_t i = 1; i < kThreads; ++i) values[i] = combine(values[i - 1], values[i]);
  }
  void add(int32_t* count, int32_t more) { *count += more; }
};

template <class Shape>
bool answer(const Ids& ids) {
  const int64_t tokens = ids.tokens;
  const int blocks = Shape::blocks(tokens + 1);
  std::vector<ChunkEntry> chunks(tokens, {kUntouched, kUntouched, kUntouched, kUntouched});
  std::vector<SegmentEntry> segments(tokens, {kUntouched, kUntouched, kUntouched, kUntouched});
  std::vector<int32_t> row_segments(tokens / ids.T, kUntouched);
  TableCounts counts = {kUntouched, kUntouched, {kUntouched, kUntouched, kUntouched, kUntouched}};
  TableBlock garbage;
  garbage.runs = {12345, 67890, kUntouched, kUntouched, 3, 1};
  for (int32_t& count : garbage.ended) count = kUntouched;
  std::vector<TableBlock> table_blocks(blocks, garbage);
  const Tables tables = {chunks.data(), segments.data(), &counts, row_segments.data()};
  LoopTeam team{Shape::kThreads};
  // The threads of all blocks share nothing but the blocks' summaries, and find
  // theirs poisoned.
  for (int block = blocks; block-- > 0;) {
    typename Shape::Shared s;
    summarize_block<Shape>(team, s, ids, block, table_blocks.data());
  }
  for (int block = blocks; block-- > 0;) {
    typename Shape::Shared s;
    write_block<Shape>(team, s, ids, block, table_blocks.data(), tables);
  }
  std::cout << blocks << ' ' << counts.chunks << ' ' << counts.segments;
  for (int32_t count : counts.short_runs) std::cout << ' ' << count;
  for (int32_t count : row_segments) std::cout << ' ' << count;
  for (const ChunkEntry& c : chunks)
    std::cout << ' ' << c.row << ' ' << c.start << ' ' << c.length << ' ' << c.segment;
  for (const SegmentEntry& c : segments)
    std::cout << ' ' << c.row << ' ' << c.start << ' ' << c.length << ' ' << c.segment;
  std::cout << std::endl;
  return true;
}

}  // namespace

int main() {
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    int threads = 0, positions = 0;
    bool short_apart = false;
    int64_t B = 0, T = 0;
    Ids ids{};
    line >> threads >> positions >> ids.in_token_order >> short_apart >> B >> T;
    line >> ids.has_padding_id >> ids.padding_id;
    std::vector<int32_t> values(B * T);
    for (int32_t& id : values) line >> id;
    if (!line) return EXIT_FAILURE;
    ids.ids = values.data();
    ids.tokens = static_cast<int32_t>(B * T);
    ids.T = static_cast<int32_t>(T);
    auto of = [&](auto shape, auto apart) {
      return short_apart ? answer<decltype(apart)>(ids) : answer<decltype(shape)>(ids);
    };
    constexpr int32_t kShort = kShortTokens;
    const bool known =
        (threads == 1 && positions == 1)     ? of(Shape<1, 1>{}, Shape<1, 1, kShort>{})
        : (threads == 3 && positions == 2)   ? of(Shape<3, 2>{}, Shape<3, 2, kShort>{})
        : (threads == 16 && positions == 1)  ? of(Shape<16, 1>{}, Shape<16, 1, kShort>{})
        : (threads == 4 && positions == 32)  ? of(Shape<4, 32>{}, Shape<4, 32, kShort>{})
        : (threads == 128 && positions == 8) ? of(Shape<128, 8>{}, Shape<128, 8, kShort>{})
                                             : false;
    if (!known) return EXIT_FAILURE;
  }
}
