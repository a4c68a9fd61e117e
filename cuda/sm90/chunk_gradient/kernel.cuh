// Everything that a chunk's gradients need no neighbour for, all chunks at once. With G the running
// sum of the log decay inside the chunk, S the state at its start and dS' the state's gradient at
// its end:
//
//   dq_d = scale dO S^T      dk_d = -dR S^T      dk_r = U dS'^T
//   dA_qk = scale tril(dO U^T)      dL = -strict_tril(dR U^T)
//   d_beta_i = <dR_i, U_i> / beta_i^2 (dR here is dV); of a chunk of few tokens see few_tokens.cuh
//   dqn_i = exp(G_i) dq_d_i + sum over j <= i of dA_qk[i, j] exp(G_i - G_j) kn_j
//   dkn_i = exp(G_i) dk_d_i + sum over j < i of dL[i, j] exp(G_i - G_j) kn_j         as a row
//         + exp(G_C - G_i) dk_r_i + sum over later rows of exp(..) (dA_qk qn + dL kn)  as a column
//   dG_i = <qn, dqn> + <kn, dkn as a row> - <kn, dkn as a column>, channel by channel
//         (but for dk_r)
//   d log decay_t = sum over i >= t of dG_i + sum over j < t of kn_j exp(G_C - G_j) dk_r_j
//                 + exp(G_C) <S, dS'>
//
// and through the gate, the norms and the sigmoid to the raw inputs, with sums over tokens for
// dt_bias and A_log.
//
// Grid: gradient_ctas_per_head CTAs a value head, heads fastest; each takes every so many chunks of
// its head. A warp owns 16 channels of 32 tokens, everything transposed: sums over tokens stay in
// the warp and the one of the other 32, and its elements of a product have the layout of the next
// one's left operand, so sums never leave registers. The products over V run on the warpgroups'
// tensor cores from shared memory; it holds factors and decays behind them, then the next chunk's
// operands are loaded.
//
// Read: q, k, g, beta, dO, dR (which is dv), U, boundary images. Written: dq, dk, dg, d_beta, the
// partial sums, zeros for padding. Rows behind the chunk's end are never read: they count as zeros.
#pragma once

#include "sm90/chunk_gradient/outputs.cuh"
#include "sm90/chunk_gradient/few_tokens.cuh"

