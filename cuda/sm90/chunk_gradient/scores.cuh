// Gradients of the scores back to the rows and columns they were made of, in the warp's channels:
//   row i of q:     sum over j of dA_qk[i, j] exp(G_i - G_j) k_j           of k: with dL
//   column j of k:  sum over i of exp(G_i - G_j) (dA_qk[i, j] q_i + dL[i, j] k_i)
// The diagonal i = j of A_qk is left out: it knows no decay, and is added where the sums are used.
#pragma once

#include "sm90/chunk_gradient/factors.cuh"

namespace jax_flashkda::chunk_gradient {

// Sums of the gradients of q and k relative to the references of the tokens' blocks. The parts
// through the states come first, as bare products; a column's part through the state is kept apart
// from its scores.
struct Sums {
  Elements q_row, k_row, k_column;
};

// 16 channels by the 16 tokens of a block, as a left operand.
struct Operand {
  uint32_t r[4];

  __device__ explicit Operand(const uint4& x) : r{x.x, x.y, x.z, x.w} {}

  // Under another reference, `powers` lower: exact, a power of two for each channel, twice.
  __device__ Operand moved(const uint32_t (&powers)[2]) const {
    Operand out = *this;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.r[i] = multiply_bf16(r[i], powers[i & 1]);
    return out;
  }
};

// From column references of block j to row references of block i.
template <class Shared>
__device__ __forceinline__ void powers_between(uint32_t (&out)[2], const Shared& s, int i, int j,
                                               const Place& at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int c = at.channel() + 8 * h;
    const float x = exp2_fast(s.exchange.row_reference[i][c] - s.exchange.column_reference[j][c]);
    out[h] = pack_bf16(x, x);
  }
}

// Two groups of sums += factors[16 channels x 16 tokens] times b[16 tokens x 16 tokens].
__device__ __forceinline__ void add_product(float (&sums0)[4], float (&sums1)[4],
                                            const Operand& factors, const uint32_t (&b)[4]) {
  mma_bf16(sums0, factors.r, b[0], b[1]);
  mma_bf16(sums1, factors.r, b[2], b[3]);
}

// Block (i, j) of the chunk's score gradients; dL lies behind dA_qk. A row of the tile is swizzled
// by an exclusive or with the row, whose share is in the place already.
__device__ __forceinline__ uint32_t score_address(uint32_t place, int i, int j, bool of_k) {
  return (place ^ (32 * j)) + 2048 * i + (of_k ? Config::kHalfTile : 0);
}

// Rows of block i get what columns of block j, as `k_column`, give them.
__device__ __forceinline__ void add_to_rows(Sums& sums, int block, const Operand& k_column, int i,
                                            int j, const Place& at) {
  uint32_t b[4];
  load_matrices(b, score_address(at.over_columns, i, j, false));
  add_product(sums.q_row[2 * block], sums.q_row[2 * block + 1], k_column, b);
  load_matrices(b, score_address(at.over_columns, i, j, true));
  add_product(sums.k_row[2 * block], sums.k_row[2 * block + 1], k_column, b);
}

// Columns of block j get what rows of block i give them.
__device__ __forceinline__ void add_to_columns(float (&sums)[2][4], const Operand& q_row,
                                               const Operand& k_row, int i, int j,
                                               const Place& at) {
  uint32_t b[4];
  load_matrices_transposed(b, score_address(at.over_rows, i, j, false));
  add_product(sums[0], sums[1], q_row, b);
  load_matrices_transposed(b, score_address(at.over_rows, i, j, true));
  add_product(sums[0], sums[1], k_row, b);
}

// Sums over scores, of the columns of a half's blocks.
using Columns = float[Config::kBlocks][2][4];

