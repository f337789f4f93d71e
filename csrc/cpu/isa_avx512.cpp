// AVX-512 with the extensions torch asks of it (F, DQ, BW, VL), for Skylake-SP, Zen 4 and later.
#include "kernels.h"

#if TFB_X86_DISPATCH

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
// GCC's own header starts "undefined" registers from themselves and then warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../noise.h"

#define TFB_ISA avx512
#define TFB_REGISTER_BYTES 64
#include "isa_kernels.h"

namespace tfb::cpu {
const Kernels kAvx512Kernels = {"avx512",           avx512::noise_rows,  avx512::fill_panels,
                                avx512::shrink_run, avx512::sum_squares, avx512::reduce_rows,
                                avx512::expand_rows};
}  // namespace tfb::cpu

#endif
