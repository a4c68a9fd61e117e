// The recurrence over chunks, and the output:
//
//   R = V - (k exp(G)) S
//   U = (I + A_kk)^-1 Diag(beta) R
//   O = scale ((q exp(G)) S + A_qk U)
//   S <- Diag(exp(G_C)) S + (k exp(G_C - G))^T U
//
// Grid: persistent CTAs over (segment, value head[, half of V]); a chain of chunks is serial,
// chains are not. Roles: a warpgroup loads a chunk ahead, one warp by bulk copies and three the
// rows of v. A state warpgroup keeps 64 columns of the state, transposed [64 V x 128 K], in fp32
// accumulators; S, R and U become register operands where they are.
//
// Read: the workspace, v [B, T, HV, V], initial_state. Written: o [B, T, HV, V], final_state.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_state_output/config.h"
#include "sm90/wgmma.cuh"

namespace jax_flashkda::chunk_state_output {

// The chunks of a CTA in the order of its work. Both loaders and, through the headers, the
// consumers follow it.
template <class Config, class Visit>
__device__ __forceinline__ void for_each_chunk(const ForwardParams& p, const ForwardWorkspace& w,
                                               Visit visit) {
  const uint8_t* workspace = static_cast<const uint8_t*>(p.workspace);
  const SegmentEntry* entries = reinterpret_cast<const SegmentEntry*>(workspace + w.segment_table);
  const int64_t segments =
      p.shape.has_segment_ids
          ? clamp_to<int64_t>(reinterpret_cast<const TableCounts*>(workspace + w.counts)->segments,
                              0, p.shape.B * p.shape.T)
          : p.shape.B;
  constexpr int kSplits = Config::kHeadDim / (Config::kValueTiles * Config::kColumns);
  for (int64_t item = blockIdx.x; item < segments * p.shape.HV * kSplits; item += gridDim.x) {
    const int64_t index = item / (p.shape.HV * kSplits), head = item / kSplits % p.shape.HV;
    const SegmentEntry whole_row = {static_cast<int32_t>(index), 0, static_cast<int32_t>(p.shape.T),
                                    0};
    const Segment segment =
        segment_from_entry(p.shape, p.shape.has_segment_ids ? entries[index] : whole_row);
    ChunkHeader header;
    header.state =
        segment.slot < 0 ? -1 : (segment.row * p.shape.N + segment.slot) * p.shape.HV + head;
    header.head = static_cast<int32_t>(head);
    header.value_column =
        static_cast<int32_t>(item % kSplits) * Config::kColumns * Config::kValueTiles;
    const int64_t head_index = segment.row * p.shape.HV + head;
    for (int64_t done = 0; done < segment.length; done += kChunk) {
      const int64_t start = segment.start + done;
      header.token = segment.row * p.shape.T + start;
      header.length =
          static_cast<int>(segment.length - done < kChunk ? segment.length - done : kChunk);
      header.first = done == 0;
      header.last = done + kChunk >= segment.length;
      const int64_t slot =
          chunk_decay_slot(p.shape, static_cast<int32_t>(start), header.length,
                           static_cast<int32_t>(segment.slot < 0 ? p.shape.N : segment.slot));
      visit(header, head_index * p.shape.T + start,
            slot < 0 ? int64_t{-1} : head_index * w.decay_slots + slot);
    }
  }
  ChunkHeader end = {};
  visit(end, int64_t{0}, int64_t{-1});
}

// A place in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity;
  __device__ explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One warp: headers, decays and operand tiles, by the copy engine.
template <class Config>
__device__ __forceinline__ void load_operands(typename Config::Shared& s, const ForwardParams& p,
                                              const ForwardWorkspace& w, int lane) {
  const uint8_t* workspace = static_cast<const uint8_t*>(p.workspace);
  Ring<Config::kStages> ring(1);  // the first pass finds all stages empty
  for_each_chunk<Config>(
      p, w, [&](const ChunkHeader& header, int64_t operand_row, int64_t decay_slot) {
        mbarrier_wait(&s.empty[ring.stage], ring.parity);  // the consumers have let go of the stage
        typename Config::Stage& to = s.stages[ring.stage];
        uint64_t* full = &s.full[ring.stage];
        const uint32_t tile_bytes = header.length * static_cast<uint32_t>(kTileRowBytes);
        const bool decays =
            decay_slot >= 0;  // else nobody asks for the state behind the chunk, whatever scales it
        if (lane == 0) {
          to.header = header;
          mbarrier_arrive_expect(full,
                                 kOperandTiles * tile_bytes + (decays ? Config::kHeadDim * 4 : 0));
        }
        __syncwarp();  // the bytes are expected before any of them can arrive
        if (header.length > 0 && lane < kOperandTiles)
          bulk_load(to.operands[lane],
                    workspace + w.operands + operand_row * kOperandBytes + lane * tile_bytes,
                    tile_bytes, full);
        if (decays && lane == kOperandTiles)
          bulk_load(to.chunk_decay, workspace + w.chunk_decay + decay_slot * Config::kHeadDim * 4,
                    Config::kHeadDim * 4, full);
        ring.advance();
      });
}

// Three warps: the rows of v, and zeros behind the end of a short chunk, in every tile: what
// multiplies them must be finite.
template <class Config>
__device__ __forceinline__ void load_values(typename Config::Shared& s, const ForwardParams& p,
                                            const ForwardWorkspace& w, int thread) {
  constexpr int kPieces = 8 * Config::kValueTiles;  // 16-byte pieces of a row
  Ring<Config::kStages> ring(1);
  for_each_chunk<Config>(p, w, [&](const ChunkHeader& header, int64_t, int64_t) {
    mbarrier_wait(&s.empty[ring.stage], ring.parity);  // the consumers have let go of the stage
    typename Config::Stage& to = s.stages[ring.stage];
    if (header.length > 0) {
      const int64_t stride = p.shape.HV * Config::kHeadDim * 2;
      const uint8_t* v = static_cast<const uint8_t*>(p.v) + header.token * stride +
                         (header.head * Config::kHeadDim + header.value_column) * 2;
#pragma unroll 1
      for (int at = thread; at < kChunk * kPieces; at += Config::kValueThreads) {
        const int row = at / kPieces, piece = at % kPieces;
        const bool exists = row < header.length;
        async_load_16(&to.v[piece / 8][swizzle128(row, piece % 8)],
                      v + (exists ? row : 0) * stride + 16 * piece, exists);
      }
    }
    if (header.length > 0 && header.length < kChunk) {
      const int missing = (static_cast<int>(kChunk) - header.length) * 8;
      for (int tile = 0; tile < kOperandTiles; ++tile)
        for (int at = thread; at < missing; at += Config::kValueThreads)
          *reinterpret_cast<uint4*>(&to.operands[tile][header.length * kTileRowBytes + 16 * at]) =
              make_uint4(0, 0, 0, 0);
      fence_async_shared();  // these zeros, before the tensor cores read them
    }
    mbarrier_arrive_after_async_loads(&s.full[ring.stage]);  // the rows of v
    mbarrier_arrive(&s.full[ring.stage]);                    // the zeros
    ring.advance();
  });
}

// A thread's place among the consumers.
struct Place {
  int tile;  // of the CTA's tiles of 64 columns of V
  int warp;  // in the warpgroup
  int lane;
  __device__ int thread() const { return 32 * warp + lane; }
};

// c[64 x 64] (+)= step `step` of a[64 x 16 Steps] in registers times a tile of 64 rows. Steps of 16
// columns are 32 bytes along a row, then the next tile; operand addresses count in 16 bytes.
template <int kCount>
__device__ __forceinline__ void product(float (&c)[32], const uint32_t (&a)[kCount], int step,
                                        uint64_t tile, bool accumulate) {
  const uint64_t b = tile + (step / 4) * 512 + (step % 4) * 2;
  if (accumulate) {
    wgmma_64x64<true>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b);
  } else {
    wgmma_64x64<false>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b);
  }
}

