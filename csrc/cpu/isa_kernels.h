// All kernels of one instruction set. The including file has set TFB_ISA, TFB_REGISTER_BYTES and the compiler's target;
// see simd.h.

namespace tfb::TFB_ISA {

using namespace tfb::cpu;

// Each of these stands on the ones before it; the blank lines keep the formatter from sorting them.
#include "simd.h"

#include "convert.h"

#include "noise_kernel.h"

#include "shrink_kernel.h"

#include "expand_kernel.h"

}  // namespace tfb::TFB_ISA
