// The chunks of a CTA, and what it reads for one.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

// What a warp knows of the strip it owns.
struct Strip {
  int warp, lane, channel;
  int rows;  // tokens that exist, at most kStrip; 0 or less: none
  __device__ explicit Strip(int length)
      : warp(thread_index() / 32),
        lane(thread_index() % 32),
        channel(Config::kChannels * lane),
        rows(length - Config::kStrip * warp) {}
  __device__ int block() const { return warp / Config::kStripsOfBlock; }
  __device__ int row(int r) const { return Config::kStrip * warp + r; }  // of the chunk
  // Of the lane's channels in row r, from the start of a tile of the block.
  __device__ int tile_place(int r) const {
    const int row = Config::kStrip * (warp % Config::kStripsOfBlock);
    return ((tile_offset(row, lane >> 1) + 8 * (lane & 1)) ^ (r << 4)) + r * Config::kRowBytes;
  }
};

// Rows of q, k and g of a chunk to shared memory, in the background; zeros behind its end. And the
// gate's parameters, where there are any.
template <DType kGateType>
__device__ __forceinline__ void stage_inputs(Config::Shared& s, const ForwardParams& p,
                                             const Item& item) {
  constexpr int kPieces = Config::kRowBytes / 16, kRows = Config::kThreads / kPieces;
  static_assert(kRows == 2 * kBlock);
  const uint32_t thread = thread_index(), row = thread / kPieces, piece = thread % kPieces;
  const int to = (row / kBlock) * kTileBytes + tile_offset(row % kBlock, piece);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t token = static_cast<int32_t>(row) + half * kRows;
    const bool exists = token < item.length;
    const int64_t within = min(token, item.length - 1);  // an address that exists in any case
    auto stage = [&](uint8_t (&tiles)[Config::kBlocks][kTileBytes], const void* from, int64_t at) {
      async_load_16(&tiles[2 * half][to],
                    static_cast<const uint8_t*>(from) + at * Config::kRowBytes + 16 * piece, exists);
    };
    if constexpr (kGateType == DType::kBF16)
      stage(s.g, p.g, item.value_row + within * p.shape.HV);
    const int64_t qk_row = item.qk_row + within * p.shape.H;
    stage(s.k, p.k, qk_row);
    stage(s.q, p.q, qk_row);
  }
  if (thread < Config::kHeadDim / 4 && p.dt_bias != nullptr)
    async_load_16(&s.dt_bias[4 * thread],
                  p.dt_bias + int64_t{item.gate_row} * Config::kHeadDim + 4 * thread, true);
  if (thread == 32 && p.A_log != nullptr) async_load_4(&s.A_log, p.A_log + item.gate_row);
}

// A lane's four channels of a staged row.
__device__ __forceinline__ void unpack(float (&x)[4], uint2 packed) {
  x[0] = bf16_low(packed.x);
  x[1] = bf16_high(packed.x);
  x[2] = bf16_low(packed.y);
  x[3] = bf16_high(packed.y);
}
__device__ __forceinline__ uint2 staged_row(const uint8_t (&tiles)[Config::kBlocks][kTileBytes],
                                            const Strip& strip, int r) {
  return *reinterpret_cast<const uint2*>(&tiles[strip.block()][strip.tile_place(r)]);
}

// beta of the chunk's tokens, one for each of 64 threads: on its way during other work, then in
// shared memory.
__device__ __forceinline__ uint32_t load_beta(const ForwardParams& p, const Item& item, int token) {
  if (token < 0 || token >= item.length) return 0;
  return load_beta_word(p, item.value_row + token * p.shape.HV);
}
__device__ __forceinline__ void publish_beta(Config::Shared& s, uint32_t word,
                                             const ForwardParams& p, int length, int token) {
  if (token < 0 || token >= kChunk) return;
  s.beta[token] = token < length ? beta_from_word(p, word) : 0.0f;
}

// The CTA's share of the items. A track is a value head of a row, or of the whole table; items go
// by groups of tracks, in a group by chunks, and of a chunk through the tracks, whose rows are
// neighbours in memory. A CTA takes every `step`th. One warp walks; where it is lies in shared
// memory, not in everybody's registers.
__device__ __forceinline__ uint32_t tracks_of(const ForwardParams& p) {
  return static_cast<uint32_t>(p.shape.has_segment_ids ? p.shape.HV : p.shape.B * p.shape.HV);
}
__device__ __forceinline__ uint32_t group_size(const ForwardParams& p, const ForwardWorkspace& w,
                                               uint32_t first) {
  const int64_t size = w.overlap.processors > 0 ? w.overlap.tracks : p.shape.HV;
  return min(static_cast<uint32_t>(size), tracks_of(p) - first);
}

