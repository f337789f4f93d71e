// noise on CUDA: E of one (layer, sample), (r, n) float32, contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tfb::cuda {

struct NoiseParams {
  float* out;
  int64_t r, n;
  uint32_t key0, key1;  // low and high word of the seed
  uint32_t layer;
  uint32_t sample;  // the counter's word
  float sign;
};

cudaError_t launch_noise(const NoiseParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