// All pairs of tokens but those of diagonal blocks whose exponents are pairwise: to the rows of
// `sums`, and to `columns`.
template <class Shared>
__device__ __forceinline__ void add_scores(Sums& sums, Columns& columns, const Shared& s,
                                           const Decays& d, const Place& at) {
  const Scratch& f = s.scratch;
  const int warp = at.channel_warp();
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    const int own = Config::kBlocks * at.half() + block;
    uint32_t powers[2];
    if (!d.far[block]) {
      add_to_rows(sums, block, Operand(f.k_column[own][warp][at.lane]), own, own, at);
      add_to_columns(columns[block], Operand(f.q_row[own][warp][at.lane]),
                     Operand(f.k_row[own][warp][at.lane]), own, own, at);
    }
#pragma unroll 1
    for (int j = 0; j < own; ++j) {
      powers_between(powers, s, own, j, at);
      add_to_rows(sums, block, Operand(f.k_column[j][warp][at.lane]).moved(powers), own, j, at);
    }
#pragma unroll 1
    for (int i = own + 1; i < 2 * Config::kBlocks; ++i) {
      powers_between(powers, s, i, own, at);
      add_to_columns(columns[block], Operand(f.q_row[i][warp][at.lane]).moved(powers),
                     Operand(f.k_row[i][warp][at.lane]).moved(powers), i, own, at);
    }
  }
}

// One element of the score gradients.
__device__ __forceinline__ float score_gradient(const uint8_t* tile, int i, int j) {
  return __uint_as_float(
      uint32_t{*reinterpret_cast<const uint16_t*>(tile + swizzle128(i, j >> 3) + 2 * (j & 7))}
      << 16);
}

// A diagonal block whose decay no reference point can carry: each pair of tokens gets its own
// exponent. A channel's 16 tokens lie with four lanes, which pass theirs around. Adds to gradients
// that no factor stands before any more. `block` counts through the chunk.
template <class Shared>
__device__ __forceinline__ void add_pairwise_gradients(float (&dq)[2][4], float (&dk)[2][4],
                                                       float (&dG)[2][4], const float (&q)[2][4],
                                                       const float (&k)[2][4],
                                                       const float (&G)[2][4], const Shared& s,
                                                       int block, const Place& at) {
#pragma unroll 1
  for (int turn = 0; turn < 4; ++turn) {
    const int holder = (at.lane + turn) & 3;
#pragma unroll
    for (int other = 0; other < 4; ++other) {
      const int m = other >> 1, e = other & 1, theirs = 8 * m + 2 * holder + e;
      float their_q[2], their_k[2], their_G[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        their_q[h] = __shfl_sync(0xffffffffu, q[m][2 * h + e], holder, 4);
        their_k[h] = __shfl_sync(0xffffffffu, k[m][2 * h + e], holder, 4);
        their_G[h] = __shfl_sync(0xffffffffu, G[m][2 * h + e], holder, 4);
      }
#pragma unroll
      for (int own = 0; own < 4; ++own) {
        const int mine = 8 * (own >> 1) + 2 * (at.lane & 3) + (own & 1);
        const bool row = mine > theirs;  // else a column of theirs; the diagonal holds zeros
        const int i = 16 * block + (row ? mine : theirs), j = 16 * block + (row ? theirs : mine);
        const float d_A_qk = mine == theirs ? 0.0f : score_gradient(s.d_A_qk, i, j),
                    d_L = mine == theirs ? 0.0f : score_gradient(s.d_L, i, j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at_own = 2 * h + (own & 1);
          float &to_q = dq[own >> 1][at_own], &to_k = dk[own >> 1][at_own],
                &to_G = dG[own >> 1][at_own];
          const float my_q = q[own >> 1][at_own], my_k = k[own >> 1][at_own],
                      difference = G[own >> 1][at_own] - their_G[h],
                      decay = exp2_fast(row ? difference : -difference);
          const float of_q = d_A_qk * decay * their_k[h], of_k = d_L * decay * their_k[h],
                      column = decay * fmaf(d_A_qk, their_q[h], d_L * their_k[h]);
          to_q += row ? of_q : 0.0f;
          to_k += row ? of_k : column;
          to_G += row ? fmaf(my_q, of_q, my_k * of_k) : -my_k * column;
        }
      }
    }
  }
}

}  // namespace jax_flashkda::chunk_gradient
