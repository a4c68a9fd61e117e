// The only place that knows what lies where in the scratch buffers, and how large they are.
// Sizes follow from static shapes alone: segments decide how many chunks there are, never how many
// bytes. So per-token operands are stored as rows of their token, and a chunk's tile is the rows of
// its tokens.
#pragma once

#include <cstdint>

#include "problem/params.h"
#include "problem/stage_overlap.h"

namespace jax_flashkda {

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

// Runs that short_segments takes in calls without states (ForwardWorkspace::short_runs). They have
// no chunks and stand behind the other segments in the segment table, the last kind first.
inline constexpr int32_t kShortTokens = 32;
enum ShortKind : int32_t { kShortPadding, kOneToken, kOneBlock, kTwoBlocks, kShortKinds };

constexpr ShortKind short_kind(int32_t tokens, bool padding) {
  return padding ? kShortPadding : tokens == 1 ? kOneToken : tokens <= 16 ? kOneBlock : kTwoBlocks;
}

// Counts that the segment table kernel leaves for the later stages.
struct TableCounts {
  int32_t chunks;
  int32_t segments;                 // but for short ones, where those are apart
  int32_t short_runs[kShortKinds];  // written where they are
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
  kTileAkkInv = 6,     // (I + A_kk)^-1
  kTileAqk = 7,        // A_qk without the scale
  kOperandTiles = 8,
};
inline constexpr int64_t kTileRowBytes = 128;
inline constexpr int64_t kOperandBytes =
    kOperandTiles * kTileRowBytes;  // of a token and value head: every chunk starts a line of memory
// beta of a chunk's tokens, fp32, in whole pieces of 16 bytes, which zeros fill. A piece a token is
// room enough.
inline constexpr int64_t kBetaBytes = 16;
constexpr int64_t beta_bytes(int64_t length) { return (length + 3) / 4 * 16; }

// Few chains of chunks would leave most of the device idle, so a long row may be cut into pieces:
// over a piece the state moves by an affine map, S -> M S + B, which is exact. All but the last
// piece's M and B are found side by side, the states between pieces are combined, and then all
// pieces run at once. The choice follows from the shape alone, whatever the device, so that the same
// call gives the same bits everywhere.
struct StatePieces {
  int64_t count = 1;   // in a row
  int64_t tokens = 0;  // of each but the last, whole chunks
};

inline StatePieces state_pieces(const ForwardShape& shape) {
  StatePieces best = {1, shape.T};
  const int64_t chains = shape.B * shape.HV, chunks = (shape.T + kChunk - 1) / kChunk;
  if (shape.has_segment_ids || chains <= 0 || chunks == 0) return best;
  // Microseconds, measured on an H200: a chunk of a half head alone on its multiprocessor, of a
  // whole head with all of them busy, of both maps, of a combination.
  constexpr int64_t kProcessors = 132;
  constexpr double kHalfHead = 1.3, kWholeHead = 2.9, kMap = 2.6, kCombine = 2.5, kLaunches = 10;
  const auto waves = [](int64_t items) { return (items + kProcessors - 1) / kProcessors; };
  const double serial = 2 * chains <= kProcessors ? chunks * kHalfHead
                                                  : chunks * kWholeHead * waves(chains);
  double least = 0.85 * serial;  // small gains are not worth another order of rounding
  const StageTimes times(shape);
  const double overlapped = times.overlapped(times.best_overlap()) - times.prepare();
  if (overlapped < least) least = overlapped;  // in which the state stage walks whole rows
  for (int64_t count = 2; count * chains <= kProcessors; ++count) {
    const int64_t chunks_each = (chunks + count - 1) / count;
    if ((count - 1) * chunks_each >= chunks) continue;  // the last would be empty
    const double cost = chunks_each * (kMap + kWholeHead) +
                        kCombine * (count - 1) + kLaunches;
    if (cost < least) least = cost, best = {count, chunks_each * kChunk};
  }
  return best;
}

// Rows in pieces are not overlapped.
inline StageOverlap stage_overlap(const ForwardShape& shape, const StatePieces& pieces,
                                  StageOrder order) {
  if (order == StageOrder::kSerial || order == StageOrder::kWholeRows || pieces.count > 1 ||
      shape.B <= 0 || shape.T <= 0)
    return {};
  const StageTimes times(shape);
  const StageOverlap best = times.best_overlap();
  const bool faster = times.overlapped(best) < times.serial();
  return faster || order == StageOrder::kOverlapped ? best : StageOverlap{};
}

// How far the call is, where the stages overlap.
struct StageProgress {
  uint32_t spared;   // CTAs of chunk_prepare that have left their place to the state stage
  uint32_t workers;  // .. that have taken a share of the chunks
};

// [K, V] in fp32.
inline constexpr int64_t kStateFloats = 128 * 128;

// Byte offsets into the workspace. Token t of value head h of batch row b is operand row (b * HV +
// h) * T + t.
struct ForwardWorkspace {
  int64_t operands;       // [B, HV, T] rows of kOperandBytes: see OperandTile
  int64_t betas;          // [B, HV, T] pieces of kBetaBytes: a chunk's from its first token's on
  int64_t chunk_decay;    // [B, HV, decay_slots, K] f32  exp(G_C)
  int64_t chunk_table;    // [B T] ChunkEntry        with segment_ids
  int64_t segment_table;  // [B T] SegmentEntry      with segment_ids
  int64_t counts;         // TableCounts             with segment_ids
  int64_t row_segments;   // [B] int32 segments of a row, with segment_ids
  int64_t table_blocks;   // [kMostTableBlocks] TableBlock, with segment_ids
  int64_t piece_maps;     // [B, pieces - 1, HV, 2] states: B, later the state behind; and M
  int64_t progress;       // StageProgress           zeroed where the stages overlap
  int64_t prepared;       // [B HV T / 32] words     zeroed likewise: bit i: the chunk whose first
                          //                         token is operand row i is there
  int64_t progress_bytes;  // of both
  StatePieces pieces;
  StageOverlap overlap;
  int64_t decay_slots;  // a count, not an offset
  int64_t bytes;
  bool short_runs;  // are left to short_segments: see leaves_short_runs
};

// Hands out aligned places one behind the other.
struct WorkspaceLayout {
  int64_t end = 0;

