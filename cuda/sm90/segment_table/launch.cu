#include <algorithm>

#include "core/device.h"
#include "sm90/launch.h"
#include "sm90/segment_table/config.h"
#include "sm90/segment_table/kernel.cuh"

namespace jax_flashkda::sm90 {

using segment_table::Config;

Status launch_segment_table(const ForwardParams& params, const ForwardWorkspace& workspace,
                            CUstream_st* stream) {
  clear_older_error();
  auto* counts =
      reinterpret_cast<TableCounts*>(static_cast<uint8_t*>(params.workspace) + workspace.counts);
  segment_table::clear_counts_kernel<<<1, 1, 0, stream>>>(counts);
  if (Status status = launch_status("clear_counts_kernel"); !status.ok()) return status;
  segment_table::
      segment_table_kernel<<<static_cast<unsigned>(params.shape.B), Config::kThreads, 0, stream>>>(
          params, workspace);
  return launch_status("segment_table_kernel");
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
