// Factors to scores to the chunk's matrices:
//   A_qk[i, j] = <q_i exp(G_i - G_j), k_j>           i >= j
//   A_kk[i, j] = beta_i <k_i exp(G_i - G_j), k_j>    i > j
//
// A warp computes its block's rows, over its half of the channels. Of the two warps of a block one
// then adds up A_qk and the other A_kk.
#pragma once

#include "sm90/chunk_prepare/factors.cuh"

namespace jax_flashkda::chunk_prepare {

using BlockScores = float[2][4];  // eights of columns, elements of an accumulator

__device__ __forceinline__ constexpr int block_pair(int row, int column) {
  return row * (row + 1) / 2 + column;
}

// acc (+)= x times the columns y, transposed, over 16 channels.
__device__ __forceinline__ void multiply(BlockScores& acc, const StepFactor& x, const StepFactor& y,
                                         bool first = false) {
  if (first) {
    mma_bf16_first(acc[0], x, y[0], y[1]);
    mma_bf16_first(acc[1], x, y[2], y[3]);
  } else {
    mma_bf16(acc[0], x, y[0], y[1]);
    mma_bf16(acc[1], x, y[2], y[3]);
  }
}

// Of the warp's block with itself, where no single point of reference can carry the decay: each pair
// of tokens gets its own exponent, <= 0 where it is kept. Rare, and slow. The inputs are still there.
__device__ __forceinline__ void add_pairwise(BlockScores& of_q, BlockScores& of_k,
                                             Config::Shared& s, const BlockDecays& G,
                                             const Place& at) {
  float* sums = s.pairwise[thread_index() / 32];
  const auto place = [](int row, int channel) {
    return row * Config::kChannels + (channel ^ (4 * (row & 7)));
  };
  const int row = at.row(), column = 2 * at.quarter();
#pragma unroll
  for (int j = 0; j < Config::kEighths; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[place(row + 8 * (i / 2), 8 * j + column + i % 2)] = G[j][i];
  __syncwarp();  // the warp's sums, before they are read
  const auto input = [&](const Config::Halves& x, int token, int channel, int which) {
    const uint8_t* from = x[at.half] + swizzle128(kBlock * at.block + token, channel / 8);
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(from)[channel % 8]) *
           s.norms[kBlock * at.block + token][which];
  };
#pragma unroll 1
  for (int channel = 0; channel < Config::kChannels; ++channel) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = row + 8 * ((e >> 1) & 1), j = column + 8 * (e >> 2) + (e & 1);
      if (i < j) continue;
      const float decayed_k =
          input(s.k, j, channel, 1) * exp2_fast(sums[place(i, channel)] - sums[place(j, channel)]);
      float &q = of_q[e >> 2][e & 3], &k = of_k[e >> 2][e & 3];
      q = fmaf(input(s.q, i, channel, 0), decayed_k, q);
      k = fmaf(input(s.k, i, channel, 1), decayed_k, k);
    }
  }
}

// Of a block, what a warp keeps: half 0 the scores of q, half 1 those of k. The others it hands over.
struct KeptScores {
  BlockScores sums;

  __device__ __forceinline__ void keep(Config::Shared& s, const BlockScores& of_q,
                                       const BlockScores& of_k, int column, const Place& at) {
    if (at.half == 0) {
      keep(s.matrices.partial[block_pair(at.block, column)][1], of_q, of_k, at);
    } else {
      keep(s.matrices.partial[block_pair(at.block, column)][0], of_k, of_q, at);
    }
  }
  __device__ __forceinline__ void keep(float4 (&handed)[2][32], const BlockScores& kept,
                                       const BlockScores& other, const Place& at) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      handed[n][at.lane] = make_float4(other[n][0], other[n][1], other[n][2], other[n][3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = kept[n][i];
    }
  }

  // Adds what the other half's warp has handed over.
  __device__ __forceinline__ void complete(const Config::Shared& s, int column, const Place& at) {
    const float4(&handed)[2][32] = s.matrices.partial[block_pair(at.block, column)][at.half];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 x = handed[n][at.lane];
      sums[n][0] += x.x, sums[n][1] += x.y, sums[n][2] += x.z, sums[n][3] += x.w;
    }
  }
};

struct RowScores {
  KeptScores earlier[Config::kBlocks - 1];  // by block of columns
  KeptScores diagonal;
};

// The blocks left of the diagonal: the earlier blocks' column factors, moved to this block's
// reference.
__device__ __forceinline__ void multiply_earlier_blocks(RowScores& scores, Config::Shared& s,
                                                        const RowFactors& rows, const Place& at) {
#pragma unroll
  for (int column = 0; column < Config::kBlocks - 1; ++column) {
    if (column >= at.block) continue;
    BlockScores of_q, of_k;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint2 powers =
          load_powers(s.references.between[Config::pair(at.block, column)], step, at);
      StepFactor k;
      load_matrices(k, at.column_address(s.columns, column, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) k[i] = multiply_bf16(k[i], i % 2 == 0 ? powers.x : powers.y);
      multiply(of_q, rows.q[step], k, step == 0);
      multiply(of_k, rows.k[step], k, step == 0);
    }
    scores.earlier[column].keep(s, of_q, of_k, column, at);
  }
}

