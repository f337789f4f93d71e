#include "shrink_half.cuh"

namespace tfb::cuda {

cudaError_t launch_shrink_float16(const ShrinkParams& params, cudaStream_t stream) {
  return launch_shrink_half<__half>(params, stream);
}

}  // namespace tfb::cuda
