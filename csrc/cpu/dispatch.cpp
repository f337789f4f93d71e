// Chooses the instruction set once. torch's own choice is the upper bound, so ATEN_CPU_CAPABILITY holds for both.
#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace tfb::cpu {

namespace {

const Kernels& choose() {
#if TFB_X86_DISPATCH
  const std::string allowed = at::get_cpu_capability();
  if (allowed == "AVX512") return kAvx512Kernels;
  if (allowed == "AVX2") return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tfb::cpu
