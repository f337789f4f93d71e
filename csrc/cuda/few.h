// Few rows, as in decoding: shrink and expand of all layers that share x in one launch.
//   y_l[t][j] = bias_l[j] + scaling_l * sum_i z_l[t][i] basis_l[j][i], z_l as in shrink.h but never rounded
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shrink.h"

namespace tfb::cuda {

struct FewLayer {
  void* y;            // (T, m), contiguous, of x's type
  const void* basis;  // (m, r), contiguous
  const void* bias;   // (m,) of x's type, or null
  int64_t m;
  float scaling;
  int32_t r;
  int32_t first_tile;  // of the layer's ranks in `shrink.tiles`
};

struct FewParams {
  ShrinkParams shrink;  // its z are not used
  FewLayer layers[kMaxLayers];
  int32_t layer_count;
  Format basis_format;
  float* partial;  // few_partial_floats(shrink) floats
};

// Whether one launch serves: few rows of few ranks, a sample's rows within one tile.
bool few_serves(const ShrinkParams& params);
int64_t few_partial_floats(const ShrinkParams& params);

cudaError_t launch_few(const FewParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
