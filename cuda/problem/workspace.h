// The only place that knows what lies where in the forward's scratch buffer, and how large it is.
// Sizes follow from static shapes alone: segments decide how many chunks there are, never how many
// bytes. So per-token operands are stored as rows of their token, and a chunk's tile is the rows of
// its tokens.
#pragma once

#include <cstdint>

#include "problem/params.h"

namespace jax_flashkda {

inline constexpr int64_t kChunk = 64;  // tokens in a whole chunk
inline constexpr int64_t kWorkspaceAlignment = 1024;

// The tables. Chunks stand in the order of their tokens, padding included; segments longest first,
// by powers of two of their chunks and then in the order of their tokens.
//
// One chunk of one row: at most kChunk consecutive tokens of one segment, or of padding.
struct ChunkEntry {
  int32_t row;
  int32_t start;    // first token
  int32_t length;   // 1 .. kChunk
  int32_t segment;  // ordinal of the segment in its row, or kPadding
};

struct SegmentEntry {
  int32_t row;
  int32_t start;
  int32_t length;
  int32_t segment;
};

inline constexpr int32_t kPadding = -1;

// Counts that the segment table kernel leaves for the later stages.
struct TableCounts {
  int32_t chunks;
  int32_t segments;
};

// How the table is built (problem/segment_table.h): positions in blocks, and what one block tells
// the others.
inline constexpr int kMostTableBlocks = 128;
inline constexpr int kLengthBuckets = 16;

// The runs of ids that begin in a range of positions.
struct RunSummary {
  int32_t first_start = -1;  // position of the first run; -1: none begins in the range
  int32_t last_start = -1;
  int32_t chunks = 0;                // of the runs that end in the range as well
  int32_t segments = 0;              // runs that are no padding
  int32_t segments_before_row = -1;  // those before the last row's start; -1: no row starts here
  int32_t last_is_padding = 0;
};

struct TableBlock {
  RunSummary runs;
  int32_t ended[kLengthBuckets] = {};  // segments that begin and end in the block, by length
};

// The bf16 operands that the state stage multiplies, as it holds them in shared memory: tiles of
// one 128-byte row a token, the eight 16-byte pieces of a row permuted by swizzle128. Tile i of a
// chunk of L tokens starts i * L rows behind the chunk's first.
enum OperandTile {
  kTileKDecayed = 0,   // k exp(G), channels 0 .. 63, then 64 .. 127
  kTileQDecayed = 2,   // q exp(G)
  kTileKRestored = 4,  // k exp(G_C - G)
  kTileAkkInv = 6,     // (I + A_kk)^-1 Diag(beta)
  kTileAqk = 7,        // A_qk without the scale
  kOperandTiles = 8,
};
inline constexpr int64_t kTileRowBytes = 128;
inline constexpr int64_t kOperandBytes =
    kOperandTiles * kTileRowBytes;  // of a token and value head

// Byte offsets into the workspace. Token t of value head h of batch row b is operand row (b * HV +
// h) * T + t.
struct ForwardWorkspace {
  int64_t operands;       // [B, HV, T] rows of kOperandBytes: see OperandTile
  int64_t chunk_decay;    // [B, HV, decay_slots, K] f32  exp(G_C)
  int64_t chunk_table;    // [B T] ChunkEntry        with segment_ids
  int64_t segment_table;  // [B T] SegmentEntry      with segment_ids
  int64_t counts;         // TableCounts             with segment_ids
  int64_t row_segments;   // [B] int32 segments of a row, with segment_ids
  int64_t table_blocks;   // [kMostTableBlocks] TableBlock, with segment_ids
  int64_t decay_slots;    // a count, not an offset
  int64_t bytes;
};

inline ForwardWorkspace forward_workspace(const ForwardShape& shape) {
  ForwardWorkspace w{};
  int64_t end = 0;
  auto take = [&end](int64_t bytes) {
    int64_t at = end;
    end += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return at;
  };
  const int64_t head_tokens = shape.B * shape.HV * shape.T;
  w.operands = take(head_tokens * kOperandBytes);
  // A whole chunk that starts at t uses slot t / kChunk, which no other whole chunk of the row
  // shares. A shorter chunk ends its segment, so its decay matters to a final state alone: it uses
  // the slot of its segment behind those.
  w.decay_slots = (shape.T + kChunk - 1) / kChunk + shape.N;
  w.chunk_decay = take(shape.B * shape.HV * w.decay_slots * shape.K * 4);
  if (shape.has_segment_ids) {
    w.chunk_table = take(shape.B * shape.T * static_cast<int64_t>(sizeof(ChunkEntry)));
    w.segment_table = take(shape.B * shape.T * static_cast<int64_t>(sizeof(SegmentEntry)));
    w.counts = take(static_cast<int64_t>(sizeof(TableCounts)));
    w.row_segments = take(shape.B * 4);
    w.table_blocks = take(kMostTableBlocks * static_cast<int64_t>(sizeof(TableBlock)));
  }
  w.bytes = end;
  return w;
}

}  // namespace jax_flashkda
