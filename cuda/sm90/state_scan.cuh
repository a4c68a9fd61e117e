// What the scans over the chunks of a segment share: tile and shared memory, the order of a CTA's
// work, the loaders that run a chunk ahead, and the columns of the state that a warpgroup carries.
//
// Roles: of warpgroup 0, one warp loads operand tiles by bulk copies and three load the rows of v
// (or of d_o). Each other warpgroup carries 64 columns of the state, transposed [64 V x 128 K], in
// fp32 accumulators; what is multiplied by an operand tile is a register operand where it is.
#pragma once

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/wgmma.cuh"

namespace jax_flashkda::state_scan {

// What the loaders tell the consumers about the chunk in a stage.
struct ChunkHeader {
  int64_t token;     // row * T + first token
  int64_t state;     // (row * N + slot) * HV + head, or -1: no state is read or kept for it
  int64_t boundary;  // image of the state that the scan carries into the chunk, unless it is first
  int32_t piece;     // of the row, where rows are cut into pieces: else 0
  int32_t head;
  int32_t value_column;  // first of the CTA's columns of V
  int32_t length;        // 1 .. kChunk; 0: there is no more work
  bool first;            // of its segment or piece, in the order of the scan
  bool last;
};

enum Barrier : uint32_t {
  kConsumerBarrier = 1
};  // one for each consumer warpgroup, from here on; 0 is __syncthreads

inline constexpr uint32_t kKDecayedTiles = 3u << kTileKDecayed;
inline constexpr uint32_t kKRestoredTiles = 3u << kTileKRestored;
inline constexpr uint32_t kAkkInvTile = 1u << kTileAkkInv;
inline constexpr uint32_t kAllTiles = (1u << kOperandTiles) - 1;

// kValueTiles warpgroups, each with 64 columns of V; kTileSet: a bit for each operand tile that the
// scan multiplies by; kReverse: from a segment's last chunk to its first; kRowStages_: chunks whose
// rows of v or d_o are held, at most kStages.
template <int kValueTiles_, uint32_t kTileSet, int kStages_, bool kReverse_,
          int kRowStages_ = kStages_>
struct Config {
  static constexpr int kValueTiles = kValueTiles_;
  static constexpr bool kReverse = kReverse_;
  // Of packed rows, walk the segment that begins or ends each of them and no other.
  static constexpr bool kOnlyRowStarts = false, kOnlyRowEnds = false;
  static constexpr int kHeadDim = 128;                      // K and V
  static constexpr int kColumns = 64;                       // of V, of one warpgroup
  static constexpr int kStages = kStages_;                  // as many as fit
  static constexpr int kRowStages = kRowStages_;
  static_assert(kRowStages <= kStages);
  static constexpr int kThreads = 128 * (kValueTiles + 1);  // warpgroup 0 loads, the others compute
  static constexpr int kLoaderRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr bool kMoveRegisters =
      kValueTiles > 1;                    // with one consumer everybody can have enough
  static constexpr int kRowThreads = 96;  // of the loading warpgroup: all but its first warp

  static constexpr __host__ __device__ bool uses(int tile) { return (kTileSet >> tile & 1) != 0; }
  // Place of a tile among those in use.
  static constexpr __host__ __device__ int place(int tile) {
    int before = 0;
    for (uint32_t rest = kTileSet & ((1u << tile) - 1); rest != 0; rest &= rest - 1) ++before;
    return before;
  }
  static constexpr int kTiles = place(kOperandTiles);

  struct Shared {
    alignas(1024) uint8_t operands[kStages][kTiles][8192];  // [token] rows of 128 bytes, swizzled
    // [token] rows of a warpgroup's 64 columns of v or d_o, swizzled; then the rows of a result
    uint8_t rows[kRowStages][kValueTiles][8192];
    alignas(16) float beta[kStages][kChunk];
    float chunk_decay[kStages][kHeadDim];
    ChunkHeader header[kStages];
    uint64_t full[kStages];   // a loader fills operands, beta, decay and header, the consumers wait
    uint64_t empty[kStages];  // the consumers empty them, the loaders wait
    uint64_t rows_full[kRowStages];  // the same of rows, and of zeros among the operands
    uint64_t rows_empty[kRowStages];
  };

