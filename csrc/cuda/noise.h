// noise on CUDA: E of one (layer, sample), (r, n) float32, contiguous; and the words of one counter, for the
// known-answer test.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
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

struct PhiloxParams {
  uint32_t counter[4];
  uint32_t key[2];
  uint32_t* out;  // four words on the device
};

cudaError_t launch_philox(const PhiloxParams& params, cudaStream_t stream);

// Runs on the current device and waits for the words.
std::array<uint32_t, 4> philox_on_device(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key);

}  // namespace tfb::cuda
