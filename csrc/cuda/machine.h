// What the current device can do, asked once, and the switch that turns its newer abilities off.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace tfb::cuda {

struct Machine {
  int multiprocessors = 0;
  int shared_bytes = 0;   // that a block may ask for
  bool clusters = false;  // the device has them and the kernels in use are compiled for them
};

// Facts about the current device. With portable kernels forced, `clusters` is false.
cudaError_t current_machine(Machine& machine);

// Leaves instructions newer than compute capability 8.0 unused on every device, for tests and timings. Also set by the
// environment variable TFB_EXT_PORTABLE=1 at the first use.
void force_portable(bool portable);
bool portable_forced();

// How many clusters of a kernel a device holds; see resident_clusters in device.cuh.
struct ResidencyKey {
  const void* kernel;
  int device;
  int cluster;
  size_t shared;

  bool operator==(const ResidencyKey& other) const {
    return kernel == other.kernel && device == other.device && cluster == other.cluster && shared == other.shared;
  }
};
bool known_residency(const ResidencyKey& key, int& clusters);
void remember_residency(const ResidencyKey& key, int clusters);

}  // namespace tfb::cuda
