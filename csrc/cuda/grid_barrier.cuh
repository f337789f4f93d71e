// A barrier over the grid. Apart from device.cuh, because cooperative_groups.h takes longer to compile than most
// kernels.
#pragma once

#include "device.cuh"

#if !defined(TFB_EMULATOR)

#include <cooperative_groups.h>

namespace tfb::cuda {

// Waits for all threads of a cooperative launch; what they wrote to global memory before is visible after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace tfb::cuda

#endif
