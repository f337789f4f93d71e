#include "known_answer.h"

#include "../philox.h"
#include "device.cuh"

namespace tfb::cuda {

namespace {

__global__ void philox_kernel(const PhiloxParams p) {
  const PhiloxWords words = philox({{p.counter[0], p.counter[1], p.counter[2], p.counter[3]}}, p.key[0], p.key[1]);
  for (int k = 0; k < 4; ++k) p.out[k] = words.word[k];
}

}  // namespace

cudaError_t launch_philox(const PhiloxParams& params, cudaStream_t stream) {
  return launch(philox_kernel, {dim3(1), 1}, stream, params);
}

}  // namespace tfb::cuda
