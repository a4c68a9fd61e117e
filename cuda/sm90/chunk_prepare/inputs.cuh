// The chunks of a CTA, and what it reads for one.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

// The part of a chunk that a warp owns, and what its lanes have of it.
struct Place {
  int block;  // of 16 tokens
  int half;   // of the channels
  int lane;

  // Warps that share a scheduler have the most and the fewest blocks of scores.
  static __device__ Place of_warp() {
    const int warp = static_cast<int>(thread_index() / 32);
    return {(warp >> 1) ^ (warp >> 2), warp & 1, static_cast<int>(thread_index() % 32)};
  }
  __device__ int row() const { return lane >> 2; }  // of an operand's or an accumulator's 8 rows
  __device__ int quarter() const { return lane & 3; }
  // Of a product's right operand, as ldmatrix.trans brings it.
  __device__ int token(int i) const { return kBlock * block + 2 * quarter() + i % 2 + 8 * (i / 2); }
  // The first of two neighbours of an accumulator, eight channels of which are number j.
  __device__ int channel(int j) const { return Config::kChannels * half + 8 * j + 2 * quarter(); }
  // How far element i of the n-th eight columns of a 16 x 16 accumulator is below its diagonal.
  __device__ int below_diagonal(int n, int i) const {
    return row() + 8 * (i / 2) - 8 * n - 2 * quarter() - i % 2;
  }
  // For load_matrices and store_matrices: the block's tokens, channels 16 step .. 16 step + 15.
  __device__ uint32_t address(const Config::Halves& rows, int step) const {
    return address(rows[half], block, step);
  }
  __device__ uint32_t address(const uint8_t* tile, int of_block, int step) const {
    return (shared_address(tile) + swizzle128(kBlock * of_block + (lane & 15), lane >> 4)) ^
           (step << 5);
  }
  // The same in the order of a right operand.
  __device__ uint32_t column_address(const Config::Halves& rows, int of_block, int step) const {
    const int row = kBlock * of_block + (lane & 7) + 8 * (lane >> 4);
    return (shared_address(rows[half]) + swizzle128(row, (lane >> 3) & 1)) ^ (step << 5);
  }
};

// Rows of q, k and g of a chunk to shared memory, in the background, by the threads of four warps;
// zeros behind its end. And the gate's parameters, where there are any.
template <DType kGateType>
__device__ __forceinline__ void stage_inputs(Config::Shared& s, const ForwardParams& p,
                                             const Item& item, int thread) {
  constexpr int kPieces = Config::kRowBytes / 16, kRows = Config::kStagingThreads / kPieces;
  static_assert(kRows == 8);  // pieces are swizzled alike in each turn
  const int first = thread / kPieces, piece = thread % kPieces;
  const int to = swizzle128(first, piece % 8);
  auto stage = [&](Config::Halves& tiles, const void* tensor, int64_t row, int64_t heads) {
    const int64_t step = heads * Config::kRowBytes;  // from token to token
    const uint8_t* rows =
        static_cast<const uint8_t*>(tensor) + row * Config::kRowBytes + 16 * piece;
    const uint8_t* from = rows + first * step;
    uint8_t* tile = tiles[piece / 8] + to;
    if (item.length == kChunk) {
#pragma unroll
      for (int turn = 0; turn < kChunk / kRows; ++turn, from += kRows * step)
        async_load_16(tile + turn * kRows * kTileRowBytes, from, true);
    } else {
      for (int token = first; token < kChunk;
           token += kRows, from += kRows * step, tile += kRows * kTileRowBytes) {
        const bool exists = token < item.length;
        async_load_16(tile, exists ? from : rows, exists);
      }
    }
  };
  if constexpr (kGateType == DType::kBF16) stage(s.g, p.g, item.value_row, p.shape.HV);
  stage(s.k, p.k, item.qk_row, p.shape.H);
  stage(s.q, p.q, item.qk_row, p.shape.H);
  if (thread < Config::kHeadDim / 4 && p.dt_bias != nullptr)
    async_load_16(&s.dt_bias[4 * thread],
                  p.dt_bias + int64_t{item.gate_row} * Config::kHeadDim + 4 * thread, true);
  if (thread == 32 && p.A_log != nullptr) async_load_4(&s.A_log, p.A_log + item.gate_row);
}