template <class Stage>
__device__ __forceinline__ uint64_t operand(const Stage& stage, OperandTile tile,
                                            uint32_t bytes_to_next_columns = 0) {
  return swizzled_operand(shared_address(stage.operands[tile]), bytes_to_next_columns);
}

// Through shared memory, so that tokens become rows again and leave in whole lines. The tile of v
// serves: each warp has read the columns that it now writes, and nobody else reads those.
template <class Config>
__device__ __forceinline__ void store_output(const float (&o)[32], uint8_t* staged,
                                             const ChunkHeader& header, const ForwardParams& p,
                                             const Place& at) {
  const int token = 8 * (at.lane >> 4) + (at.lane & 7), piece = 2 * at.warp + ((at.lane >> 3) & 1);
  const uint32_t to = shared_address(staged) + swizzle128(token, piece);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = pack_bf16(o[8 * step + 2 * i] * p.scale, o[8 * step + 2 * i + 1] * p.scale);
    store_matrices_transposed(to + 16 * step * 128, pairs);
  }
  named_barrier(kConsumerBarrier + at.tile,
                128);  // the warpgroup's columns are staged, before their rows are read
  const int first = 4 * at.warp + (at.lane >> 3), column = at.lane & 7;
  const int64_t stride = p.shape.HV * Config::kHeadDim * 2;
  uint8_t* row = static_cast<uint8_t*>(p.o) + header.token * stride +
                 (header.head * Config::kHeadDim + header.value_column + 64 * at.tile) * 2 +
                 first * stride + 16 * column;
  uint4 pieces[4];
