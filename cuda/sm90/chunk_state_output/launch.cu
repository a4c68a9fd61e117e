#include <algorithm>

#include "core/device.h"
#include "sm90/chunk_state_output/config.h"
#include "sm90/chunk_state_output/kernel.cuh"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {

using chunk_state_output::chunk_state_output_kernel;
template <bool kChunkStates>
using WholeHead = chunk_state_output::Config<2, kChunkStates>;
template <bool kChunkStates>
using HalfHead = chunk_state_output::Config<1, kChunkStates>;

namespace {

constexpr char kName[] = "chunk_state_output_kernel";

template <class Config>
constexpr size_t shared_bytes() {
  return sizeof(typename Config::Shared);
}

template <class Config>
Status raise_limit() {
  return cuda_status(cudaFuncSetAttribute(chunk_state_output_kernel<Config>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes<Config>())),
                     "chunk_state_output_kernel: cudaFuncSetAttribute");
}

template <class Config>
Status launch(const ForwardParams& params, const ForwardWorkspace& workspace, int64_t ctas,
              CUstream_st* stream) {
  clear_older_error();
  launch_early(chunk_state_output_kernel<Config>, static_cast<unsigned>(ctas), Config::kThreads,
               shared_bytes<Config>(), stream, params, workspace);
  return launch_status(kName);
}

// Two CTAs share a head while that leaves none waiting: a step takes 0.9 us for half a head and 1.6
// us for a whole one. Both give the same bits.
template <bool kChunkStates>
Status launch_heads(const ForwardParams& params, const ForwardWorkspace& workspace,
                    CUstream_st* stream) {
  using Whole = WholeHead<kChunkStates>;
  using Half = HalfHead<kChunkStates>;
  const ForwardShape& shape = params.shape;
  if (workspace.overlap.processors > 0) {
    const int64_t tracks = shape.has_segment_ids ? shape.HV : shape.B * shape.HV;
    return workspace.overlap.half_heads ? launch<Half>(params, workspace, 2 * tracks, stream)
                                        : launch<Whole>(params, workspace, tracks, stream);
  }
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t rows = shape.has_segment_ids ? shape.B * shape.T : shape.B * workspace.pieces.count;
  const int64_t chains = rows * shape.HV;
  if (shape.B * workspace.pieces.count * shape.HV * 2 <= sms)
    return launch<Half>(params, workspace, std::min<int64_t>(2 * chains, sms), stream);
  return launch<Whole>(params, workspace, std::min<int64_t>(chains, sms), stream);
}

}  // namespace

Status initialize_chunk_state_output() {
  for (const auto raise : {raise_limit<WholeHead<false>>, raise_limit<HalfHead<false>>,
                           raise_limit<WholeHead<true>>, raise_limit<HalfHead<true>>})
    if (Status status = raise(); !status.ok()) return status;
  return {};
}

Status clear_chunk_states(const ForwardParams& params, CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  const int64_t states = shape.B * (shape.T / kChunk) * shape.HV;
  return cuda_status(cudaMemsetAsync(params.chunk_states, 0,
                                     static_cast<size_t>(states * kStateFloats * 4), stream),
                     "chunk_states: cudaMemsetAsync");
}

Status clear_output(const ForwardParams& params, CUstream_st* stream) {
  const ForwardShape& shape = params.shape;
  const int64_t values = shape.B * shape.T * shape.HV * shape.V;
  return cuda_status(cudaMemsetAsync(params.o, 0, static_cast<size_t>(values * 2), stream),
                     "o: cudaMemsetAsync");
}

Status launch_chunk_state_output(const ForwardParams& params, const ForwardWorkspace& workspace,
                                 CUstream_st* stream) {
  return params.chunk_states != nullptr ? launch_heads<true>(params, workspace, stream)
                                        : launch_heads<false>(params, workspace, stream);
}

}  // namespace jax_flashkda::sm90
