// The chunks of a CTA, and their way into and out of shared memory.
#pragma once

#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_gradient/products.cuh"

namespace jax_flashkda::chunk_gradient {

// The CTA's share: chunks part, part + parts, .. of one head, in the order of the table, whatever
// the device: sums over chunks have one order.
struct Items {
  const ForwardParams& p;
  const ForwardWorkspace& w;
  uint32_t index;  // below 2^31

  __device__ Items(const ForwardParams& params, const ForwardWorkspace& workspace)
      : p(params), w(workspace), index(blockIdx.x / static_cast<uint32_t>(params.shape.HV)) {}

  __device__ uint32_t chunks() const {
    if (!p.shape.has_segment_ids)
      return static_cast<uint32_t>(p.shape.B) *
             ((static_cast<uint32_t>(p.shape.T) + static_cast<uint32_t>(kChunk) - 1) /
              static_cast<uint32_t>(kChunk));
    const uint8_t* bytes = static_cast<const uint8_t*>(p.workspace);
    return static_cast<uint32_t>(clamp_to<int64_t>(
        reinterpret_cast<const TableCounts*>(bytes + w.counts)->chunks, 0, p.shape.B * p.shape.T));
  }
  __device__ const ChunkEntry& entry(uint32_t at) const {
    return reinterpret_cast<const ChunkEntry*>(static_cast<const uint8_t*>(p.workspace) +
                                               w.chunk_table)[at];
  }
  __device__ bool same_segment(uint32_t a, uint32_t b) const {
    return entry(a).row == entry(b).row && entry(a).segment == entry(b).segment;
  }

  __device__ Item item(uint32_t chunks) const {
    const bool table = p.shape.has_segment_ids;
    const Chunk chunk =
        table ? chunk_from_entry(p.shape, entry(index)) : chunk_without_table(p.shape, index);
    Item found;
    found.row = chunk.row;
    found.start = chunk.start;
    found.length = chunk.length;
    found.segment = table ? entry(index).segment : 0;
    found.first =
        chunk.start < kChunk || (table && (index == 0 || !same_segment(index - 1, index)));
    found.last = chunk.length < kChunk || chunk.start + kChunk >= p.shape.T ||
                 (table && (index + 1 == chunks || !same_segment(index, index + 1)));
    return found;
  }

  // The next chunk that is not padding; the gradients of padding are cleared on the way.
  template <class Clear>
  __device__ Item next(uint32_t parts, Clear clear) {
    const uint32_t count = chunks();
    for (; index < count; index += parts) {
      const Item found = item(count);
      if (found.segment < 0) {
        clear(found);
        continue;
      }
      index += parts;
      return found;
    }
    return {};
  }
};

// 16-byte pieces of a chunk's rows of `stride` bytes: a thread owns one column of pieces. Calls
// visit(row, piece, offset of the piece in memory).
template <int kPieces, class Visit>
__device__ __forceinline__ void for_each_piece(int64_t stride, Visit visit) {
  constexpr int kRows = Config::kThreads / kPieces;
  const int thread = reread_thread(), row = thread / kPieces, piece = thread % kPieces;
  int64_t offset = row * stride + 16 * piece;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kChunk) / kRows; ++i) {
    visit(row + kRows * i, piece, offset);
    offset += kRows * stride;
  }
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

// A tile of a chunk's rows to shared memory, to place(row, piece). Rows behind the chunk's end are
// not read: they are zeros.
template <int kPieces, class Place>
__device__ __forceinline__ void load_tile(const void* base, int64_t stride, int length,
                                          Place place) {
  for_each_piece<kPieces>(stride, [&](int row, int piece, int64_t offset) {
    async_load_16(place(row, piece), static_cast<const uint8_t*>(base) + offset, row < length);
  });
}

// And back, the rows that exist.
template <int kPieces, class Place>
__device__ __forceinline__ void store_tile(void* base, int64_t stride, int length, Place place) {
  for_each_piece<kPieces>(stride, [&](int row, int piece, int64_t offset) {
    if (row < length)
      *reinterpret_cast<uint4*>(static_cast<uint8_t*>(base) + offset) =
          *reinterpret_cast<const uint4*>(place(row, piece));
  });
}

// A boundary where a segment starts or ends: the caller's state [K, V] transposed and rounded, or
// zero.
__device__ __forceinline__ void fill_boundary(uint8_t* image, const float* state) {
  constexpr int kDim = Config::kHeadDim;
#pragma unroll 1
  for (int at = threadIdx.x; at < kDim * kDim / 8; at += Config::kThreads) {
    const int v = at % kDim, piece = at / kDim;
    float x[8] = {};
    if (state != nullptr) load_state_piece(x, state, v, piece);
    *reinterpret_cast<uint4*>(image + (piece / 8) * (kBoundaryBytes / 2) +
                              swizzle128(v, piece % 8)) =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                   pack_bf16(x[6], x[7]));
  }
}

__device__ __forceinline__ CallerStates find_caller_states(const BackwardParams& b,
                                                           const Item& item, int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  if (item.segment < 0) return {};
  const int32_t slot = state_slot(shape, item.segment, item.start + item.length);
  if (slot < 0) return {};
  const int64_t at = ((item.row * shape.N + slot) * shape.HV + head) * shape.K * shape.V;
  const float *initial = b.forward.initial_state, *d_final = b.d_final_state;
  return {item.first && initial != nullptr ? initial + at : nullptr,
          item.last && d_final != nullptr ? d_final + at : nullptr};
}

