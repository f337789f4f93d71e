// Few rows, as in decoding: shrink and expand of all layers that share x in one launch, where decode_serves()
// (tuning.h).
//   y_l[t][j] = bias_l[j] + scaling_l * sum_i z_l[t][i] basis_l[j][i], z_l as in shrink.h but never rounded
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shrink.h"

namespace tfb::cuda {

struct DecodeLayer {
  void* y;            // (T, m), contiguous, of x's type
  const void* basis;  // (m, r), contiguous
  const void* bias;   // (m,) of x's type, or null
  int64_t m;
  float scaling;
  int32_t r;
  int32_t first_tile;  // of the layer's ranks in `shrink.tiles`
};

struct DecodeParams {
  ShrinkParams shrink;  // its z are not used
  DecodeLayer layers[kMaxLayers];
  int32_t layer_count;
  Format basis_format;
  float* partial;  // decode_partial_floats(shrink) floats
};

int64_t decode_partial_floats(const ShrinkParams& params);

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
