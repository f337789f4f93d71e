#include "expand_half.cuh"

namespace tfb::cuda {

cudaError_t launch_expand_float16(const ExpandParams* params, int count, cudaStream_t stream) {
  return launch_expand_half<__half>(params, count, stream);
}

}  // namespace tfb::cuda