  int64_t take(int64_t bytes) {
    const int64_t at = end;
    end += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return at;
  }
};

// A whole chunk that starts at t uses slot t / kChunk, which no other whole chunk of the row shares.
// A shorter chunk ends its segment, so its decay matters to a final state alone: it uses the slot of
// its segment behind those.
inline int64_t decay_slots(const ForwardShape& shape) {
  return (shape.T + kChunk - 1) / kChunk + shape.N;
}

// Without operands and decays, where these have places of their own (ForwardParams::prepared): the
// call's workspace is what else there is, and the offsets that lead to them are filled in later.
inline ForwardWorkspace forward_workspace(const ForwardShape& shape,
                                          StageOrder order = StageOrder::kByShape,
                                          bool prepared_apart = false) {
  ForwardWorkspace w{};
  WorkspaceLayout layout;
  const int64_t head_tokens = shape.B * shape.HV * shape.T;
  w.decay_slots = decay_slots(shape);
  if (!prepared_apart) {
    w.operands = layout.take(head_tokens * kOperandBytes);
    w.betas = layout.take(head_tokens * kBetaBytes);
    w.chunk_decay = layout.take(shape.B * shape.HV * w.decay_slots * shape.K * 4);
  }
  if (shape.has_segment_ids) {
    w.chunk_table = layout.take(shape.B * shape.T * static_cast<int64_t>(sizeof(ChunkEntry)));
    w.segment_table = layout.take(shape.B * shape.T * static_cast<int64_t>(sizeof(SegmentEntry)));
    w.counts = layout.take(static_cast<int64_t>(sizeof(TableCounts)));
    w.row_segments = layout.take(shape.B * 4);
    w.table_blocks = layout.take(kMostTableBlocks * static_cast<int64_t>(sizeof(TableBlock)));
  }
  w.pieces = order == StageOrder::kWholeRows ? StatePieces{1, shape.T} : state_pieces(shape);
  if (w.pieces.count > 1)
    w.piece_maps = layout.take(shape.B * (w.pieces.count - 1) * shape.HV * 2 * kStateFloats * 4);
  // Whatever the order, so that the bytes follow from the shape.
  w.overlap = stage_overlap(shape, w.pieces, order);
  w.progress = layout.take(static_cast<int64_t>(sizeof(StageProgress)));
  w.prepared = layout.take((head_tokens + 31) / 32 * 4);
  w.progress_bytes = layout.end - w.progress;
  w.bytes = layout.end;
  return w;
}

// Of a call whose operands lie apart: there is nothing to overlap with, and rows are not cut.
inline ForwardWorkspace prepared_workspace(const ForwardShape& shape) {
  return forward_workspace(shape, StageOrder::kWholeRows, /*prepared_apart=*/true);
}

// Whether no state meets a short segment, so that it needs no chunk. The results are those of
// another order of rounding: a choice by what a call asks for, never by what its segments are.
inline bool leaves_short_runs(const ForwardParams& p) {
  return (p.shape.has_segment_ids || p.shape.T <= kShortTokens) && p.initial_state == nullptr &&
         p.final_state == nullptr && p.chunk_states == nullptr;
}

// The state, or its gradient, between two chunks of one segment, of which the second starts at
// token t: two halves of 64 channels; a half is V rows of 64 bf16 channels, swizzled by swizzle128.
// Boundaries of a row are at least kChunk apart, so it has slot t / kChunk to itself.
inline constexpr int64_t kBoundaryBytes = 128 * 128 * 2;

// A CTA's sums over its chunks, for one row and head: d_dt_bias of each channel, then dA_log.
inline constexpr int64_t gradient_partial_floats(const ForwardShape& shape) { return shape.K + 1; }

// CTAs of a value head in the gradient stage, of which number i takes chunks i, i + CTAs, ..: a
// function of the shape alone, so that sums over chunks have one order. One CTA fits a
// multiprocessor of which the largest device has 132, and starting one costs about a chunk: the
// number that ends soonest if rows are single segments. None without tokens.
inline int64_t gradient_ctas_per_head(const ForwardShape& shape) {
  constexpr int64_t kMultiprocessors = 132, kMost = 2 * kMultiprocessors;
  const int64_t chunks = shape.B * ((shape.T + kChunk - 1) / kChunk);
  int64_t best = 0, best_time = 0;
  for (int64_t ctas = 1; ctas <= chunks && ctas <= kMost; ++ctas) {
    const int64_t waves = (ctas * shape.HV + kMultiprocessors - 1) / kMultiprocessors;
    const int64_t time = waves * ((chunks + ctas - 1) / ctas + 1);
    if (best == 0 || time < best_time) best = ctas, best_time = time;
  }
  return best;
}

// Offsets in bytes. The forward's workspace comes first: its stages run here unchanged.
struct BackwardWorkspace {
  ForwardWorkspace forward;
  int64_t states;            // [B, HV, boundary_slots] of kBoundaryBytes
  int64_t state_gradients;   // [B, HV, boundary_slots] of kBoundaryBytes
  int64_t corrected_values;  // [B, T, HV, V] bf16  U
  int64_t head_gradients_q;  // [B, T, HV, K] f32   dq before its sum over a group, with HV > H
  int64_t head_gradients_k;  // [B, T, HV, K] f32   dk likewise
  int64_t partials;          // [gradient_ctas_per_head, B, HV] of gradient_partial_floats
  int64_t boundary_slots;    // a count, not an offset
  int64_t bytes;
};

inline BackwardWorkspace backward_workspace(const ForwardShape& shape,
                                            bool prepared_apart = false) {
  BackwardWorkspace w{};
  w.forward = prepared_apart ? prepared_workspace(shape)
                             : forward_workspace(shape, StageOrder::kSerial);
  WorkspaceLayout layout{w.forward.bytes};
  const int64_t head_tokens = shape.B * shape.HV * shape.T;
  w.boundary_slots = (shape.T + kChunk - 1) / kChunk;
  w.states = layout.take(shape.B * shape.HV * w.boundary_slots * kBoundaryBytes);
  w.state_gradients = layout.take(shape.B * shape.HV * w.boundary_slots * kBoundaryBytes);
  w.corrected_values = layout.take(head_tokens * shape.V * 2);
  if (shape.HV > shape.H) {
    w.head_gradients_q = layout.take(head_tokens * shape.K * 4);
    w.head_gradients_k = layout.take(head_tokens * shape.K * 4);
  }
  w.partials = layout.take(gradient_ctas_per_head(shape) * shape.B * shape.HV *
                           gradient_partial_floats(shape) * 4);
  w.bytes = layout.end;
  return w;
}

}  // namespace jax_flashkda
