#include <atomic>
#include <string>

#include "core/check.h"
#include "sm90/launch.h"

namespace jax_flashkda::sm90 {
namespace {

// Sets the current device and puts the caller's back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    status_ = cuda_status(cudaGetDevice(&previous_), "cudaGetDevice");
    if (status_.ok()) status_ = cuda_status(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceScope() { (void)cudaSetDevice(previous_); }
  const Status& status() const { return status_; }

 private:
  int previous_ = 0;
  Status status_;
};

// XLA asks before every run of a program, for each custom call in it: only the first does the work.
constexpr int kMostDevices = 64;
std::atomic<bool> initialized[kMostDevices];

Status initialize_kernels(int device) {
  int major = 0, minor = 0;
  if (Status s =
          cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                      "cudaDeviceGetAttribute");
      !s.ok())
    return s;
  if (Status s =
          cuda_status(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                      "cudaDeviceGetAttribute");
      !s.ok())
    return s;
  if (major != 9 || minor != 0)
    return Status::error(
        "jax_flashkda: device " + std::to_string(device) + " has compute capability " +
        std::to_string(major) + "." + std::to_string(minor) +
        ", the kernels are compiled for 9.0 (Hopper); implementation=\"xla\" runs everywhere");
  DeviceScope scope(device);
  if (!scope.status().ok()) return scope.status();
  if (Status s = initialize_short_segments(); !s.ok()) return s;
  if (Status s = initialize_chunk_prepare(); !s.ok()) return s;
  if (Status s = initialize_chunk_state_output(); !s.ok()) return s;
  if (Status s = initialize_chunk_state_pieces(); !s.ok()) return s;
  if (Status s = initialize_chunk_state_gradient(); !s.ok()) return s;
  return initialize_chunk_gradient();
}

}  // namespace

Status initialize(int device) {
  const bool known = device >= 0 && device < kMostDevices;
  if (known && initialized[device].load(std::memory_order_acquire)) return {};
  Status status = initialize_kernels(device);
  if (known && status.ok()) initialized[device].store(true, std::memory_order_release);
  return status;
}

}  // namespace jax_flashkda::sm90
