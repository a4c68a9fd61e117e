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

}  // namespace jax_flashkda