// Carries what `track` counts beyond the group over to the next chunks, and groups.
__device__ __forceinline__ void carry_over(Config::Walk& walk, const ForwardParams& p,
                                           const ForwardWorkspace& w) {
  uint32_t size = group_size(p, w, walk.first);
  while (size > 0 && walk.track >= size) {
    walk.index += walk.track / size;
    walk.track %= size;
    if (walk.index < walk.chunks) return;
    walk.track += (walk.index - walk.chunks) * size;  // of the next group
    walk.index = 0;
    walk.first += size;
    size = group_size(p, w, walk.first);
  }
}

// The number of this CTA among the `workers` that share the items, or one behind them. The CTAs on
// as many multiprocessors as the state stage gets leave, for it to run there; but at most as many
// as are to spare, so that wherever CTAs come to run, each share of the items has its worker.
__device__ __forceinline__ uint32_t worker_number(const ForwardParams& p, const ForwardWorkspace& w,
                                                  uint32_t workers) {
  StageProgress* progress =
      reinterpret_cast<StageProgress*>(static_cast<uint8_t*>(p.workspace) + w.progress);
  if (multiprocessor_index() < w.overlap.processors &&
      atomicAdd(&progress->spared, 1u) < gridDim.x - workers)
    return workers;
  return atomicAdd(&progress->workers, 1u);
}

__device__ __forceinline__ void start_walk(Config::Walk& walk, const ForwardParams& p,
                                           const ForwardWorkspace& w, uint32_t workers) {
  walk = {workers, chunks_of_row(p.shape), 0, blockIdx.x, 0};
  if (p.shape.has_segment_ids) {
    const uint8_t* counts = static_cast<const uint8_t*>(p.workspace) + w.counts;
    walk.chunks = static_cast<uint32_t>(clamp_to<int64_t>(
        reinterpret_cast<const TableCounts*>(counts)->chunks, 0, p.shape.B * p.shape.T));
  }
  if (w.overlap.processors > 0) {
    walk.track = worker_number(p, w, workers);
    if (walk.track >= workers) walk.first = tracks_of(p);
  }
  carry_over(walk, p, w);
}

__device__ __forceinline__ Item item_of(const ForwardParams& p, const ForwardWorkspace& w,
                                        const Chunk& chunk, uint32_t head) {
  const ForwardShape& shape = p.shape;
  const int64_t token = int64_t{chunk.row} * shape.T + chunk.start;
  const uint32_t group = static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H);
  Item item;
  item.qk_row = token * shape.H + head / group;
  item.value_row = token * shape.HV + head;
  item.gate_row = static_cast<int32_t>(chunk.row * shape.HV + head);
  item.operand_row = item.gate_row * shape.T + chunk.start;
  item.decay_row = chunk.decay_slot < 0 ? -1 : item.gate_row * w.decay_slots + chunk.decay_slot;
  item.length = chunk.length;
  return item;
}

__device__ __forceinline__ void clear_output(const ForwardParams& p, const Item& item, int lane) {
  uint4* o = reinterpret_cast<uint4*>(p.o);
  for (int at = lane; at < item.length * 16; at += 32)
    o[(item.value_row + (at >> 4) * p.shape.HV) * 16 + (at & 15)] = make_uint4(0, 0, 0, 0);
}

// The next item that is not padding, to shared memory; the output of padding, if any, is cleared on
// the way. One warp.
__device__ __forceinline__ void find_item(Item& found, Config::Walk& walk, const ForwardParams& p,
                                          const ForwardWorkspace& w, int lane) {
  const uint32_t heads = static_cast<uint32_t>(p.shape.HV);
  bool more = true;
  while (more) {
    Item item = {};
    more = walk.first < tracks_of(p) && walk.index < walk.chunks;
    if (more) {
      const uint32_t track = walk.first + walk.track;
      Chunk chunk;
      if (p.shape.has_segment_ids) {
        const uint8_t* table = static_cast<const uint8_t*>(p.workspace) + w.chunk_table;
        chunk = chunk_from_entry(p.shape, reinterpret_cast<const ChunkEntry*>(table)[walk.index]);
      } else {
        chunk = chunk_of_row(p.shape, track / heads, walk.index);
      }
      item = item_of(p, w, chunk, track % heads);
      if (chunk.padding) {
        if (p.o != nullptr) clear_output(p, item, lane);
        item.length = 0;
      }
      more = chunk.padding;
    }
    __syncwarp();  // all lanes have read where the walk was
    if (lane == 0) {
      found = item;
      walk.track += walk.step;
      carry_over(walk, p, w);
    }
    __syncwarp();  // where the walk is, before it is read again
  }
}

// Tells the state stage that the item which begins at an operand row is in memory: all threads'
// writes of it came before a barrier. Row -1: nobody waits.
__device__ __forceinline__ void announce(const ForwardParams& p, const ForwardWorkspace& w,
                                         int64_t operand_row) {
  if (operand_row < 0) return;
  uint32_t* prepared = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.workspace) + w.prepared);
  set_bits_release(prepared + operand_row / 32, 1u << (operand_row % 32));
}

}  // namespace jax_flashkda::chunk_prepare