// What the products with V read: both boundaries, dO, dR, U. Nobody reads the last chunk's any
// more.
template <class Shared>
__device__ __forceinline__ void load_values(Shared& s, const BackwardParams& b,
                                            const BackwardWorkspace& w, const Item& item,
                                            int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  const uint8_t* workspace = static_cast<const uint8_t*>(b.forward.workspace);
  const int64_t slots = (int64_t{item.row} * shape.HV + head) * w.boundary_slots +
                        item.start / kChunk;  // of this chunk's start; its end's is the next
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&s.boundaries_full,
                           static_cast<uint32_t>(kBoundaryBytes) *
                               (static_cast<int>(!item.first) + static_cast<int>(!item.last)));
    if (!item.first)
      bulk_load(s.values.state, workspace + w.states + slots * kBoundaryBytes, kBoundaryBytes,
                &s.boundaries_full);
    if (!item.last)
      bulk_load(s.values.state_gradient,
                workspace + w.state_gradients + (slots + 1) * kBoundaryBytes, kBoundaryBytes,
                &s.boundaries_full);
  }
  const int64_t token = item.token(shape);
  const int64_t stride = shape.HV * Config::kRowBytes,
                at = (token * shape.HV + head) * Config::kRowBytes;
  auto values = [](uint8_t (&tile)[2][Config::kHalfTile]) {
    return [&tile](int row, int piece) { return &tile[piece / 8][swizzle128(row, piece % 8)]; };
  };
  const int length = item.length;
  load_tile<Config::kRowPieces>(static_cast<const uint8_t*>(b.d_o) + at, stride, length,
                                values(s.values.d_o));
  load_tile<Config::kRowPieces>(static_cast<const uint8_t*>(b.dv) + at, stride, length,
                                values(s.values.d_r));
  load_tile<Config::kRowPieces>(workspace + w.corrected_values + at, stride, length,
                                values(s.values.u));
  const CallerStates states = find_caller_states(b, item, head);
  if (item.first) fill_boundary(s.values.state, states.initial);
  if (item.last) fill_boundary(s.values.state_gradient, states.d_final);
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
  const int length = item.length;
  const int64_t token = item.token(shape), stride = shape.H * Config::kRowBytes,
                at = (token * shape.H + query_head(shape, head)) * Config::kRowBytes;
  auto keys = [](uint8_t* tile) {
    return [tile](int row, int piece) { return tile + tile_offset(row, piece); };
  };
  load_tile<Config::kRowPieces>(static_cast<const uint8_t*>(p.q) + at, stride, length, keys(s.q));
  load_tile<Config::kRowPieces>(static_cast<const uint8_t*>(p.k) + at, stride, length, keys(s.k));
  constexpr int kPieces = kGatePieces<kGateType>;
  load_tile<kPieces>(static_cast<const uint8_t*>(p.g) + (token * shape.HV + head) * kPieces * 16,
                     shape.HV * kPieces * 16, length, [&](int row, int piece) {
                       return s.g + gate_piece_offset<kGateType>(row, piece);
                     });
}

// The gradients that have taken the place of q, k and g. dq and dk of a group of heads went to the
// workspace instead.
template <DType kGateType>
__device__ __forceinline__ void store_gradients(const Shared<kGateType>& s, const BackwardParams& b,
                                                const Item& item, int64_t head) {
  const ForwardShape& shape = b.forward.shape;
  const int64_t token = item.token(shape);
  const int length = item.length;
  constexpr int kPieces = kGatePieces<kGateType>;
  store_tile<kPieces>(static_cast<uint8_t*>(b.dg) + (token * shape.HV + head) * kPieces * 16,
                      shape.HV * kPieces * 16, length, [&](int row, int piece) {
                        return s.g + gate_piece_offset<kGateType>(row, piece);
                      });
  if (shape.HV != shape.H) return;
  const int64_t stride = shape.H * Config::kRowBytes,
                at = (token * shape.H + head) * Config::kRowBytes;
  auto keys = [](const uint8_t* tile) {
    return [tile](int row, int piece) { return tile + tile_offset(row, piece); };
  };
  store_tile<Config::kRowPieces>(static_cast<uint8_t*>(b.dq) + at, stride, length, keys(s.q));
  store_tile<Config::kRowPieces>(static_cast<uint8_t*>(b.dk) + at, stride, length, keys(s.k));
}

// `bytes` of each of the chunk's rows of [B, T, HV, ..] for the head.
__device__ __forceinline__ void clear_rows(void* base, const ForwardShape& shape, const Item& item,
                                           int64_t head, int bytes) {
  const int pieces = bytes / 16;
  for (int at = threadIdx.x; at < item.length * pieces; at += Config::kThreads)
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
  if (threadIdx.x < item.length) {
    const int64_t at = (item.token(shape) + threadIdx.x) * shape.HV + head;
    if (b.forward.beta_dtype == DType::kBF16) {
      static_cast<uint16_t*>(b.d_beta)[at] = 0;
    } else {
      static_cast<float*>(b.d_beta)[at] = 0.0f;
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