namespace jax_flashkda::chunk_gradient {

// What the gate needs of the item's row. Nobody reads the row before any more.
template <class Shared>
__device__ __forceinline__ void load_head_scalars(Shared& s, const ForwardParams& p, int64_t row,
                                                  int64_t head) {
  const int64_t gate_head = row * p.shape.HV + head;
  if (threadIdx.x < Config::kHeadDim)
    s.dt_bias[threadIdx.x] =
        p.dt_bias != nullptr ? __ldg(p.dt_bias + gate_head * Config::kHeadDim + threadIdx.x) : 0.0f;
  if (threadIdx.x == Config::kHeadDim)
    s.amplitude = p.A_log != nullptr ? expf(__ldg(p.A_log + gate_head)) : 1.0f;
}

// Products over V: scores' gradients to shared memory, parts through the states to `sums`. A
// warpgroup owns half the channels of half the tokens; of the scores' gradients half the columns of
// one.
template <class Shared>
__device__ __forceinline__ void multiply_values(Sums& sums, Shared& s, float scale, int warpgroup,
                                                const Place& at) {
  Elements scores;
  fence_elements(scores);
  fence_elements(sums.q_row);
  fence_elements(sums.k_row);
  fence_elements(sums.k_column);
  wgmma_fence();
  const bool upper_channels = warpgroup & 1;
  const uint64_t tokens = (warpgroup >> 1) * 256;  // 32 rows of 128 bytes
  product_over_values<false>(scores, operand(upper_channels ? s.values.d_r : s.values.d_o),
                             operand(s.values.u) + tokens);
  wgmma_commit();
  const int channels = upper_channels ? static_cast<int>(kBoundaryBytes) / 2 : 0;
  product_over_values<true>(sums.q_row, operand(s.values.state + channels),
                            operand(s.values.d_o) + tokens);
  product_over_values<true>(sums.k_row, operand(s.values.state + channels),
                            operand(s.values.d_r) + tokens);
  product_over_values<true>(sums.k_column, operand(s.values.state_gradient + channels),
                            operand(s.values.u) + tokens);
  wgmma_commit();
  multiply_boundaries(s, at);
  wgmma_wait<1>();
  fence_elements(scores);
  store_score_gradients(s, scores, scale, !upper_channels, at);
  wgmma_wait<0>();
  fence_elements(sums.q_row);
  fence_elements(sums.k_row);
  fence_elements(sums.k_column);
}

// From the products and the raw inputs to gradients of the normalised q and k and of the log decay,
// in the places of the products.
template <DType kGateType>
__device__ __forceinline__ void find_gradients(Shared<kGateType>& s, Sums& sums,
                                               const ForwardParams& p, const Item& item,
                                               const Place& at) {
  Decays d;
  find_decays<kGateType>(d, s, p.gate, find_head_gate(s, p, at), item.length, at);
  write_factors(s, d, at);
  meet_pair(at);  // both halves' factors and references, before either warp reads the other's
  ChannelSums<Shared<kGateType>> channels{sums, s, d, at};
  channels.refer_rows(p.scale);
  Columns columns = {};
  add_scores(sums, columns, s, d, at);
#pragma unroll
  for (int block = 0; block < Config::kBlocks; ++block) channels.finish(block, columns[block]);
  channels.add_other_tokens(item.at_caller_state);
  if (p.qk_l2norm) find_dot_parts(s, sums, at);
}

// Through the gate and the norms, in the places of the raw inputs.
template <DType kGateType>
__device__ __forceinline__ void write_gradients(Shared<kGateType>& s, const Sums& sums,
                                                GateSums& total, const BackwardParams& b,
                                                const BackwardWorkspace& w, const Item& item,
                                                int64_t head, const Place& at) {
  const ForwardParams& p = b.forward;
  const int length = item.length;
  if (p.qk_l2norm) sum_dots(s);
  const HeadGate gate = find_head_gate(s, p, at);
  if (p.gate == Gate::kSoftplus) {
    write_gate_gradients<Gate::kSoftplus>(s, total, sums.k_column, gate, length, at);
  } else if (p.gate == Gate::kBounded) {
    write_gate_gradients<Gate::kBounded>(s, total, sums.k_column, gate, length, at);
  } else {
    write_gate_gradients<Gate::kLogDecay>(s, total, sums.k_column, gate, length, at);
  }
  if (p.qk_l2norm) __syncthreads();  // the dots, before everybody reads them
  float *head_q = nullptr, *head_k = nullptr;
  const int64_t stride = p.shape.HV * Config::kHeadDim;
  if (p.shape.HV != p.shape.H) {
    uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
    const int64_t row = (item.token(p.shape) * p.shape.HV + head) * Config::kHeadDim;
    head_q = reinterpret_cast<float*>(workspace + w.head_gradients_q) + row;
    head_k = reinterpret_cast<float*>(workspace + w.head_gradients_k) + row;
  }
  write_key_gradients(s, 0, sums.q_row, p.qk_l2norm, head_q, stride, length, at);
  write_key_gradients(s, 1, sums.k_row, p.qk_l2norm, head_k, stride, length, at);
}

template <DType kGateType>
__global__ void __launch_bounds__(Config::kThreads, 1)
    chunk_gradient_kernel(const __grid_constant__ BackwardParams b,
                          const __grid_constant__ BackwardWorkspace w, int ctas_per_head) {
  extern __shared__ uint8_t shared_bytes[];
  Shared<kGateType>& s = *reinterpret_cast<Shared<kGateType>*>(
      shared_bytes + ((1024 - (shared_address(shared_bytes) & 1023)) & 1023));
  const ForwardParams& p = b.forward;
  const int head = static_cast<int>(blockIdx.x % static_cast<uint32_t>(p.shape.HV));
  Items items(p, w.forward);
  // The CTA's partials: rows it meets no chunk of keep zeros.
  auto partial = [&](int64_t row) {
    const int64_t part = blockIdx.x / static_cast<uint32_t>(p.shape.HV);
    return reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + w.partials) +
           ((part * p.shape.B + row) * p.shape.HV + head) * Config::kPartialFloats;
  };
  for (int64_t row = 0; row < p.shape.B; ++row)
    if (threadIdx.x < Config::kPartialFloats) partial(row)[threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) {
    mbarrier_init(&s.boundaries_full, 1);
    fence_barrier_init();
  }
  __syncthreads();  // zeros and the barrier, before anybody uses them

