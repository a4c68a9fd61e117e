// Gradients of the scores back to the rows and columns they were made of, in the warp's channels:
//   row i of q:     sum over j of dA_qk[i, j] exp(G_i - G_j) k_j           of k: with dL
//   column j of k:  sum over i of exp(G_i - G_j) (dA_qk[i, j] q_i + dL[i, j] k_i)
// The diagonal i = j of A_qk is left out: it knows no decay, and is added where the sums are used.
#pragma once

#include "sm90/chunk_gradient/factors.cuh"

namespace jax_flashkda::chunk_gradient {

// Sums of the gradients of q and k relative to the references of the tokens' blocks.
struct Sums {
  Elements q_row, k_row, k_column;
};

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Two groups of sums += factors[16 channels x 16 tokens] times b[16 tokens x 16 tokens].
__device__ __forceinline__ void add_product(Elements& sums, int group, const uint32_t (&factors)[4],
                                            const uint32_t (&b)[4]) {
  mma_bf16(sums[group], factors, b[0], b[1]);
  mma_bf16(sums[group + 1], factors, b[2], b[3]);
}

// A block's factors, moved to another block's reference.
__device__ __forceinline__ void take_factors(uint32_t (&out)[4],
                                             const uint32_t (&factors)[2 * Config::kGroups],
                                             int block, const uint32_t (&move)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = multiply_bf16(factors[4 * block + i], move[i & 1]);
}
__device__ __forceinline__ void take_factors(uint32_t (&out)[4],
                                             const uint32_t (&factors)[2 * Config::kGroups],
                                             int block) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = factors[4 * block + i];
}

// Block (i, j) of the score gradients as the right operand of a product over its columns, or over
// its rows.
__device__ __forceinline__ void load_over_columns(uint32_t (&b)[4], const uint8_t* tile, int i,
                                                  int j, int lane) {
  load_matrices(b, shared_address(tile) + swizzle128(16 * i + (lane & 7) + 8 * (lane >> 4),
                                                     2 * j + ((lane >> 3) & 1)));
}
__device__ __forceinline__ void load_over_rows(uint32_t (&b)[4], const uint8_t* tile, int i, int j,
                                               int lane) {
  load_matrices_transposed(
      b, shared_address(tile) + swizzle128(16 * i + (lane & 15), 2 * j + (lane >> 4)));
}

template <class Shared>
__device__ __forceinline__ void add_score_gradients(Sums& sums, const Factors& f, const Shared& s,
                                                    const Decays& d, const Place& at) {
#pragma unroll
  for (int i = 0; i < Config::kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      if (i == j && d.far[i]) continue;  // add_pairwise_gradients takes those
      uint32_t q_row[4], k_row[4], k_column[4], b[4];
      if (i == j) {
        take_factors(q_row, f.q_row, i);
        take_factors(k_row, f.k_row, i);
        take_factors(k_column, f.k_column, j);
      } else {
        uint32_t move[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float power = exp2_fast(d.row_reference[i][h] - d.column_reference(j, h));
          move[h] = pack_bf16(power, power);
        }
        take_factors(q_row, f.q_row, i, move);
        take_factors(k_row, f.k_row, i, move);
        take_factors(k_column, f.k_column, j, move);
      }
      load_over_columns(b, s.d_A_qk, i, j, at.lane);
      add_product(sums.q_row, 2 * i, k_column, b);
      load_over_columns(b, s.d_L, i, j, at.lane);
      add_product(sums.k_row, 2 * i, k_column, b);
      load_over_rows(b, s.d_A_qk, i, j, at.lane);
      add_product(sums.k_column, 2 * j, q_row, b);
      load_over_rows(b, s.d_L, i, j, at.lane);
      add_product(sums.k_column, 2 * j, k_row, b);
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
// that no factor stands before any more.
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
        const int mine = 8 * (own >> 1) + at.token() + (own & 1);
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
