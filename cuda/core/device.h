// Facts of the current device that launches need.
#pragma once

#include "core/check.h"

namespace jax_flashkda {

inline Status multiprocessors(int& count) {
  int device = 0;
  Status status = cuda_status(cudaGetDevice(&device), "cudaGetDevice");
  if (!status.ok()) return status;
  return cuda_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                     "cudaDeviceGetAttribute");
}

}  // namespace jax_flashkda
