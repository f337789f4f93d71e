#include "noise.h"

#include "../noise.h"
#include "device.cuh"
#include "tuning.h"

namespace tfb::cuda {

namespace {

// One thread makes the four columns of one Philox counter; blockIdx.y walks the rows.
__global__ void __launch_bounds__(kNoiseThreads) noise_kernel(const NoiseParams p) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x;
  const int64_t column = 4 * block;
  if (column >= p.n) return;
  for (int64_t row = blockIdx.y; row < p.r; row += gridDim.y) {
    float value[4];
    normals4(static_cast<uint32_t>(block), static_cast<uint32_t>(row), p.sample, p.layer, p.key0, p.key1, value);
    float* out = p.out + row * p.n + column;
    if (p.n % 4 == 0) {
      *reinterpret_cast<float4*>(out) =
          make_float4(p.sign * value[0], p.sign * value[1], p.sign * value[2], p.sign * value[3]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (column + k < p.n) out[k] = p.sign * value[k];
      }
    }
  }
}

// For the known-answer test.
__global__ void philox_kernel(const PhiloxParams p) {
  const PhiloxWords words = philox({{p.counter[0], p.counter[1], p.counter[2], p.counter[3]}}, p.key[0], p.key[1]);
  for (int k = 0; k < 4; ++k) p.out[k] = words.word[k];
}

}  // namespace

cudaError_t launch_noise(const NoiseParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.n + 4 * kNoiseThreads - 1) / (4 * kNoiseThreads);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.r < kMaxGridY ? params.r : kMaxGridY));
  return launch(noise_kernel, {grid, kNoiseThreads}, stream, params);
}

cudaError_t launch_philox(const PhiloxParams& params, cudaStream_t stream) {
  return launch(philox_kernel, {dim3(1), 1}, stream, params);
}

}  // namespace tfb::cuda
