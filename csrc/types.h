// What backends without torch headers see of the operators' arguments.
#pragma once

// For functions that the host compiler and nvcc share.
#if defined(__CUDACC__)
#define TFB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TFB_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace tfb {

// Element types.
enum class Format { kFloat32, kBFloat16, kFloat16 };

// How a sample's noise meets the tokens of its rows; the words are those of the operators' `mode` argument.
// kWeight:  z_t = (M + sigma E) x_t, one E for all tokens of a sample.
// kFlipout: z_t = M x_t + sigma r_t o (E (s_t o x_t)), Rademacher signs s_t (n) and r_t (r) fresh for every token.
// kToken:   z_t = M x_t + sigma |x_t| e_t, r normals e_t fresh for every token: the law of kWeight's for each token
// alone.
enum class Mode { kWeight, kFlipout, kToken };

}  // namespace tfb
