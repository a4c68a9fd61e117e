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

// The CTA's share of the items: it counts through the heads of a chunk, then the chunks, in steps of
// the grid's size. One warp walks; where it is lies in shared memory, not in everybody's registers.
__device__ __forceinline__ void start_walk(Config::Walk& walk, const ForwardParams& p,
                                           const ForwardWorkspace& w) {
  const int64_t T = p.shape.T;
  int64_t chunks = p.shape.B * ((T + kChunk - 1) / kChunk);  // below 2^31
  if (p.shape.has_segment_ids) {
    const uint8_t* counts = static_cast<const uint8_t*>(p.workspace) + w.counts;
    chunks = clamp_to<int64_t>(reinterpret_cast<const TableCounts*>(counts)->chunks, 0,
                               p.shape.B * T);
  }
  const uint32_t heads = static_cast<uint32_t>(p.shape.HV);
  walk = {static_cast<uint32_t>(chunks), blockIdx.x / heads, blockIdx.x % heads};
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

// The next item that is not padding; the output of padding, if any, is cleared on the way.
__device__ __forceinline__ Item find_item(Config::Walk& shared_walk, const ForwardParams& p,
                                          const ForwardWorkspace& w, int lane) {
  const uint32_t heads = static_cast<uint32_t>(p.shape.HV);
  Config::Walk walk = shared_walk;
  Item item = {};
  while (item.length == 0 && walk.index < walk.chunks) {
    Chunk chunk;
    if (p.shape.has_segment_ids) {
      const uint8_t* table = static_cast<const uint8_t*>(p.workspace) + w.chunk_table;
      chunk = chunk_from_entry(p.shape, reinterpret_cast<const ChunkEntry*>(table)[walk.index]);
    } else {
      chunk = chunk_without_table(p.shape, walk.index);
    }
    item = item_of(p, w, chunk, walk.head);
    if (chunk.padding) {
      if (p.o != nullptr) clear_output(p, item, lane);
      item.length = 0;
    }
    walk.index += gridDim.x / heads;
    walk.head += gridDim.x % heads;
    if (walk.head >= heads) {
      walk.head -= heads;
      ++walk.index;
    }
  }
  __syncwarp();  // all lanes have read where the walk was
  if (lane == 0) shared_walk = walk;
  return item;
}

}  // namespace jax_flashkda::chunk_prepare
