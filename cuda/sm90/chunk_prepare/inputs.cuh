// The chunks of a CTA, and what its threads read for one.
#pragma once

#include <type_traits>

#include "core/ptx.cuh"
#include "problem/numerics.cuh"
#include "problem/segments.cuh"
#include "sm90/chunk_prepare/config.h"

namespace jax_flashkda::chunk_prepare {

using Rows = uint2[Config::kStrip];  // a lane's 4 channels of its strip's tokens, bf16
using DecayRows = float[Config::kStrip][Config::kChannels];  // the same of the log2 decay

__device__ __forceinline__ int64_t query_head(const ForwardShape& shape, int64_t value_head) {
  return static_cast<uint32_t>(value_head) /
         (static_cast<uint32_t>(shape.HV) / static_cast<uint32_t>(shape.H));
}

// What a warp knows of the strip it owns.
struct Strip {
  int warp, lane, channel;
  int rows;       // tokens that exist, 0 .. 8
  int64_t token;  // row * T + first token of the strip
};

__device__ __forceinline__ Strip strip_of(const ForwardShape& shape, const Chunk& chunk) {
  Strip strip;
  strip.warp = threadIdx.x / 32;
  strip.lane = threadIdx.x % 32;
  strip.channel = Config::kChannels * strip.lane;
  strip.rows = min(max(chunk.length - Config::kStrip * strip.warp, 0), Config::kStrip);
  strip.token =
      static_cast<int64_t>(chunk.row) * shape.T + chunk.start + Config::kStrip * strip.warp;
  return strip;
}

// What a thread reads for a chunk, as it comes from memory: loaded while the chunk before is still
// being worked on.
template <DType kGateType>
struct Inputs {
  using GateWord = std::conditional_t<kGateType == DType::kBF16, uint2, uint4>;  // 4 channels
  Rows q, k;
  GateWord g[Config::kStrip];
  uint32_t
      scalar;  // threads 0 .. 127: dt_bias of that channel; 128 .. 191: beta of a token; 192: A_log
};

template <class Word>
__device__ __forceinline__ void load_rows(Word (&x)[Config::kStrip], const void* base, int64_t row,
                                          int64_t heads, int channel, int rows) {
  constexpr int kBytes = sizeof(Word) / Config::kChannels;
  const char* from = static_cast<const char*>(base) + (row * Config::kHeadDim + channel) * kBytes;
  const int64_t stride = heads * Config::kHeadDim * kBytes;
  if (rows == Config::kStrip) {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      x[r] = load_early(reinterpret_cast<const Word*>(from));
      from += stride;
      asm volatile(
          ""
          : "+l"(
              from));  // one running pointer: eight of them at once would not fit beside the loads
    }
  } else {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r) {
      x[r] = Word{};
      if (r < rows) x[r] = load_early(reinterpret_cast<const Word*>(from));
      from += stride;
      asm volatile("" : "+l"(from));
    }
  }
}

__device__ __forceinline__ uint32_t load_scalar(const ForwardParams& p, const Chunk& chunk,
                                                int64_t head) {
  const int64_t gate_head = int64_t{chunk.row} * p.shape.HV + head;
  const int thread = threadIdx.x, token = thread - Config::kHeadDim;
  if (chunk.length == 0) return 0;
  if (token < 0)
    return p.dt_bias != nullptr ? load_early(reinterpret_cast<const uint32_t*>(
                                      p.dt_bias + gate_head * Config::kHeadDim + thread))
                                : 0;
  if (token == kChunk)
    return p.A_log != nullptr ? load_early(reinterpret_cast<const uint32_t*>(p.A_log + gate_head))
                              : 0;
  if (token >= chunk.length) return 0;
  const int64_t at = (int64_t{chunk.row} * p.shape.T + chunk.start + token) * p.shape.HV + head;
  if (p.beta_dtype == DType::kBF16) return load_early(static_cast<const uint16_t*>(p.beta) + at);
  return load_early(static_cast<const uint32_t*>(p.beta) + at);
}

