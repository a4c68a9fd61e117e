// Raw inputs of a strip to its decayed operands and to the factors of the scores. Relative to its
// block's references a token has three exponents: of its row factor, of its column factor, and of
// what the state takes of it at the chunk's end.
#pragma once

#include "chunk/l2norm.cuh"
#include "sm90/chunk_prepare/inputs.cuh"

namespace jax_flashkda::chunk_prepare {

using DecayRows = float[Config::kStrip][Config::kChannels];

template <Gate kGate>
__device__ __forceinline__ void decay_of_rows(DecayRows& g,
                                              const GateCoefficients (&c)[Config::kChannels]) {
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] = log2_decay<kGate>(g[r][e], c[e]);
}

// Raw gate to the running sum of the log2 decay from the strip's start. Missing tokens decay
// nothing.
template <DType kGateType>
__device__ __forceinline__ void cumulate_decay(DecayRows& g, const Config::Shared& s,
                                               const ForwardParams& p, const Item& item,
                                               const Strip& strip) {
  const float4 offset = *reinterpret_cast<const float4*>(&s.gate_offset[strip.channel]);
  const float slope = s.gate_slope, amplitude = s.gate_amplitude;
  const GateCoefficients c[Config::kChannels] = {{slope, offset.x, amplitude},
                                                 {slope, offset.y, amplitude},
                                                 {slope, offset.z, amplitude},
                                                 {slope, offset.w, amplitude}};
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    if constexpr (kGateType == DType::kBF16) {
      unpack(g[r], staged_row(s.g, strip, r));
    } else {
      const int64_t row = item.value_row + (r < strip.rows ? strip.row(r) : 0) * p.shape.HV;
      const uint4 x = load_early(reinterpret_cast<const uint4*>(p.g) +
                                 row * (Config::kHeadDim / 4) + strip.lane);
      g[r][0] = __uint_as_float(x.x);
      g[r][1] = __uint_as_float(x.y);
      g[r][2] = __uint_as_float(x.z);
      g[r][3] = __uint_as_float(x.w);
    }
  }
  if (p.gate == Gate::kSoftplus) {
    decay_of_rows<Gate::kSoftplus>(g, c);
  } else if (p.gate == Gate::kBounded) {
    decay_of_rows<Gate::kBounded>(g, c);
  } else {
    decay_of_rows<Gate::kLogDecay>(g, c);
  }
  if (strip.rows < Config::kStrip) {
#pragma unroll
    for (int r = 0; r < Config::kStrip; ++r)
#pragma unroll
      for (int e = 0; e < Config::kChannels; ++e) g[r][e] = r < strip.rows ? g[r][e] : 0.0f;
  }
#pragma unroll
  for (int r = 1; r < Config::kStrip; ++r)
#pragma unroll
    for (int e = 0; e < Config::kChannels; ++e) g[r][e] += g[r - 1][e];
}

// The norms' factors of 16 tokens, a warp: sums of squares are the diagonal of x x^T.
__device__ __forceinline__ void find_norms(float* norms, uint32_t tile, int lane) {
  float first[4] = {}, second[4] = {};  // rows 0 .. 7 and 8 .. 15 of the columns
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t x[4];
    load_matrices(x, tile + tile_offset(lane & 15, 2 * step + (lane >> 4)));
    mma_bf16(first, x, x[0], x[2]);
    mma_bf16(second, x, x[1], x[3]);
  }
  const int row = lane >> 2;
  if ((lane & 3) != row >> 1) return;  // the lane holds nothing of the diagonal
  norms[row] = l2norm_factor(row & 1 ? first[1] : first[0]);
  norms[row + 8] = l2norm_factor(row & 1 ? second[3] : second[2]);
}

// 2^exponent of a whole number <= 0; zero below the smallest normal number.
__device__ __forceinline__ uint16_t power_bf16(float exponent) {
  return static_cast<uint16_t>(pack_bf16(exp2_fast(exponent), 0.0f));
}

// A channel each of 128 threads: from the decays of the strips to everything of References.
// Returns the chunk's decay.
//
// A power between two blocks may underflow only where the decay between the blocks does not
// matter either: rows before a block's middle and columns behind it grow, and were both far from
// their references, the scores beside the blocks' common border would be lost. Such a block takes
// the other references.
__device__ __forceinline__ float find_references(Config::References& ref, int channel) {
  constexpr float kSmallest = -126.0f, kNegligible = -24.0f;  // powers of two
  float row[Config::kBlocks], column[Config::kBlocks], end[Config::kBlocks], start = 0.0f;
#pragma unroll
  for (int b = 0; b < Config::kBlocks; ++b) {
    float decay[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) decay[i] = ref.strip_offset[4 * b + i][channel];
    const float first_half = decay[0] + decay[1], second_half = decay[2] + decay[3];
    const float middle = start + first_half;
    end[b] = middle + second_half;
    bool near = first_half >= -kLog2DecayHalfSpan && second_half >= -kLog2DecayHalfSpan;
    row[b] = rintf(middle);
#pragma unroll
    for (int earlier = 0; earlier < b; ++earlier)
      near &= !(row[b] - column[earlier] < kSmallest && start - end[earlier] > kNegligible);
    column[b] = row[b];
    if (!near) {
      row[b] = rintf(start);
      column[b] = rintf(end[b]);
      ref.too_far[b] = true;
    }
    ref.column_offset[b][channel] = static_cast<int16_t>(column[b] - row[b]);
    float offset = start - row[b];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ref.strip_offset[4 * b + i][channel] = offset;
      offset += decay[i];
    }
    start = end[b];
  }
  // Where the lanes of a product look for it: channels c, c + 1, c + 8, c + 9 of a step of 16.
  const int place = (channel & ~15) + 4 * (channel % 8 / 2) + 2 * (channel / 8 % 2) + channel % 2;
