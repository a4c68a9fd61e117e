// The chunks of a CTA, and their way into and out of shared memory.
#pragma once

#include "chunk/scores.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_gradient/config.h"

namespace jax_flashkda::chunk_gradient {

// A chunk of the CTA's head with its place in its segment.
struct Item {
  Chunk chunk;
  int32_t segment = -1;
  bool first = true, last = true;

  __device__ bool exists() const { return chunk.length > 0; }
  __device__ int64_t token(const ForwardShape& shape) const {
    return int64_t{chunk.row} * shape.T + chunk.start;
  }
};

// The CTA's share: chunks part, part + parts, .. of one head, in the order of the table, whatever
// the device: sums over chunks have one order.
struct Items {
  const ForwardParams& p;
  const ChunkEntry* entries;  // null without segment_ids
  int64_t head, index, parts, chunks;

  __device__ Items(const ForwardParams& params, const ForwardWorkspace& w, int64_t ctas_per_head)
      : p(params), head(blockIdx.x % params.shape.HV), index(blockIdx.x / params.shape.HV) {
    const uint8_t* bytes = static_cast<const uint8_t*>(p.workspace);
    const bool table = p.shape.has_segment_ids;
    const int64_t most =
        table ? p.shape.B * p.shape.T : p.shape.B * ((p.shape.T + kChunk - 1) / kChunk);
    chunks = table ? clamp_to<int64_t>(
                         reinterpret_cast<const TableCounts*>(bytes + w.counts)->chunks, 0, most)
                   : most;
    entries = table ? reinterpret_cast<const ChunkEntry*>(bytes + w.chunk_table) : nullptr;
    parts = ctas_per_head;
  }

  __device__ bool same_segment(int64_t a, int64_t b) const {
    return entries[a].row == entries[b].row && entries[a].segment == entries[b].segment;
  }

  __device__ Item item() const {
    Item found;
    const int64_t T = p.shape.T;
    if (entries == nullptr) {
      found.chunk = chunk_without_table(p.shape, static_cast<uint32_t>(index));
      found.segment = 0;
      found.first = found.chunk.start == 0;
    } else {
      found.chunk = chunk_from_entry(p.shape, entries[index]);
      found.segment = entries[index].segment;
      found.first = found.chunk.start < kChunk || index == 0 || !same_segment(index - 1, index);
    }
    found.last = found.chunk.length < kChunk || found.chunk.start + kChunk >= T ||
                 (entries != nullptr && (index + 1 == chunks || !same_segment(index, index + 1)));
    return found;
  }

  // The next chunk that is not padding; the gradients of padding are cleared on the way.
  template <class Clear>
  __device__ Item next(Clear clear) {
    for (; index < chunks; index += parts) {
      const Item found = item();
      if (found.chunk.padding) {
        clear(found);
        continue;
      }
      index += parts;
      return found;
    }
    return {};
  }
};

// 16-byte pieces of a chunk's rows: a thread owns piece threadIdx.x % 16 of rows threadIdx.x / 16
// + 16 i. Calls visit(row, piece).
template <int kPieces, class Visit>
__device__ __forceinline__ void for_each_piece(Visit visit) {
  constexpr int kRows = Config::kThreads / kPieces;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kChunk) / kRows; ++i)
    visit(static_cast<int>(threadIdx.x) / kPieces + kRows * i,
          static_cast<int>(threadIdx.x) % kPieces);
}

// The raw gate as fp32: rows of 32 pieces; the rows that a warp's four lanes of a group read
// together lie in different banks.
__device__ __forceinline__ int wide_piece_offset(int row, int piece) {
  return row * 512 + ((piece ^ (row & 6)) << 4);
}
__device__ __forceinline__ int wide_offset(int row, int channel) {
  return wide_piece_offset(row, channel >> 2) + 4 * (channel & 3);
}
template <DType kGateType>
__device__ __forceinline__ int gate_piece_offset(int row, int piece) {
  return kGateType == DType::kBF16 ? tile_offset(row, piece) : wide_piece_offset(row, piece);
}
template <DType kGateType>
inline constexpr int kGatePieces = kGateType == DType::kBF16 ? 16 : 32;

