#include "machine.h"

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

cudaError_t ask(int device, Machine& machine) {
  int clusters = 0;
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaDeviceGetAttribute(&machine.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&machine.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  machine.clusters = clusters != 0 && attributes.ptxVersion >= 90;
  return status;
}

std::atomic<bool>& portable_flag() {
  static std::atomic<bool> flag = [] {
    const char* wish = std::getenv("TFB_EXT_PORTABLE");
    return wish != nullptr && wish[0] == '1';
  }();
  return flag;
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
  machine.clusters = machine.clusters && !portable_forced();
  return outcome[device];
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

void force_portable(bool portable) { portable_flag() = portable; }
bool portable_forced() { return portable_flag(); }

}  // namespace tfb::cuda