  auto clear = [&](const Item& padding) { clear_gradients(b, w, padding, head); };
  // The next item, its values on their way; all threads find the same one.
  auto start_next = [&](Item& next) {
    Item found = items.next(ctas_per_head, clear);
    const CallerStates states = find_caller_states(b, found, head);
    found.at_caller_state = states.initial != nullptr || states.d_final != nullptr;
    if (threadIdx.x == 0) next = found;
    if (found.exists()) load_values(s, b, w, found, head);
    commit_async_loads();
  };
  start_next(s.items[0]);
  __syncthreads();  // the item is there
  if (s.items[0].exists()) load_keys<kGateType>(s, p, s.items[0], head);
  commit_async_loads();
  GateSums total = {};
  for (uint32_t turn = 0; s.items[turn & 1].exists(); ++turn) {
    const Item &item = s.items[turn & 1], &next = s.items[(turn & 1) ^ 1];
    const Place at(s);
    if (turn == 0 || next.row != item.row)  // the other place still holds the item before
      load_head_scalars(s, p, item.row, head);
    const int token = static_cast<int>(threadIdx.x);
    const int64_t beta_at = (item.token(p.shape) + token) * p.shape.HV + head;
    const uint32_t beta_word = token < item.length ? load_beta_word(p, beta_at) : 0;
    wait_for_async_loads<1>();  // dO, dR, U
    fence_async_shared();       // they and filled boundaries, before the tensor cores read them
    mbarrier_wait(&s.boundaries_full, turn & 1);  // the boundary images have arrived
    __syncthreads();  // all threads' copies and fills, before the products

    if (item.at_caller_state) multiply_caller_states(s, find_caller_states(b, item, head));
    if (item.length <= Config::kFewTokens) find_few_beta_gradients(s, b, item, head);
    Sums sums;
    multiply_values(sums, s, p.scale, find_warpgroup(), at);
    wait_for_async_loads<0>();  // q, k, g
    const float beta = token < item.length ? beta_from_word(p, beta_word) : 1.0f;
    const bool without_beta = fabsf(beta) <= kSmallestBeta;
    if (at.warp < 2) {
      const uint32_t tokens = __ballot_sync(0xffffffffu, without_beta);
      if (at.lane == 0) s.without_beta[at.warp] = tokens;
    }
    // All threads' copies and score gradients; the products have read the values.
    const bool clears = __syncthreads_or(without_beta);

    find_norms(s, p.qk_l2norm, at);
    if (token < item.length)
      write_beta_gradient(b, beta_at, beta, find_beta_gradient(s, item, token, beta));
    if (clears) clear_tokens_without_beta(s, sums, b, item, head, at);
    __syncthreads();  // every warp's norms, before they are read
    find_gradients(s, sums, p, item, at);
    fence_async_shared();  // the scratch's uses, before copies take its place
    __syncthreads();       // everybody's, and every warp's parts of the dots
    start_next(s.items[(turn & 1) ^ 1]);
    write_gradients(s, sums, total, b, w, item, head, at);
    __syncthreads();  // every warp's channels of the gradients, before whole rows leave
    store_gradients(s, b, item, head);
    if (next.row != item.row || !next.exists()) add_partial(s, partial(item.row), total, at);
    __syncthreads();  // the gradients have been read, before inputs take their place
    if (next.exists()) load_keys<kGateType>(s, p, next, head);
    commit_async_loads();
  }
}

// dA_log and d_dt_bias of every row and head: the CTAs' partials, in order.
__global__ void __launch_bounds__(Config::kReduceThreads)
    sum_partials_kernel(const __grid_constant__ BackwardParams b,
                        const __grid_constant__ BackwardWorkspace w, int ctas_per_head) {
  const ForwardShape& shape = b.forward.shape;
  const int64_t floats = Config::kPartialFloats, count = shape.B * shape.HV * floats;
  const float* partials =
      reinterpret_cast<const float*>(static_cast<const uint8_t*>(b.forward.workspace) + w.partials);
  for (int64_t i = int64_t{blockIdx.x} * Config::kReduceThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * Config::kReduceThreads) {
    float sum = 0.0f;
    for (int part = 0; part < ctas_per_head; ++part) sum += partials[part * count + i];
    const int64_t row_head = i / floats, channel = i % floats;
    if (channel == shape.K) {
      if (b.dA_log != nullptr) b.dA_log[row_head] = sum;
    } else if (b.d_dt_bias != nullptr) {
      b.d_dt_bias[row_head * shape.K + channel] = sum;
    }
  }
}

// dq and dk of a query/key head: those of its value heads, in order.
__global__ void __launch_bounds__(Config::kReduceThreads)
    sum_head_groups_kernel(const __grid_constant__ BackwardParams b,
                           const __grid_constant__ BackwardWorkspace w) {
  const ForwardShape& shape = b.forward.shape;
  const int64_t quads = shape.K / 4, group = shape.HV / shape.H,
                count = shape.B * shape.T * shape.H * quads;
  const uint8_t* workspace = static_cast<const uint8_t*>(b.forward.workspace);
  for (int64_t i = int64_t{blockIdx.x} * Config::kReduceThreads + threadIdx.x; i < 2 * count;
       i += int64_t{gridDim.x} * Config::kReduceThreads) {
    const bool of_k = i >= count;
    const int64_t to = of_k ? i - count : i, row_head = to / quads;
    // Value heads of a query/key head lie side by side: token and head count on as one.
    const float4* from = reinterpret_cast<const float4*>(
                             workspace + (of_k ? w.head_gradients_k : w.head_gradients_q)) +
                         row_head * group * quads + to % quads;
    float4 sum = from[0];
    for (int64_t head = 1; head < group; ++head) {
      const float4 x = from[head * quads];
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    static_cast<uint2*>(of_k ? b.dk : b.dq)[to] =
        make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
  }
}

}  // namespace jax_flashkda::chunk_gradient
