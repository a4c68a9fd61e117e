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

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// An operand under another reference, `powers` lower: exact, a power of two for each channel.
__device__ __forceinline__ Operand moved(const Operand& x, const uint32_t (&powers)[2]) {
  Operand out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.r[i] = multiply_bf16(x.r[i], powers[i & 1]);
  return out;
}

// 2^exponent of the thread's channels, twice each.
__device__ __forceinline__ void powers_of_two(uint32_t (&out)[2], float exponent0,
                                              float exponent1) {
  const float x0 = exp2_fast(exponent0), x1 = exp2_fast(exponent1);
  out[0] = pack_bf16(x0, x0);
  out[1] = pack_bf16(x1, x1);
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

// The thread's channels' 2^(reference - border) for rows, 2^(border - reference) for columns: the
// halves of the chunk meet at their border.
template <class Shared>
__device__ __forceinline__ void powers_to_border(uint32_t (&out)[2], const Shared& s,
                                                 const Decays& d, int block, const Place& at) {
  const float border0 = HalfDecays(s, 0, at).border(), border1 = HalfDecays(s, 1, at).border();
  if (at.half() == 0) {
    powers_of_two(out, border0 - d.column_reference(block, 0),
                  border1 - d.column_reference(block, 1));
  } else {
    powers_of_two(out, d.row_reference[block][0] - border0, d.row_reference[block][1] - border1);
  }
}

// What the other half will ask for.
template <class Shared>
__device__ __forceinline__ void publish_factors(Shared& s, const Factors& f, const Decays& d,
                                                int block, const Place& at) {
  Exchange& to = s.exchange;
  uint32_t powers[2];
  powers_to_border(powers, s, d, block, at);
  if (at.half() == 0) {
    to.k_column[at.channel_warp()][block][at.lane] = moved(f.k_column, powers).words();
  } else {
    to.q_row[at.channel_warp()][block][at.lane] = moved(f.q_row, powers).words();
    to.k_row[at.channel_warp()][block][at.lane] = moved(f.k_row, powers).words();
  }
}

// A block's own pairs, unless their exponents are pairwise.
__device__ __forceinline__ void add_diagonal(Sums& sums, Columns& columns, int block,
                                             const Factors& f, const Decays& d, const Place& at) {
  if (d.far[block]) return;
  const int i = Config::kBlocks * at.half() + block;
  add_to_rows(sums, block, f.k_column, i, i, at);
  add_to_columns(columns[block], f.q_row, f.k_row, i, i, at);
}

// All pairs of tokens but those of diagonal blocks whose exponents are pairwise: to the rows of
// `sums`, and to `columns`.
template <class Shared>
__device__ __forceinline__ void add_scores(Sums& sums, Columns& columns, Shared& s, const Decays& d,
                                           const Place& at) {
  const int first = Config::kBlocks * at.half();
  uint32_t powers[2];
  {
    const Factors upper(1, s, d, at);
    publish_factors(s, upper, d, 1, at);
    add_diagonal(sums, columns, 1, upper, d, at);
    const Factors lower(0, s, d, at);
    publish_factors(s, lower, d, 0, at);
    add_diagonal(sums, columns, 0, lower, d, at);
    powers_of_two(powers, d.row_reference[1][0] - d.column_reference(0, 0),
                  d.row_reference[1][1] - d.column_reference(0, 1));
    add_to_rows(sums, 1, moved(lower.k_column, powers), first + 1, first, at);
    add_to_columns(columns[0], moved(upper.q_row, powers), moved(upper.k_row, powers), first + 1,
                   first, at);
  }
  meet_pair(at);  // each half's factors, before the other's warp reads them
  const Exchange& from = s.exchange;
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) {
    powers_to_border(powers, s, d, block, at);
#pragma unroll
    for (int other = 0; other < Config::kBlocks; ++other) {
      if (at.half() == 0) {
        add_to_columns(columns[block],
                       moved(Operand(from.q_row[at.channel_warp()][other][at.lane]), powers),
                       moved(Operand(from.k_row[at.channel_warp()][other][at.lane]), powers),
                       Config::kBlocks + other, block, at);
      } else {
        add_to_rows(sums, block,
                    moved(Operand(from.k_column[at.channel_warp()][other][at.lane]), powers),
                    Config::kBlocks + block, other, at);
      }
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
