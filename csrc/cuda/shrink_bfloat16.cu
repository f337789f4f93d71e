#include "shrink_half.cuh"

namespace tfb::cuda {

cudaError_t launch_shrink_bfloat16(const ShrinkParams& params, cudaStream_t stream) {
  return launch_shrink_half<__nv_bfloat16>(params, stream);
}

}  // namespace tfb::cuda
