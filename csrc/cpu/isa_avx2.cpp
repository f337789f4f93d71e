// AVX2 with FMA, for Haswell, Zen 1 and later.
#include "kernels.h"

#if TFB_X86_DISPATCH

#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "../noise.h"

#define TFB_ISA avx2
#define TFB_REGISTER_BYTES 32
#include "isa_kernels.h"

namespace tfb::cpu {
const Kernels kAvx2Kernels = {"avx2",           avx2::noise_rows,  avx2::fill_panels,
                              avx2::shrink_run, avx2::sum_squares, avx2::reduce_rows,
                              avx2::expand_rows};
}  // namespace tfb::cpu

#endif
