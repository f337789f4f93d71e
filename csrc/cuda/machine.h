// What the current device can do, asked once, and the switch that turns its newer abilities off.
#pragma once

#include <cuda_runtime_api.h>

namespace tfb::cuda {

struct Machine {
  int multiprocessors = 0;
  bool clusters = false;  // the device has them and the kernels in use are compiled for them
};

// Facts about the current device. With portable kernels forced, `clusters` is false.
cudaError_t current_machine(Machine& machine);

// Leaves instructions newer than compute capability 8.0 unused on every device, for tests and timings. Also set by the
// environment variable TFB_EXT_PORTABLE=1 at the first use.
void force_portable(bool portable);
bool portable_forced();

}  // namespace tfb::cuda
