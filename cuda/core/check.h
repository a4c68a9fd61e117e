// CUDA errors as a Status that names the kernel. Host code of launch.cu files only.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/status.h"

namespace jax_flashkda {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                       cudaGetErrorString(error));
}

// Reads the error of the launch just made. An error left behind by somebody else's work must not be
// blamed on this kernel: clear_older_error() goes before the launch.
inline Status launch_status(const char* kernel) { return cuda_status(cudaGetLastError(), kernel); }
inline void clear_older_error() { (void)cudaGetLastError(); }

// A launch behind a kernel of ours that calls let_next_kernel_start(): this one may start while
// that one runs, and calls wait_for_earlier_kernel() before it ends, or before it reads what that
// one leaves. launch_status() tells the result.
template <class... Parameters>
void launch_early(void (*kernel)(Parameters...), unsigned ctas, unsigned threads,
                  size_t shared_bytes, cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace jax_flashkda
