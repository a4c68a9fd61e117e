// All facts about a chunk, read once, and clamped: the table is a buffer too, and no content of it may reach outside a row.
#pragma once

#include "problem/workspace.h"

namespace jax_flashkda {

struct Chunk {
  int64_t row;
  int64_t start;
  int length;     // 1 .. kChunk
  bool padding;
  int64_t decay_slot;  // where its whole decay is kept, or -1: nobody will ask for it
};

__device__ __forceinline__ int64_t clamp_to(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Whole chunks are always asked for; a shorter one ends its segment and matters to a kept final state alone.
__device__ __forceinline__ int64_t chunk_decay_slot(const ForwardShape& shape, int64_t start, int length, int64_t segment) {
  if (length == kChunk) return start / kChunk;
  return segment < shape.N ? (shape.T + kChunk - 1) / kChunk + segment : -1;
}

__device__ __forceinline__ Chunk chunk_from_entry(const ForwardShape& shape, const ChunkEntry& entry) {
  Chunk chunk;
  chunk.row = clamp_to(entry.row, 0, shape.B - 1);
  chunk.start = clamp_to(entry.start, 0, shape.T - 1);
  const int64_t room = shape.T - chunk.start < kChunk ? shape.T - chunk.start : kChunk;
  chunk.length = static_cast<int>(clamp_to(entry.length, 1, room));
  chunk.padding = entry.segment < 0;
  chunk.decay_slot = chunk.padding ? -1 : chunk_decay_slot(shape, chunk.start, chunk.length, entry.segment);
  return chunk;
}

// Without segment_ids chunk number `index` counts through the rows, ceil(T / kChunk) to a row.
__device__ __forceinline__ Chunk chunk_without_table(const ForwardShape& shape, uint32_t index) {
  const uint32_t chunks_in_row = static_cast<uint32_t>((shape.T + kChunk - 1) / kChunk);
  ChunkEntry entry;
  entry.row = static_cast<int32_t>(index / chunks_in_row);
  entry.start = static_cast<int32_t>(index % chunks_in_row * static_cast<uint32_t>(kChunk));
  entry.length = static_cast<int32_t>(shape.T - entry.start < kChunk ? shape.T - entry.start : kChunk);
  entry.segment = 0;
  return chunk_from_entry(shape, entry);
}

struct Segment {
  int64_t row;
  int64_t start;
  int64_t length;
  int64_t slot;  // its state slot, or -1: starts from zero, final state dropped
};

__device__ __forceinline__ Segment segment_from_entry(const ForwardShape& shape, const SegmentEntry& entry) {
  Segment segment;
  segment.row = clamp_to(entry.row, 0, shape.B - 1);
  segment.start = clamp_to(entry.start, 0, shape.T - 1);
  segment.length = clamp_to(entry.length, 1, shape.T - segment.start);
  segment.slot = entry.segment >= 0 && entry.segment < shape.N ? entry.segment : -1;
  return segment;
}

}  // namespace jax_flashkda