  // A chunk in shared memory, as its consumers see it.
  struct Stage {
    uint8_t (*operands)[8192];
    uint8_t (*rows)[8192];
    const float *chunk_decay, *beta;
    const ChunkHeader& header;
    uint64_t *empty, *rows_full, *rows_empty;
    uint32_t rows_parity;

    __device__ __forceinline__ void wait_for_rows() const { mbarrier_wait(rows_full, rows_parity); }
    // This warp reads nothing of it any more.
    __device__ __forceinline__ void release(int lane) const {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty);
    }
    __device__ __forceinline__ void release_rows(int lane) const {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(rows_empty);
    }
  };
};

// A CTA's share of a scan: of every `ctas` items one, by turns from the front and from the back
// where the longest segments come first. Without segments, rows may be cut into pieces of
// so many tokens, of which the first `pieces` are walked.
struct Share {
  int64_t cta;
  int64_t ctas;
  int64_t pieces = 1;
  int64_t piece_tokens = 0;  // 0: the whole row
  bool by_turns = true;
};

// The chunks of a CTA in the order of its work. Both loaders and, through the headers, the
// consumers follow it.
template <class Config, class Visit>
__device__ __forceinline__ void for_each_chunk(const ForwardParams& p, const ForwardWorkspace& w,
                                               const Share& share, Visit visit) {
  const uint8_t* workspace = static_cast<const uint8_t*>(p.workspace);
  const SegmentEntry* entries = reinterpret_cast<const SegmentEntry*>(workspace + w.segment_table);
  const int64_t segments =
      p.shape.has_segment_ids
          ? clamp_to<int64_t>(reinterpret_cast<const TableCounts*>(workspace + w.counts)->segments,
                              0, p.shape.B * p.shape.T)
          : p.shape.B * share.pieces;
  constexpr int kSplits = Config::kHeadDim / (Config::kValueTiles * Config::kColumns);
  const int64_t items = segments * p.shape.HV * kSplits;
  for (int64_t round = 0;; ++round) {
    const int64_t item =
        round * share.ctas +
        (round % 2 == 0 || !share.by_turns ? share.cta : share.ctas - 1 - share.cta);
    if (item >= items) break;
    const int64_t index = item / (p.shape.HV * kSplits), head = item / kSplits % p.shape.HV;
    const int64_t row = index / share.pieces, piece = index % share.pieces;
    const int64_t piece_start = piece * share.piece_tokens;
    const int64_t tokens = share.piece_tokens > 0 ? share.piece_tokens : p.shape.T;
    const SegmentEntry cut = {
        static_cast<int32_t>(row), static_cast<int32_t>(piece_start),
        static_cast<int32_t>(tokens < p.shape.T - piece_start ? tokens : p.shape.T - piece_start),
        0};
    const Segment segment =
        segment_from_entry(p.shape, p.shape.has_segment_ids ? entries[index] : cut);
    if (Config::kOnlyRowStarts && segment.start > 0) continue;
    if (Config::kOnlyRowEnds && p.shape.has_segment_ids &&
        segment.start + segment.length < p.shape.T)
      continue;
    ChunkHeader header;
    header.state =
        segment.slot < 0 ? -1 : (segment.row * p.shape.N + segment.slot) * p.shape.HV + head;
    header.piece = static_cast<int32_t>(piece);
    header.head = static_cast<int32_t>(head);
    header.value_column =
        static_cast<int32_t>(item % kSplits) * Config::kColumns * Config::kValueTiles;
    const int64_t head_index = segment.row * p.shape.HV + head;
    const int64_t boundaries = head_index * ((p.shape.T + kChunk - 1) / kChunk);
    const int64_t last_chunk = (segment.length - 1) / kChunk * kChunk;
    for (int64_t walked = 0; walked <= last_chunk; walked += kChunk) {
      const int64_t done = Config::kReverse ? last_chunk - walked : walked;
      const int64_t start = segment.start + done;
      header.token = segment.row * p.shape.T + start;
      header.length =
          static_cast<int>(segment.length - done < kChunk ? segment.length - done : kChunk);
      header.first = walked == 0;
      header.last = walked == last_chunk;
      header.boundary = boundaries + start / kChunk + Config::kReverse;
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

// Waits until chunk_prepare, which may run beside this kernel, has written the chunk that begins at
// an operand row. Every lane that copies waits, since the last fence is its own.
__device__ __forceinline__ void wait_until_prepared(const uint8_t* workspace,
                                                    const ForwardWorkspace& w,
                                                    int64_t operand_row) {
  const uint32_t* word =
      reinterpret_cast<const uint32_t*>(workspace + w.prepared) + operand_row / 32;
  while ((load_acquire(word) >> (operand_row % 32) & 1) == 0) __nanosleep(100);
  fence_async_global();  // what the writer released, before the copy engine reads it
}

// One warp: headers, decays, operand tiles and beta, by the copy engine.
template <class Config>
__device__ __forceinline__ void load_operands(typename Config::Shared& s, const ForwardParams& p,
                                              const ForwardWorkspace& w, const Share& share,
                                              int lane) {
  const uint8_t* workspace = static_cast<const uint8_t*>(p.workspace);
  Ring<Config::kStages> ring(1);  // the first pass finds all stages empty
  const int place = Config::place(lane);
  for_each_chunk<Config>(
      p, w, share, [&](const ChunkHeader& header, int64_t operand_row, int64_t decay_slot) {
        if (w.overlap.processors > 0 && header.length > 0)
          wait_until_prepared(workspace, w, operand_row);
        mbarrier_wait(&s.empty[ring.stage], ring.parity);  // the consumers have let go of the stage
        uint64_t* full = &s.full[ring.stage];
        const uint32_t tile_bytes = header.length * static_cast<uint32_t>(kTileRowBytes);
        const auto of_beta = static_cast<uint32_t>(beta_bytes(header.length));
        const uint8_t* operands = workspace + w.operands + operand_row * kOperandBytes;
        const bool decays =
            decay_slot >= 0;  // else nobody asks for the state behind the chunk, whatever scales it
        if (lane == 0) {
          s.header[ring.stage] = header;
          mbarrier_arrive_expect(full,
                                 Config::kTiles * tile_bytes + of_beta +
                                     (decays ? Config::kHeadDim * 4 : 0));
        }
        __syncwarp();  // the bytes are expected before any of them can arrive
        if (header.length > 0 && lane < kOperandTiles && Config::uses(lane))
          bulk_load(s.operands[ring.stage][place], operands + lane * tile_bytes, tile_bytes, full);
        if (header.length > 0 && lane == kOperandTiles + 1)
          bulk_load(s.beta[ring.stage], workspace + w.betas + operand_row * kBetaBytes, of_beta,
                    full);
        if (decays && lane == kOperandTiles)
          bulk_load(s.chunk_decay[ring.stage],
                    workspace + w.chunk_decay + decay_slot * Config::kHeadDim * 4,
                    Config::kHeadDim * 4, full);
        ring.advance();
      });
}

// Three warps: the rows of v or d_o, [B, T, HV, V], and zeros behind the end of a short chunk, in
// every tile and in beta: what multiplies them must be finite. `rows_full` tells of all of them.
template <class Config>
__device__ __forceinline__ void load_rows(typename Config::Shared& s, const ForwardParams& p,
                                          const ForwardWorkspace& w, const void* source,
                                          const Share& share) {
  constexpr int kPieces = 8 * Config::kValueTiles;  // 16-byte pieces of a row
  constexpr int kRowStep =
      Config::kRowThreads / kPieces;  // a thread has one piece of every so many
  static_assert(Config::kRowThreads % kPieces == 0);
  Ring<Config::kStages> ring(1);
  Ring<Config::kRowStages> row_ring(1);
  for_each_chunk<Config>(p, w, share, [&](const ChunkHeader& header, int64_t, int64_t) {
    const int thread = static_cast<int>(thread_index()) - 32;
    mbarrier_wait(&s.rows_empty[row_ring.stage],
                  row_ring.parity);  // the consumers have let go of the rows
    if (header.length > 0) {
      const int first_row = thread / kPieces, piece = thread % kPieces;
      const int64_t stride = p.shape.HV * Config::kHeadDim * 2;
      const uint8_t* rows = static_cast<const uint8_t*>(source) + header.token * stride +
                            (header.head * Config::kHeadDim + header.value_column) * 2 + 16 * piece;
      // Fewer stages of rows than of operands: the next rows have little time, so they come to L2
      // ahead of it.
      constexpr int64_t kAhead = Config::kReverse ? -kChunk : kChunk;
      if (Config::kRowStages < Config::kStages && !header.last && thread < kChunk &&
          header.token + kAhead + thread < p.shape.B * p.shape.T) {
        const uint8_t* next = rows - 16 * piece + (kAhead + thread) * stride;
        prefetch_to_l2(next);
        if (Config::kValueTiles > 1) prefetch_to_l2(next + 128);
      }
      const uint8_t* from = rows + first_row * stride;
      uint8_t* to = s.rows[row_ring.stage][piece / 8];
#pragma unroll 1
      for (int row = first_row; row < kChunk; row += kRowStep, from += kRowStep * stride) {
        const bool exists = row < header.length;
        async_load_16(to + swizzle128(row, piece % 8), exists ? from : rows, exists);
      }
    }
    mbarrier_arrive_after_async_loads(&s.rows_full[row_ring.stage]);
    if (header.length > 0 && header.length < kChunk) {
      mbarrier_wait(&s.empty[ring.stage], ring.parity);  // the consumers have let go of the stage
      const int missing = (static_cast<int>(kChunk) - header.length) * 8;
      for (int tile = 0; tile < Config::kTiles; ++tile)
        for (int at = thread; at < missing; at += Config::kRowThreads)
          *reinterpret_cast<uint4*>(
              &s.operands[ring.stage][tile][header.length * kTileRowBytes + 16 * at]) =
              make_uint4(0, 0, 0, 0);
      if (thread < kChunk && 4 * thread >= beta_bytes(header.length)) s.beta[ring.stage][thread] = 0.0f;
      fence_async_shared();  // these zeros, before the tensor cores read them
    }
    mbarrier_arrive(&s.rows_full[row_ring.stage]);  // the zeros
    ring.advance();
    row_ring.advance();
  });
}

// A thread's place among the consumers.
struct Place {
  int tile;  // of the CTA's tiles of 64 columns of V
  int warp;  // in the warpgroup
  int lane;
};

// The whole kernel but what the consumers do with a chunk: consume(shared memory, place) is called
// by each thread of the consumer warpgroups.
template <class Config, class Consume>
__device__ __forceinline__ void scan(const ForwardParams& p, const ForwardWorkspace& w,
                                     const void* rows, const Share& share, Consume consume) {
  extern __shared__ __align__(1024) uint8_t scan_bytes[];
  typename Config::Shared& s = *reinterpret_cast<typename Config::Shared*>(scan_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 4 * Config::kValueTiles);  // each consumer warp
    }
    for (int i = 0; i < Config::kRowStages; ++i) {
      mbarrier_init(&s.rows_full[i], 2 * Config::kRowThreads);
      mbarrier_init(&s.rows_empty[i], 4 * Config::kValueTiles);
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
      load_operands<Config>(s, p, w, share, lane);
    } else {
      load_rows<Config>(s, p, w, rows, share);
    }
  } else {
    if constexpr (Config::kMoveRegisters) raise_registers<Config::kConsumerRegisters>();
    consume(s, Place{warpgroup - 1, warp, lane});
  }
}

// The consumers' side: warps.start(header) ahead of a segment, warps.chunk(stage) for each chunk,
// which waits for its rows and releases stage and rows.
template <class Config, class Warps>
__device__ __forceinline__ void consume_chunks(typename Config::Shared& s, Warps& warps) {
  Ring<Config::kStages> ring(0);
  Ring<Config::kRowStages> row_ring(0);
  while (true) {
    mbarrier_wait(&s.full[ring.stage], ring.parity);  // the operands are there
    const typename Config::Stage stage = {
        s.operands[ring.stage],       s.rows[row_ring.stage],        s.chunk_decay[ring.stage],
        s.beta[ring.stage],           s.header[ring.stage],          &s.empty[ring.stage],
        &s.rows_full[row_ring.stage], &s.rows_empty[row_ring.stage], row_ring.parity};
    if (stage.header.length == 0) break;
    if (stage.header.length < kChunk) stage.wait_for_rows();  // the zeros are there
    if (stage.header.first) warps.start(stage.header);
    warps.chunk(stage);
    ring.advance();
    row_ring.advance();
  }
}

template <OperandTile kTile, class Config>
__device__ __forceinline__ uint64_t operand(const typename Config::Stage& stage,
                                            uint32_t bytes_to_next_columns = 0) {
  constexpr int kPlace = Config::place(kTile);  // no loop may stand between products
  return swizzled_operand(shared_address(stage.operands[kPlace]), bytes_to_next_columns);
}

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

// The same times a tile whose rows are the steps' columns: step `step` of 16 rows.
template <int kCount>
__device__ __forceinline__ void product_transposed(float (&c)[32], const uint32_t (&a)[kCount],
                                                   int step, uint64_t tile, bool accumulate) {
  const uint64_t b = tile + step * 128;
  if (accumulate) {
    wgmma_64x64<true, true>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b);
  } else {
    wgmma_64x64<false, true>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b);
  }
}

