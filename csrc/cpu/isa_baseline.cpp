// What the compiler assumes of every machine: SSE2 on x86-64, plain vector types elsewhere.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../noise.h"

#define TFB_ISA baseline
#define TFB_REGISTER_BYTES 16
#include "isa_kernels.h"

namespace tfb::cpu {
const Kernels kBaselineKernels = {"baseline",           baseline::noise_rows,  baseline::fill_panels,
                                  baseline::shrink_run, baseline::sum_squares, baseline::reduce_rows,
                                  baseline::expand_rows};
}  // namespace tfb::cpu
