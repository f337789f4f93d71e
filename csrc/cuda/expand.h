// expand_ on CUDA: y[t][j] += scaling * sum_i z[t][i] basis[j][i], in place.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../format.h"

namespace tfb::cuda {

struct ExpandParams {
  void* y;  // (tokens, m)
  int64_t y_stride;
  const void* z;  // (tokens, r) of y's type
  int64_t z_stride;
  const void* basis;  // (m, r), contiguous
  int64_t tokens, m, r;
  float scaling;
  Format format;
  Format basis_format;
};

cudaError_t launch_expand(const ExpandParams& params, cudaStream_t stream);

// The float32 kernel, called by launch_expand.
cudaError_t launch_expand_float(const ExpandParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
