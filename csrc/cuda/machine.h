// What the current device can do, asked once, and the limits that a test may set to it.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstddef>

#include "tuning.h"

namespace tfb::cuda {

// Facts about the current device, within the limits.
cudaError_t current_machine(Machine& machine);

// Treats every device as one with at most so much shared memory for a block and such clusters, for tests and timings.
// With clusters of 1, instructions newer than compute capability 8.0 are unused; the environment variable
// TFB_EXT_PORTABLE=1 sets that limit at the first use.
struct MachineLimits {
  int shared_bytes, cluster_blocks;
};
void limit_machine(const MachineLimits& limits);
constexpr MachineLimits kNoLimits{INT_MAX, INT_MAX};

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