// Rows behind the chunk's end are not read: they are zeros.
__device__ __forceinline__ void load_piece(uint8_t* to, const void* base, int64_t row_bytes,
                                           int row, int piece, int length) {
  const bool exists = row < length;
  async_load_16(to, static_cast<const uint8_t*>(base) + (exists ? row : 0) * row_bytes + 16 * piece,
                exists);
}

// A boundary where a segment starts or ends: the caller's state [K, V] transposed and rounded, or
// zero.
__device__ __forceinline__ void fill_boundary(uint8_t* image, const float* state) {
  constexpr int kDim = Config::kHeadDim;
#pragma unroll 1
  for (int at = threadIdx.x; at < kDim * kDim / 8; at += Config::kThreads) {
    const int v = at % kDim, piece = at / kDim;
    float x[8] = {};
    if (state != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = __ldg(state + (8 * piece + i) * kDim + v);
    }
    *reinterpret_cast<uint4*>(image + (piece / 8) * (kBoundaryBytes / 2) +
                              swizzle128(v, piece % 8)) =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                   pack_bf16(x[6], x[7]));
  }
}

// What the products with V read: both boundaries, dO, dR, U. Nobody reads the last chunk's any
// more.
template <class Shared>
__device__ __forceinline__ void load_values(Shared& s, const BackwardParams& b,
                                            const BackwardWorkspace& w, const Item& item,
                                            int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  const uint8_t* workspace = static_cast<const uint8_t*>(b.forward.workspace);
  const int64_t slots = (int64_t{item.chunk.row} * shape.HV + head) * w.boundary_slots +
                        item.chunk.start / kChunk;  // of this chunk's start; its end's is the next
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&s.boundaries_full,
                           static_cast<uint32_t>(kBoundaryBytes) *
                               (static_cast<int>(!item.first) + static_cast<int>(!item.last)));
    if (!item.first)
      bulk_load(s.state, workspace + w.states + slots * kBoundaryBytes, kBoundaryBytes,
                &s.boundaries_full);
    if (!item.last)
      bulk_load(s.state_gradient, workspace + w.state_gradients + (slots + 1) * kBoundaryBytes,
                kBoundaryBytes, &s.boundaries_full);
  }
  const int64_t token = item.token(shape);
  const int64_t stride = shape.HV * Config::kRowBytes,
                at = (token * shape.HV + head) * Config::kRowBytes;
  const uint8_t* d_o = static_cast<const uint8_t*>(b.d_o) + at;
  const uint8_t* d_r = static_cast<const uint8_t*>(b.dv) + at;
  const uint8_t* u = workspace + w.corrected_values + at;
  for_each_piece<Config::kRowPieces>([&](int row, int piece) {
    const int to = swizzle128(row, piece % 8), half = piece / 8, length = item.chunk.length;
    load_piece(&s.d_o[half][to], d_o, stride, row, piece, length);
    load_piece(&s.d_r[half][to], d_r, stride, row, piece, length);
    load_piece(&s.u[half][to], u, stride, row, piece, length);
  });
  const bool slot = item.segment >= 0 && item.segment < shape.N;
  const int64_t state =
      ((item.chunk.row * shape.N + item.segment) * shape.HV + head) * shape.K * shape.V;
  if (item.first)
    fill_boundary(s.state, slot && b.forward.initial_state != nullptr
                               ? b.forward.initial_state + state
                               : nullptr);
  if (item.last)
    fill_boundary(s.state_gradient,
                  slot && b.d_final_state != nullptr ? b.d_final_state + state : nullptr);
}

// The query/key head of a value head.
__device__ __forceinline__ int64_t query_head(const ForwardShape& shape, int64_t value_head) {
  return static_cast<uint32_t>(value_head) /
         (static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H));
}

