// All kernels of one instruction set. The including file has set TFB_ISA, TFB_REGISTER_BYTES and the compiler's target;
// see simd.h.

namespace tfb::TFB_ISA {

using namespace tfb::cpu;

#include "convert.h"
#include "expand_kernel.h"
#include "noise_kernel.h"
#include "shrink_kernel.h"
#include "simd.h"

}  // namespace tfb::TFB_ISA
