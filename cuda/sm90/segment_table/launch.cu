#include <algorithm>

#include "core/device.h"
#include "sm90/launch.h"
#include "sm90/segment_table/config.h"
#include "sm90/segment_table/kernel.cuh"

namespace jax_flashkda::sm90 {

using segment_table::Config;

namespace {

template <class Shape>
Status launch_table(const ForwardParams& params, const ForwardWorkspace& workspace,
                    CUstream_st* stream) {
  const auto blocks = static_cast<unsigned>(Shape::blocks(params.shape.B * params.shape.T + 1));
  const auto table = segment_table::segment_table_kernel<Shape>;
  clear_older_error();
  if (blocks == 1) {
    table<<<1, Config::kThreads, 0, stream>>>(params, workspace);
    return launch_status("segment_table_kernel");
  }
  segment_table::segment_blocks_kernel<Shape>
      <<<blocks, Config::kThreads, 0, stream>>>(params, workspace);
  if (Status status = launch_status("segment_blocks_kernel"); !status.ok()) return status;
  launch_early(table, blocks, Config::kThreads, 0, stream, params, workspace);
  return launch_status("segment_table_kernel");
}

}  // namespace

Status launch_segment_table(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream) {
  return workspace.short_runs ? launch_table<Config::Shape<kShortTokens>>(params, workspace, stream)
                              : launch_table<Config::Shape<0>>(params, workspace, stream);
}

Status launch_unused_states(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream) {
  int sms = 0;
  if (Status status = multiprocessors(sms); !status.ok()) return status;
  const int64_t states = params.shape.B * params.shape.N * params.shape.HV;
  const unsigned ctas =
      static_cast<unsigned>(std::min<int64_t>(states, int64_t{sms} * Config::kCopyCtasPerSm));
  clear_older_error();
  segment_table::unused_states_kernel<<<ctas, Config::kCopyThreads, 0, stream>>>(params, workspace);
  return launch_status("unused_states_kernel");
}

}  // namespace jax_flashkda::sm90