#pragma unroll
  for (int b = 0; b < Config::kBlocks; ++b) {
    ref.end_offset[b][channel] = start - row[b];
    ref.before[b][channel] = power_bf16(row[b]);
#pragma unroll
    for (int earlier = 0; earlier < b; ++earlier)
      ref.between[Config::pair(b, earlier)][place] = power_bf16(row[b] - column[earlier]);
  }
  return start;
}

__device__ __forceinline__ uint2 pack4(const float (&x)[4], const float (&y)[4]) {
  return make_uint2(pack_bf16(x[0] * y[0], x[1] * y[1]), pack_bf16(x[2] * y[2], x[3] * y[3]));
}
// Exact but for underflow, y being powers of two.
__device__ __forceinline__ uint2 multiply4(uint2 x, uint2 y) {
  return make_uint2(multiply_bf16(x.x, y.x), multiply_bf16(x.y, y.y));
}

// Into a factor tile. Written out, because the compiler would not know which memory it is.
template <int kOffset>
__device__ __forceinline__ void put_shared(uint32_t at, uint2 value) {
  asm volatile("st.shared.v2.b32 [%0 + %3], {%1, %2};" ::"r"(at), "r"(value.x), "r"(value.y),
               "n"(kOffset)
               : "memory");
}
// Row r of an operand tile, from the lane's place in row 0: pieces move by an exclusive or.
__device__ __forceinline__ void put_global(uint8_t* tile, int r, uint2 value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(
                   (reinterpret_cast<uintptr_t>(tile) ^ (r << 4)) + r * kTileRowBytes),
               "r"(value.x), "r"(value.y)
               : "memory");
}

// Each token of the strip once: its decayed operands to memory, its score factors to shared memory.
__device__ __forceinline__ void write_factors(Config::Shared& s, uint8_t* operands, int length,
                                              const DecayRows& g, const Strip& strip) {
  const Config::References& ref = s.references;
  const int block = strip.block(), row = strip.row(0);
  auto load4 = [](float (&to)[4], const float* from) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  };
  float row_offset[4], end_offset[4], q_norms[4], k_norms[4];
  load4(row_offset, &ref.strip_offset[strip.warp][strip.channel]);
  load4(end_offset, &ref.end_offset[block][strip.channel]);
  load4(q_norms, &s.q_norm[row]);
  load4(k_norms, &s.k_norm[row]);
  const short4 column = *reinterpret_cast<const short4*>(&ref.column_offset[block][strip.channel]);
  const float column_offset[4] = {static_cast<float>(column.x), static_cast<float>(column.y),
                                  static_cast<float>(column.z), static_cast<float>(column.w)};
  const uint2 before = *reinterpret_cast<const uint2*>(&ref.before[block][strip.channel]);
  const uint32_t factors = shared_address(s.factors[block]);
  const int64_t tile_bytes = length * kTileRowBytes;
  uint8_t* k_decayed = operands + (kTileKDecayed + (strip.lane >> 4)) * tile_bytes +
                       swizzle128(row, (strip.lane & 15) >> 1) + 8 * (strip.lane & 1);
  uint8_t* q_decayed = k_decayed + (kTileQDecayed - kTileKDecayed) * tile_bytes;
  uint8_t* k_restored = k_decayed + (kTileKRestored - kTileKDecayed) * tile_bytes;
#pragma unroll
  for (int r = 0; r < Config::kStrip; ++r) {
    float q[4], k[4], row_decay[4], column_decay[4], end_decay[4];
    unpack(q, staged_row(s.q, strip, r));
    unpack(k, staged_row(s.k, strip, r));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float exponent = row_offset[e] + g[r][e];
      row_decay[e] = exp2_fast(exponent);
      column_decay[e] = exp2_fast(column_offset[e] - exponent);
      end_decay[e] = exp2_fast(end_offset[e] - exponent);
      q[e] *= q_norms[r];
      k[e] *= k_norms[r];
    }
    const uint2 row_q = pack4(q, row_decay), row_k = pack4(k, row_decay);
    const uint32_t at = factors + strip.tile_place(r);
    put_shared<Config::kRowQ * kTileBytes>(at, row_q);
    put_shared<Config::kRowK * kTileBytes>(at, row_k);
    put_shared<Config::kColumnK * kTileBytes>(at, pack4(k, column_decay));
    if (r < strip.rows) {
      put_global(k_decayed, r, multiply4(row_k, before));
      put_global(q_decayed, r, multiply4(row_q, before));
      put_global(k_restored, r, pack4(k, end_decay));
    }
  }
}

}  // namespace jax_flashkda::chunk_prepare
