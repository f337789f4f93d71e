#include "expand_half.cuh"

namespace tfb::cuda {

cudaError_t launch_expand_bfloat16(const ExpandParams* params, int count, cudaStream_t stream) {
  return launch_expand_half<__nv_bfloat16>(params, count, stream);
}

}  // namespace tfb::cuda
