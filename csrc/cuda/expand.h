// expand on CUDA: y[t][j] = (what y holds, or bias[j], or nothing) + scaling * sum_i z[t][i] basis[j][i].
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace tfb::cuda {

struct ExpandParams {
  void* y;  // (tokens, m)
  int64_t y_stride;
  const void* z;  // (tokens, r) of y's type
  int64_t z_stride;
  const void* basis;  // (m, r) of y's type, contiguous
  const void* bias;   // (m,) of y's type, or null; not read where y is added to
  bool add;           // to y; otherwise y is written
  int64_t tokens, m, r;
  float scaling;
  Format format;
};

// One file each. `count` calls of one format, at least one; those that one kernel serves are one launch.
cudaError_t launch_expand_bfloat16(const ExpandParams* params, int count, cudaStream_t stream);
cudaError_t launch_expand_float16(const ExpandParams* params, int count, cudaStream_t stream);
cudaError_t launch_expand_float(const ExpandParams* params, int count, cudaStream_t stream);

inline cudaError_t launch_expand(const ExpandParams* params, int count, cudaStream_t stream) {
  if (params->format == Format::kFloat32) return launch_expand_float(params, count, stream);
  if (params->format == Format::kBFloat16) return launch_expand_bfloat16(params, count, stream);
  return launch_expand_float16(params, count, stream);
}

}  // namespace tfb::cuda