// c[64 x 128] (+)= likewise, times a tile of 128 columns: two tiles, 8192 bytes apart.
template <int kCount>
__device__ __forceinline__ void product_transposed(float (&c)[64], const uint32_t (&a)[kCount],
                                                   int step, uint64_t tiles, bool accumulate) {
  const uint64_t b = tiles + step * 128;
  if (accumulate) {
    wgmma_64x128_transposed<true>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
                                  b);
  } else {
    wgmma_64x128_transposed<false>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2],
                                   a[4 * step + 3], b);
  }
}

// A warpgroup's columns of the state. Rows: columns of V; element [4 j + 2 h + e]: V column 16 warp
// + lane / 4 + 8 h, channel 8 j + 2 (lane % 4) + e.
using State = float[64];

// Number `index` of states [.., K, V]. None: zero.
__device__ __forceinline__ int64_t state_at(int64_t index, const ChunkHeader& header,
                                            const Place& at, int h) {
  const int column = header.value_column + 64 * at.tile + 16 * at.warp + (at.lane >> 2) + 8 * h;
  return (index * 128 + 2 * (at.lane & 3)) * 128 + column;
}

__device__ __forceinline__ void load_state(State& state, const float* states, int64_t index,
                                           const ChunkHeader& header, const Place& at) {
  if (states == nullptr || index < 0) {
#pragma unroll
    for (int i = 0; i < 64; ++i) state[i] = 0.0f;
    return;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* from = states + state_at(index, header, at, h);
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) state[4 * j + 2 * h + e] = __ldg(from + (8 * j + e) * 128);
  }
}