template <DType kGateType>
__device__ __forceinline__ void load_keys(Shared<kGateType>& s, const ForwardParams& p,
                                          const Item& item, int64_t head) {
  const ForwardShape& shape = p.shape;
  const int length = item.chunk.length;
  const int64_t token = item.token(shape), stride = shape.H * Config::kRowBytes,
                at = (token * shape.H + query_head(shape, head)) * Config::kRowBytes;
  for_each_piece<Config::kRowPieces>([&](int row, int piece) {
    const uint32_t to = tile_offset(row, piece);
    load_piece(s.q + to, static_cast<const uint8_t*>(p.q) + at, stride, row, piece, length);
    load_piece(s.k + to, static_cast<const uint8_t*>(p.k) + at, stride, row, piece, length);
  });
  constexpr int kPieces = kGatePieces<kGateType>;
  const uint8_t* g = static_cast<const uint8_t*>(p.g) + (token * shape.HV + head) * kPieces * 16;
  for_each_piece<kPieces>([&](int row, int piece) {
    load_piece(s.g + gate_piece_offset<kGateType>(row, piece), g, shape.HV * kPieces * 16, row,
               piece, length);
  });
}

// The gradients that have taken the place of q, k and g. dq and dk of a group of heads went to the
// workspace instead.
template <DType kGateType>
__device__ __forceinline__ void store_gradients(const Shared<kGateType>& s, const BackwardParams& b,
                                                const Item& item, int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  const int64_t token = item.token(shape);
  const int length = item.chunk.length;
  constexpr int kPieces = kGatePieces<kGateType>;
  uint8_t* dg = static_cast<uint8_t*>(b.dg) + (token * shape.HV + head) * kPieces * 16;
  for_each_piece<kPieces>([&](int row, int piece) {
    if (row < length)
      *reinterpret_cast<uint4*>(dg + row * shape.HV * kPieces * 16 + 16 * piece) =
          *reinterpret_cast<const uint4*>(s.g + gate_piece_offset<kGateType>(row, piece));
  });
  if (shape.HV != shape.H) return;
  const int64_t stride = shape.H * Config::kRowBytes,
                at = (token * shape.H + head) * Config::kRowBytes;
  for_each_piece<Config::kRowPieces>([&](int row, int piece) {
    if (row >= length) return;
    const uint32_t from = tile_offset(row, piece);
    const int64_t to = at + row * stride + 16 * piece;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(b.dq) + to) =
        *reinterpret_cast<const uint4*>(s.q + from);
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(b.dk) + to) =
        *reinterpret_cast<const uint4*>(s.k + from);
  });
}

// `bytes` of each of the chunk's rows of [B, T, HV, ..] for the head.
__device__ __forceinline__ void clear_rows(void* base, const ForwardShape& shape, const Item& item,
                                           int64_t head, int bytes) {
  const int pieces = bytes / 16;
  for (int at = threadIdx.x; at < item.chunk.length * pieces; at += Config::kThreads)
    reinterpret_cast<uint4*>(
        base)[((item.token(shape) + at / pieces) * shape.HV + head) * pieces + at % pieces] =
        make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void clear_gradients(const BackwardParams& b, const BackwardWorkspace& w,
                                                const Item& item, int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  uint8_t* workspace = static_cast<uint8_t*>(b.forward.workspace);
  const bool groups = shape.HV != shape.H;
  const int qk_bytes = groups ? 4 * Config::kHeadDim : Config::kRowBytes;
  clear_rows(groups ? workspace + w.head_gradients_q : b.dq, shape, item, head, qk_bytes);
  clear_rows(groups ? workspace + w.head_gradients_k : b.dk, shape, item, head, qk_bytes);
  clear_rows(b.dv, shape, item, head, Config::kRowBytes);
  clear_rows(b.dg, shape, item, head,
             b.forward.g_dtype == DType::kBF16 ? Config::kRowBytes : 2 * Config::kRowBytes);
  if (threadIdx.x < item.chunk.length) {
    const int64_t at = (item.token(shape) + threadIdx.x) * shape.HV + head;
    if (b.forward.beta_dtype == DType::kBF16) {
      static_cast<uint16_t*>(b.d_beta)[at] = 0;
    } else {
      static_cast<float*>(b.d_beta)[at] = 0.0f;
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
