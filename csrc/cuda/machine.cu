#include "machine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "device.cuh"

namespace tfb::cuda {

namespace {

constexpr int kMaxDevices = 64;

// Compiled for the same architectures as every other kernel here: its attributes tell what they were compiled for.
__global__ void probe_kernel() {}

// Blocks of the largest cluster that the device holds, each with the threads and the shared memory of the largest block
// of shrink: a device's processors may be too few, or lie in groups too small (MIG), for a cluster that its kind
// allows.
int largest_cluster(const Machine& machine) {
  constexpr unsigned kMostThreads = most_shrink_warps() * kWarpLanes;
  for (const int blocks : {kMaxCluster, kMaxCluster / 2}) {
    LaunchShape shape{dim3(1), kMostThreads};
    shape.shared = static_cast<size_t>(machine.shared_bytes);
    shape.cluster = blocks;
    int count = 0;
    if (ask_resident(probe_kernel, shape, machine.multiprocessors, count) != cudaSuccess) {
      cudaGetLastError();  // an answer, not a fault of later calls
    } else if (count > 0) {
      return blocks;
    }
  }
  return 1;
}

cudaError_t ask(int device, Machine& machine) {
  int clusters = 0;
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaDeviceGetAttribute(&machine.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&machine.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (status == cudaSuccess && clusters != 0 && attributes.ptxVersion >= 90) {
    machine.cluster_blocks = largest_cluster(machine);
  }
  return status;
}

struct Limits {
  std::atomic<int> shared_bytes{kNoLimits.shared_bytes};
  std::atomic<int> cluster_blocks{kNoLimits.cluster_blocks};

  Limits() {
    const char* portable = std::getenv("TFB_EXT_PORTABLE");
    if (portable != nullptr && portable[0] == '1') cluster_blocks = 1;
  }
};

Limits& limits() {
  static Limits all;
  return all;
}

}  // namespace

cudaError_t current_machine(Machine& machine) {
  static std::array<Machine, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  static std::array<cudaError_t, kMaxDevices> outcome;
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  std::call_once(asked[device], [&] { outcome[device] = ask(device, known[device]); });
  machine = known[device];
  machine.shared_bytes = std::min(machine.shared_bytes, limits().shared_bytes.load());
  machine.cluster_blocks = std::min(machine.cluster_blocks, limits().cluster_blocks.load());
  return outcome[device];
}

void limit_machine(const MachineLimits& wanted) {
  limits().shared_bytes = wanted.shared_bytes;
  limits().cluster_blocks = wanted.cluster_blocks;
}

namespace {

// A launch looks up a handful of entries; there are as many as kernels in use.
struct Residencies {
  std::mutex mutex;
  std::vector<std::pair<ResidencyKey, int>> known;
};

Residencies& residencies() {
  static Residencies all;
  return all;
}

}  // namespace

bool known_residency(const ResidencyKey& key, int& clusters) {
  Residencies& all = residencies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (const auto& [other, count] : all.known) {
    if (other == key) {
      clusters = count;
      return true;
    }
  }
  return false;
}

void remember_residency(const ResidencyKey& key, int clusters) {
  Residencies& all = residencies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.known.emplace_back(key, clusters);
}

}  // namespace tfb::cuda
