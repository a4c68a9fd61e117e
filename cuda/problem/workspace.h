// The only place that knows what lies where in the forward's scratch buffer, and how large it is.
// Sizes follow from static shapes alone: segments decide how many chunks there are, never how many bytes.
// So per-token operands are stored as rows of their token, and a chunk's tile is the rows of its tokens.
#pragma once

#include <cstdint>

#include "problem/params.h"

namespace jax_flashkda {

inline constexpr int64_t kChunk = 64;  // tokens in a whole chunk
inline constexpr int64_t kWorkspaceAlignment = 1024;

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
  int32_t chunks;    // entries in the chunk table
  int32_t segments;  // entries in the segment table
  int32_t next_segment_item;  // ticket of the state stage, zero at its start
  int32_t unused;
};

// Byte offsets into the workspace. Row r of value head h of batch row b is row (b * HV + h) * T + r.
struct ForwardWorkspace {
  int64_t k_decayed;      // [B, HV, T, K] bf16  k exp(G), images (see image_offset)
  int64_t q_decayed;      // [B, HV, T, K] bf16  q exp(G)
  int64_t k_restored;     // [B, HV, T, K] bf16  k exp(G_C - G)
  int64_t A_kk_inv;       // [B, HV, T, C] bf16  (I + A_kk)^-1 Diag(beta)
  int64_t A_qk;           // [B, HV, T, C] bf16  without the scale
  int64_t chunk_decay;    // [B, HV, decay_slots, K] f32  exp(G_C)
  int64_t chunk_table;    // [B T] ChunkEntry        with segment_ids
  int64_t segment_table;  // [B T] SegmentEntry      with segment_ids
  int64_t counts;         // TableCounts             with segment_ids
  int64_t row_segments;   // [B] int32 segments of a row, with segment_ids
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
  w.k_decayed = take(head_tokens * shape.K * 2);
  w.q_decayed = take(head_tokens * shape.K * 2);
  w.k_restored = take(head_tokens * shape.K * 2);
  w.A_kk_inv = take(head_tokens * kChunk * 2);
  w.A_qk = take(head_tokens * kChunk * 2);
  // A whole chunk that starts at t uses slot t / kChunk, which no other whole chunk of the row shares. A shorter chunk ends its
  // segment, so its decay matters to a final state alone: it uses the slot of its segment behind those.
  w.decay_slots = (shape.T + kChunk - 1) / kChunk + shape.N;
  w.chunk_decay = take(shape.B * shape.HV * w.decay_slots * shape.K * 4);
  if (shape.has_segment_ids) {
    w.chunk_table = take(shape.B * shape.T * static_cast<int64_t>(sizeof(ChunkEntry)));
    w.segment_table = take(shape.B * shape.T * static_cast<int64_t>(sizeof(SegmentEntry)));
    w.counts = take(static_cast<int64_t>(sizeof(TableCounts)));
    w.row_segments = take(shape.B * 4);
  }
  w.bytes = end;
  return w;
}

}  // namespace jax_flashkda
