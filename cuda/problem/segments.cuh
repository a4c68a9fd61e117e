// All facts about a chunk, read once, and clamped: the table is a buffer too, and no content of it
// may reach outside a row.
#pragma once

#include "problem/workspace.h"

namespace jax_flashkda {

// Rows and tokens of a call number below 2^31 (dispatch refuses more), so a chunk is told in 32
// bits; products of them are not.
struct Chunk {
  int32_t row = 0;
  int32_t start = 0;
  int32_t length = 0;       // 1 .. kChunk; 0: there is none
  int32_t decay_slot = -1;  // where its whole decay is kept, or -1: nobody will ask for it
  bool padding = false;
};

template <class Int>
__device__ __forceinline__ Int clamp_to(Int value, Int low, Int high) {
  return value < low ? low : value > high ? high : value;
}

// The state slot of a segment, by its number, that ends ahead of token `end`; or -1.
__device__ __forceinline__ int32_t state_slot(const ForwardShape& shape, int32_t segment,
                                              int32_t end) {
  const int32_t N = static_cast<int32_t>(shape.N);
  if (segment < N - shape.tail_slot) return segment;
  return shape.tail_slot && end == shape.T ? N - 1 : -1;
}

// Whole chunks are always asked for; a shorter one ends its segment and matters to a kept final
// state alone.
__device__ __forceinline__ int32_t chunk_decay_slot(const ForwardShape& shape, int32_t start,
                                                    int32_t length, int32_t segment) {
  constexpr int32_t kTokens = static_cast<int32_t>(kChunk);
  if (length == kTokens) return start / kTokens;
  const int32_t slot = state_slot(shape, segment, start + length);
  if (slot < 0) return -1;
  return static_cast<int32_t>((static_cast<uint32_t>(shape.T) + kTokens - 1) / kTokens) + slot;
}

__device__ __forceinline__ Chunk chunk_from_entry(const ForwardShape& shape,
                                                  const ChunkEntry& entry) {
  const int32_t T = static_cast<int32_t>(shape.T);
  Chunk chunk;
  chunk.row = clamp_to(entry.row, 0, static_cast<int32_t>(shape.B) - 1);
  chunk.start = clamp_to(entry.start, 0, T - 1);
  chunk.length = clamp_to(entry.length, 1, min(T - chunk.start, static_cast<int32_t>(kChunk)));
  chunk.padding = entry.segment < 0;
  chunk.decay_slot =
      chunk.padding ? -1 : chunk_decay_slot(shape, chunk.start, chunk.length, entry.segment);
  return chunk;
}

// Without segment_ids a row has ceil(T / kChunk) chunks.
__device__ __forceinline__ uint32_t chunks_of_row(const ForwardShape& shape) {
  constexpr uint32_t kTokens = static_cast<uint32_t>(kChunk);
  return (static_cast<uint32_t>(shape.T) + kTokens - 1) / kTokens;
}
__device__ __forceinline__ Chunk chunk_of_row(const ForwardShape& shape, uint32_t row,
                                              uint32_t index) {
  constexpr uint32_t kTokens = static_cast<uint32_t>(kChunk);
  const uint32_t T = static_cast<uint32_t>(shape.T), start = index * kTokens;
  Chunk chunk;
  chunk.row = static_cast<int32_t>(row);
  chunk.start = static_cast<int32_t>(start);
  chunk.length = static_cast<int32_t>(min(T - start, kTokens));
  chunk.decay_slot = chunk_decay_slot(shape, chunk.start, chunk.length, 0);
  return chunk;
}

// The same by a number that counts through the rows.
__device__ __forceinline__ Chunk chunk_without_table(const ForwardShape& shape, uint32_t index) {
  const uint32_t row = index / chunks_of_row(shape);
  return chunk_of_row(shape, row, index - row * chunks_of_row(shape));
}

struct Segment {
  int64_t row;
  int64_t start;
  int64_t length;
  int64_t slot;  // its state slot, or -1: starts from zero, final state dropped
};

__device__ __forceinline__ Segment segment_from_entry(const ForwardShape& shape,
                                                      const SegmentEntry& entry) {
  Segment segment;
  segment.row = clamp_to<int64_t>(entry.row, 0, shape.B - 1);
  segment.start = clamp_to<int64_t>(entry.start, 0, shape.T - 1);
  segment.length = clamp_to<int64_t>(entry.length, 1, shape.T - segment.start);
  segment.slot = entry.segment < 0
                     ? -1
                     : state_slot(shape, entry.segment,
                                  static_cast<int32_t>(segment.start + segment.length));
  return segment;
}

}  // namespace jax_flashkda