__device__ __forceinline__ void store_state(const State& state, float* states, int64_t index,
                                            const ChunkHeader& header, const Place& at) {
  if (states == nullptr || index < 0) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = states + state_at(index, header, at, h);
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) to[(8 * j + e) * 128] = state[4 * j + 2 * h + e];
  }
}

__device__ __forceinline__ void decay_state(State& state, const float* chunk_decay,
                                            const Place& at) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 decay = *reinterpret_cast<const float2*>(&chunk_decay[8 * j + 2 * (at.lane & 3)]);
    state[4 * j] *= decay.x;
    state[4 * j + 1] *= decay.y;
    state[4 * j + 2] *= decay.x;
    state[4 * j + 3] *= decay.y;
  }
}

// Accumulators to the register operand of the next product.
template <int kCount>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[kCount], const float (&c)[2 * kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) a[i] = pack_bf16(c[2 * i], c[2 * i + 1]);
}

// Tokens two by two from the transposed rows of a tile, in the order of accumulators and of a
// register operand.
__device__ __forceinline__ void load_rows_transposed(uint32_t (&values)[4][4], const uint8_t* tile,
                                                     const Place& at) {
  const int token = 8 * (at.lane >> 4) + (at.lane & 7), piece = 2 * at.warp + ((at.lane >> 3) & 1);
  const uint32_t from = shared_address(tile) + swizzle128(token, piece);
#pragma unroll
  for (int step = 0; step < 4; ++step)
    load_matrices_transposed(values[step], from + 16 * step * 128);
}

