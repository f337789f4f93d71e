// shrink on CUDA: z[t] = (M + sigma[k] E[samples[k]]) x[t], k = t / rows_per_group. sigma, samples and seed are read by
// the kernel, so that one captured graph serves all of their values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../format.h"

namespace tfb::cuda {

struct ShrinkParams {
  const void* x;     // (groups * rows_per_group, n)
  int64_t x_stride;  // elements between rows
  const void* mean;  // (r, n), contiguous
  const float* sigma;
  const int32_t* samples;
  const int64_t* seed;
  void* z;  // (groups * rows_per_group, r), contiguous, of x's type
  int64_t r, n;
  int64_t groups, rows_per_group;  // both at least 1
  uint32_t layer;
  bool antithetic;
  Format format;
  Format mean_format;
};

cudaError_t launch_shrink(const ShrinkParams& params, cudaStream_t stream);

// The float32 kernel, called by launch_shrink.
cudaError_t launch_shrink_float(const ShrinkParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