#pragma unroll
  for (int n = 0; n < 4; ++n)
    pieces[n] = *reinterpret_cast<const uint4*>(staged + swizzle128(first, column) + 16 * n * 128);
  if (header.length == kChunk) {
#pragma unroll
    for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(row + 16 * n * stride) = pieces[n];
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (16 * n + first < header.length)
        *reinterpret_cast<uint4*>(row + 16 * n * stride) = pieces[n];
  }
}

// A warpgroup that carries 64 columns of the state.
template <class Config>
struct StateWarps {
  typename Config::Shared& s;
  const ForwardParams& p;
  const Place at;
  float state[64];  // rows: columns of V; element [4 j + 2 h + e]: V column 16 warp + lane / 4 + 8
                    // h, channel 8 j + 2 (lane % 4) + e

  __device__ int64_t state_at(const ChunkHeader& header, int h) const {
    const int column = header.value_column + 64 * at.tile + 16 * at.warp + (at.lane >> 2) + 8 * h;
    return (header.state * Config::kHeadDim + 2 * (at.lane & 3)) * Config::kHeadDim + column;
  }

  __device__ void start(const ChunkHeader& header) {
    if (p.initial_state == nullptr || header.state < 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) state[i] = 0.0f;
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* from = p.initial_state + state_at(header, h);
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          state[4 * j + 2 * h + e] = __ldg(from + (8 * j + e) * Config::kHeadDim);
    }
  }

  __device__ void finish(const ChunkHeader& header) {
    if (p.final_state == nullptr || header.state < 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to = p.final_state + state_at(header, h);
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) to[(8 * j + e) * Config::kHeadDim] = state[4 * j + 2 * h + e];
    }
  }

  // Tokens two by two from the transposed rows of V, in the order of accumulators.
  __device__ void load_values_transposed(uint32_t (&values)[4][4],
                                         const typename Config::Stage& stage) const {
    const int token = 8 * (at.lane >> 4) + (at.lane & 7),
              piece = 2 * at.warp + ((at.lane >> 3) & 1);
    const uint32_t v = shared_address(stage.v[at.tile]) + swizzle128(token, piece);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      load_matrices_transposed(values[step], v + 16 * step * 128);
  }

  __device__ void decay_state(const typename Config::Stage& stage) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 decay =
          *reinterpret_cast<const float2*>(&stage.chunk_decay[8 * j + 2 * (at.lane & 3)]);
      state[4 * j] *= decay.x;
      state[4 * j + 1] *= decay.y;
      state[4 * j + 2] *= decay.x;
      state[4 * j + 3] *= decay.y;
    }
  }

  __device__ void chunk(typename Config::Stage& stage, uint64_t* empty) {
    uint32_t a[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) a[i] = pack_bf16(state[2 * i], state[2 * i + 1]);

    float projected[32], o[32];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; ++i) product(projected, a, i, operand(stage, kTileKDecayed), i > 0);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < 8; ++i) product(o, a, i, operand(stage, kTileQDecayed), i > 0);
    wgmma_commit();
    uint32_t values[4][4];
    load_values_transposed(values, stage);
    wgmma_wait<1>();
    fence_registers(projected);

    uint32_t r[16];  // V - P, rounded, in the operand order of the next product
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        r[4 * step + i] = pack_bf16(bf16_low(values[step][i]) - projected[8 * step + 2 * i],
                                    bf16_high(values[step][i]) - projected[8 * step + 2 * i + 1]);
    float u[32];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) product(u, r, i, operand(stage, kTileAkkInv), i > 0);
    wgmma_commit();
    decay_state(stage);
    wgmma_wait<0>();
    fence_registers(u);
    fence_registers(o);

    uint32_t u_operand[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) u_operand[i] = pack_bf16(u[2 * i], u[2 * i + 1]);
    fence_registers(state);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)  // steps of 16 tokens: 16 rows of 128 bytes
      wgmma_64x128_transposed<true>(state, u_operand[4 * i], u_operand[4 * i + 1],
                                    u_operand[4 * i + 2], u_operand[4 * i + 3],
                                    operand(stage, kTileKRestored, 8192) + i * 128);