__device__ __forceinline__ void publish_scalar(Config::Shared::Scalars& s, uint32_t scalar,
                                               const ForwardParams& p, int length) {
  const int thread = threadIdx.x, token = thread - Config::kHeadDim;
  if (token < 0) {
    s.dt_bias[thread] = __uint_as_float(scalar);
  } else if (token < kChunk) {
    const float raw = __uint_as_float(p.beta_dtype == DType::kBF16 ? scalar << 16 : scalar);
    const float beta = beta_value(raw, p.beta_is_logits, p.allow_neg_eigval);
    s.beta[token] = token < length ? p.nonzero_beta ? nonzero_beta(beta) : beta : 0.0f;
  } else if (token == kChunk) {
    s.amplitude = expf(__uint_as_float(scalar));
  }
}

template <DType kGateType>
__device__ __forceinline__ void load_inputs(Inputs<kGateType>& in, const ForwardParams& p,
                                            const Chunk& chunk, int64_t head) {
  const Strip strip = strip_of(p.shape, chunk);
  const int64_t qk_row = strip.token * p.shape.H + query_head(p.shape, head);
  in.scalar = load_scalar(p, chunk, head);
  load_rows(in.g, p.g, strip.token * p.shape.HV + head, p.shape.HV, strip.channel, strip.rows);
  load_rows(in.k, p.k, qk_row, p.shape.H, strip.channel, strip.rows);
  load_rows(in.q, p.q, qk_row, p.shape.H, strip.channel, strip.rows);
}

__device__ __forceinline__ void clear_output(const ForwardParams& p, const Chunk& chunk,
                                             int64_t head) {
  for (int at = threadIdx.x; at < chunk.length * 16; at += Config::kThreads) {
    const int64_t token = int64_t{chunk.row} * p.shape.T + chunk.start + (at >> 4);
    reinterpret_cast<uint4*>(p.o)[(token * p.shape.HV + head) * 16 + (at & 15)] =
        make_uint4(0, 0, 0, 0);
  }
}

// The CTA's share of the items: it counts through the heads of a chunk, then the chunks, in steps
// of the grid's size, which are a fixed number of each.
struct Items {
  const ForwardParams& p;
  const ForwardWorkspace& w;
  uint32_t heads, chunks, index, head;

  __device__ Items(const ForwardParams& params, const ForwardWorkspace& workspace)
      : p(params), w(workspace) {
    const uint8_t* bytes = static_cast<const uint8_t*>(p.workspace);
    const bool table = p.shape.has_segment_ids;
    const int64_t most = table ? p.shape.B * p.shape.T
                               : p.shape.B * ((p.shape.T + kChunk - 1) / kChunk);  // below 2^31
    chunks = static_cast<uint32_t>(
        table ? clamp_to<int64_t>(reinterpret_cast<const TableCounts*>(bytes + w.counts)->chunks, 0,
                                  most)
              : most);
    heads = static_cast<uint32_t>(p.shape.HV);
    index = blockIdx.x / heads;
    head = blockIdx.x % heads;
  }
  __device__ bool left() const { return index < chunks; }
  __device__ Chunk chunk() const {
    if (!p.shape.has_segment_ids) return chunk_without_table(p.shape, index);
    const ChunkEntry* entries = reinterpret_cast<const ChunkEntry*>(
        static_cast<const uint8_t*>(p.workspace) + w.chunk_table);
    return chunk_from_entry(p.shape, entries[index]);
  }
  __device__ void advance() {
    index += gridDim.x / heads;
    head += gridDim.x % heads;
    if (head < heads) return;
    head -= heads;
    ++index;
  }
  // The next chunk that is not padding; the output of padding, if any, is cleared on the way.
  __device__ Chunk next_segment_chunk() {
    for (; left(); advance()) {
      const Chunk found = chunk();
      if (!found.padding) return found;
      if (p.o != nullptr) clear_output(p, found, head);
    }
    return {};
  }
};

}  // namespace jax_flashkda::chunk_prepare
