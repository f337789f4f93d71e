#include "expand.h"

namespace tfb::cuda {

cudaError_t launch_expand(const ExpandParams& params, cudaStream_t stream) {
  if (params.format == Format::kFloat32) return launch_expand_float(params, stream);
  if (params.format == Format::kBFloat16) return launch_expand_bfloat16(params, stream);
  return launch_expand_float16(params, stream);
}

}  // namespace tfb::cuda