// beta of the thread's tokens among accumulators' columns 8 group .. 8 group + 7.
__device__ __forceinline__ float2 load_betas(const float* beta, int group, const Place& at) {
  return *reinterpret_cast<const float2*>(&beta[8 * group + 2 * (at.lane & 3)]);
}

// R = Diag(beta) (V - P), rounded to the register operand of the next product.
__device__ __forceinline__ void subtract_projection(uint32_t (&r)[16],
                                                    const uint32_t (&values)[4][4],
                                                    const float (&projected)[32],
                                                    const float* beta, const Place& at) {
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    const float2 b = load_betas(beta, group, at);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 2 * group + h;
      const uint32_t v = values[i / 4][i % 4];
      r[i] = pack_bf16(b.x * (bf16_low(v) - projected[2 * i]),
                       b.y * (bf16_high(v) - projected[2 * i + 1]));
    }
  }
}

// Transposed [64 V x 64 tokens], packed, to rows [B, T, HV, V] of the result. Through shared
// memory, so that tokens become rows again and leave in whole lines. The tile that the rows of v or
// d_o came in serves: each warp has read the columns that it now writes, and nobody else reads
// those.
__device__ __forceinline__ void store_rows(const uint32_t (&values)[16], uint8_t* staged,
                                           void* result, const ForwardShape& shape,
                                           const ChunkHeader& header, const Place& at) {
  const int token = 8 * (at.lane >> 4) + (at.lane & 7), piece = 2 * at.warp + ((at.lane >> 3) & 1);
  const uint32_t to = shared_address(staged) + swizzle128(token, piece);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint32_t pairs[4] = {values[4 * step], values[4 * step + 1], values[4 * step + 2],
                               values[4 * step + 3]};
    store_matrices_transposed(to + 16 * step * 128, pairs);
  }
  named_barrier(kConsumerBarrier + at.tile,
                128);  // the warpgroup's columns are staged, before their rows are read
  const int first = 4 * at.warp + (at.lane >> 3), column = at.lane & 7;
  const int64_t stride = shape.HV * 128 * 2;
  uint8_t* row = static_cast<uint8_t*>(result) + header.token * stride +
                 (header.head * 128 + header.value_column + 64 * at.tile) * 2 + first * stride +
                 16 * column;
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

}  // namespace jax_flashkda::state_scan