// beta of the chunk's tokens, one for each of 64 threads: on its way during other work, then in
// shared memory, and beside the operands for the state stage, where it comes in pieces of 16 bytes.
__device__ __forceinline__ uint32_t load_beta(const ForwardParams& p, const Item& item, int token) {
  return token < item.length ? load_beta_word(p, item.value_row + token * p.shape.HV) : 0;
}
__device__ __forceinline__ void publish_beta(Config::Shared& s, uint32_t word,
                                             const ForwardParams& p, const Item& item,
                                             uint8_t* betas, int token) {
  const float beta = token < item.length ? beta_from_word(p, word) : 0.0f;
  s.beta[token] = beta;
  if (4 * token < beta_bytes(item.length))
    reinterpret_cast<float*>(betas)[token] = beta;
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

// Begins a group: `track` may count beyond it, over to the next chunks, and groups.
__device__ __forceinline__ void enter_group(Config::Walk& walk, const ForwardParams& p,
                                            const ForwardWorkspace& w) {
  walk.size = group_size(p, w, walk.first);
  while (walk.size > 0) {
    walk.index = walk.track / walk.size;
    if (walk.index < walk.chunks) break;
    walk.track -= walk.chunks * walk.size;  // of the next group
    walk.first += walk.size;
    walk.size = group_size(p, w, walk.first);
  }
  if (walk.size == 0) return;
  walk.track -= walk.index * walk.size;
  walk.step_chunks = walk.step / walk.size;
  walk.step_tracks = walk.step - walk.step_chunks * walk.size;
}
__device__ __forceinline__ void advance(Config::Walk& walk, const ForwardParams& p,
                                        const ForwardWorkspace& w) {
  walk.track += walk.step_tracks;
  walk.index += walk.step_chunks;
  if (walk.track >= walk.size) walk.track -= walk.size, ++walk.index;
  if (walk.index < walk.chunks) return;
  walk.track += (walk.index - walk.chunks) * walk.size;
  walk.first += walk.size;
  enter_group(walk, p, w);
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
  walk = {};
  walk.step = workers;
  walk.chunks = chunks_of_row(p.shape);
  walk.track = blockIdx.x;
  if (p.shape.has_segment_ids) {
    const uint8_t* counts = static_cast<const uint8_t*>(p.workspace) + w.counts;
    walk.chunks = static_cast<uint32_t>(clamp_to<int64_t>(
        reinterpret_cast<const TableCounts*>(counts)->chunks, 0, p.shape.B * p.shape.T));
  }
  if (w.overlap.processors > 0) {
    walk.track = worker_number(p, w, workers);
    if (walk.track >= workers) walk.first = tracks_of(p);
  }
  enter_group(walk, p, w);
}

__device__ __forceinline__ Item item_of(const ForwardParams& p, const ForwardWorkspace& w,
                                        const Chunk& chunk, uint32_t head) {
  const ForwardShape& shape = p.shape;
  const int64_t token = int64_t{chunk.row} * shape.T + chunk.start;
  const uint32_t group = static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H);
  Item item;
  item.qk_row = token * shape.H + (group == 1 ? head : head / group);
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
      const uint32_t track = walk.first + walk.track,
                     row = track < heads ? 0 : track / heads;  // no division for most
      Chunk chunk;
      if (p.shape.has_segment_ids) {
        const uint8_t* table = static_cast<const uint8_t*>(p.workspace) + w.chunk_table;
        chunk = chunk_from_entry(p.shape, reinterpret_cast<const ChunkEntry*>(table)[walk.index]);
      } else {
        chunk = chunk_of_row(p.shape, row, walk.index);
      }
      item = item_of(p, w, chunk, track - row * heads);
      if (chunk.padding) {
        if (p.o != nullptr) clear_output(p, item, lane);
        item.length = 0;
      }
      more = chunk.padding;
    }
    __syncwarp();  // all lanes have read where the walk was
    if (lane == 0) {
      found = item;
      advance(walk, p, w);
    }
    __syncwarp();  // where the walk is, before it is read again
  }
}

// What a chunk leaves, from shared memory to its place behind `operands`, by the copy engine: tiles
// of as many rows as there are tokens. One thread, which waits for the copies.
__device__ __forceinline__ void write_tile(uint8_t* operands, int tile, const uint8_t* from,
                                           int length) {
  const uint32_t bytes = length * static_cast<uint32_t>(kTileRowBytes);
  bulk_store(operands + tile * int64_t{bytes}, from, bytes);
}
__device__ __forceinline__ void write_operands(const Config::Shared& s, uint8_t* operands,
                                               int length) {
  for (int half = 0; half < Config::kHalves; ++half) {
    write_tile(operands, kTileKDecayed + half, s.k[half], length);
    write_tile(operands, kTileQDecayed + half, s.q[half], length);
    write_tile(operands, kTileKRestored + half, s.g[half], length);
  }
  bulk_store_commit();
}
__device__ __forceinline__ void write_matrices(const Config::Shared& s, uint8_t* operands,
                                               int length) {
  write_tile(operands, kTileAkkInv, s.images.A_kk_inv, length);
  write_tile(operands, kTileAqk, s.images.A_qk, length);
  bulk_store_commit();
}

// Tells the state stage, if it waits, that an item is in memory: this thread's copies of it are
// complete, and other threads' writes came before a barrier.
__device__ __forceinline__ void announce(const ForwardParams& p, const ForwardWorkspace& w,
                                         const Item& item) {
  if (item.length == 0 || w.overlap.processors == 0) return;
  uint32_t* prepared = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.workspace) + w.prepared);
  fence_async_global();  // the copies, before whoever finds the bit reads what they wrote
  set_bits_release(prepared + item.operand_row / 32, 1u << (item.operand_row % 32));
}

}  // namespace jax_flashkda::chunk_prepare