#pragma unroll
    for (int i = 0; i < 4; ++i) product(o, u_operand, i, operand(stage, kTileAqk), true);
    wgmma_commit();
    const ChunkHeader header = stage.header;
    wgmma_wait<0>();
    fence_registers(state);
    fence_registers(o);
    store_output<Config>(o, stage.v[at.tile], header, p, at);
    __syncwarp();
    if (at.lane == 0) mbarrier_arrive(empty);  // this warp reads nothing of the stage any more
    if (header.last) finish(header);
  }

  __device__ void run() {
    Ring<Config::kStages> ring(0);
    while (true) {
      mbarrier_wait(&s.full[ring.stage], ring.parity);  // both loaders have filled the stage
      const ChunkHeader& header = s.stages[ring.stage].header;
      if (header.length == 0) break;
      if (header.first) start(header);
      chunk(s.stages[ring.stage], &s.empty[ring.stage]);
      ring.advance();
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    chunk_state_output_kernel(const __grid_constant__ ForwardParams p,
                              const __grid_constant__ ForwardWorkspace w) {
  extern __shared__ uint8_t shared_bytes[];
  typename Config::Shared& s = *reinterpret_cast<typename Config::Shared*>(
      shared_bytes + ((1024 - (shared_address(shared_bytes) & 1023)) & 1023));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(&s.full[i], 1 + 2 * Config::kValueThreads);
      mbarrier_init(&s.empty[i], 4 * Config::kValueTiles);  // each state warp
    }
    fence_barrier_init();
  }
  __syncthreads();  // barriers are initialised, before anybody uses them
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128,
                                    0);  // tells the compiler that warps do not diverge on it
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (warpgroup == 0) {
    if constexpr (Config::kMoveRegisters) lower_registers<Config::kLoaderRegisters>();
    if (warp == 0) {
      load_operands<Config>(s, p, w, lane);
    } else {
      load_values<Config>(s, p, w, threadIdx.x - 32);
    }
  } else {
    if constexpr (Config::kMoveRegisters) raise_registers<Config::kConsumerRegisters>();
    StateWarps<Config>{s, p, {warpgroup - 1, warp, lane}}.run();
  }
}

}  // namespace jax_flashkda::chunk_state_output