// A_qk, as the state stage reads it, to its image: zero above the diagonal (select: factors may be
// infinite there).
__device__ __forceinline__ void store_A_qk(Config::Shared& s, RowScores& scores, const Place& at) {
  auto store = [&](int column, const auto& element) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = pack_bf16(element(i / 2, 2 * (i % 2)), element(i / 2, 2 * (i % 2) + 1));
    store_matrices(at.address(s.images.A_qk, at.block, column), packed);
  };
#pragma unroll
  for (int column = 0; column < Config::kBlocks; ++column) {
    if (column > at.block) {
      store(column, [](int, int) { return 0.0f; });
    } else if (column < at.block) {
      KeptScores& kept = scores.earlier[column < Config::kBlocks - 1 ? column : 0];
      kept.complete(s, column, at);
      store(column, [&](int n, int i) { return kept.sums[n][i]; });
    }
  }
  scores.diagonal.complete(s, at.block, at);
  store(at.block, [&](int n, int i) {
    return at.below_diagonal(n, i) >= 0 ? scores.diagonal.sums[n][i] : 0.0f;
  });
}

// A_kk on and below the blocks of the diagonal, in fp32.
__device__ __forceinline__ void store_A_kk(Config::Shared& s, RowScores& scores, const Place& at) {
  const int first_row = kBlock * at.block + at.row();
  const float beta[2] = {s.beta[first_row], s.beta[first_row + 8]};
  auto store = [&](int column, const auto& element) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(
            s.matrices.A_kk +
            matrix_at(first_row + 8 * h, kBlock * column + 8 * n + 2 * at.quarter())) =
            make_float2(beta[h] * element(n, 2 * h), beta[h] * element(n, 2 * h + 1));
  };
#pragma unroll
  for (int column = 0; column < Config::kBlocks - 1; ++column) {
    if (column >= at.block) continue;
    KeptScores& kept = scores.earlier[column];
    kept.complete(s, column, at);
    store(column, [&](int n, int i) { return kept.sums[n][i]; });
  }
  scores.diagonal.complete(s, at.block, at);
  store(at.block, [&](int n, int i) {
    return at.below_diagonal(n, i) >= 1 ? scores.diagonal.sums[n][i] : 0.0f;
  });
}

// What the merges read above the diagonal blocks, where nothing is computed: (0, 1) and (2, 3). A
// warp each.
__device__ __forceinline__ void clear_upper_block(Config::Matrices& m, int which, int lane) {
  float4* X = reinterpret_cast<float4*>(
      m.A_kk_inv + matrix_at(32 * which + (lane >> 1), 32 * which + 16 + 8 * (lane & 1)));
  X[0] = X[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// (I + A_kk)^-1 to its image but for the lower left quarter. Zero above the diagonal blocks.
__device__ __forceinline__ void store_inverse(Config::Shared& s, int thread) {
  const int piece = thread & 7;
  const bool swap = piece & 4;  // half of the lanes read the second four columns first: other banks
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (thread >> 3) + 32 * half;
    if (half == 1 && piece < 4) continue;  // the lower left quarter
    uint4 inverse = make_uint4(0, 0, 0, 0);
    if (piece >> 1 <= row / kBlock) {
      const float4* X =
          reinterpret_cast<const float4*>(s.matrices.A_kk_inv + matrix_at(row, 8 * piece));
      const float4 xa = X[swap], xb = X[!swap];
      const uint2 a = make_uint2(pack_bf16(xa.x, xa.y), pack_bf16(xa.z, xa.w)),
                  b = make_uint2(pack_bf16(xb.x, xb.y), pack_bf16(xb.z, xb.w));
      inverse = swap ? make_uint4(b.x, b.y, a.x, a.y) : make_uint4(a.x, a.y, b.x, b.y);
    }
    *reinterpret_cast<uint4*>(s.images.A_kk_inv + swizzle128(row, piece)) = inverse;
  }
}

// A tile of merge_to_64 to the image.
__device__ __forceinline__ void store_inverse_tile(Config::Shared& s, const float (&tile)[4],
                                                   int warp, int lane) {
  const int row = 32 + 16 * (warp >> 2) + (lane >> 2), piece = warp & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    *reinterpret_cast<uint32_t*>(s.images.A_kk_inv + swizzle128(row + 8 * h, piece) +
                                 4 * (lane & 3)) = pack_bf16(-tile[2 * h], -tile[2 * h + 1]);
}

}  // namespace jax_flashkda::chunk_prepare
