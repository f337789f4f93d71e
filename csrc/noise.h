// The noise, defined once and compiled by the host compiler and by nvcc: random bits by Philox4x32-10 (Salmon, Moraes,
// Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11), normals from them by Box-Muller.
//
// The key is the seed, low word first, with a constant xor-ed into its high word for draws other than E. `token` is a
// row's number within its group; of a sign's words a set bit means minus one.
//   draw                    key constant   counter                                place
//   E[row][column]          none           (column / 4, row, sample, layer)       normal column % 4
//   token normals           kTokenKey      (rank / 4, token, sample, layer)       normal rank % 4
//   input signs (flipout)   kInputSignKey  (column / 128, token, sample, layer)   bit column % 128 of the four words
//   rank signs (flipout)    kRankSignKey   (rank / 128, token, sample, layer)     bit rank % 128 of the four words
// With antithetic pairs the counter's sample is even, and E and the token normals of odd samples change their sign.
// tfb_ext/ops has the two numbers of the definition that only Python needs.
//
// Words (a, b) of a counter, and its words (c, d) likewise, give two normals:
//   radius = sqrt(-2 ln u_a),  angle = 2 pi u_b,  u = (w + 0.5) 2^-32;  first radius cos(angle), then radius
//   sin(angle).
// Device and host may differ by their fast arithmetic; each stays within 1e-5 of the contract evaluated in float64. Two
// places need care, because |z| goes to 6.7:
// * u near 1. float32(u) rounds to 1 and the square root amplifies the logarithm's absolute error. There both sides
//   start from v = 1 - u = (~w + 0.5) 2^-32, which float32 holds to full relative precision: -ln u = -log1p(-v).
// * the angle. In turns, t = int32(w) 2^-32 + 2^-33 lies in [-0.5, 0.5) and has the same sine and cosine as u_b.
#pragma once

#include <cstdint>

#include "types.h"

#if defined(TFB_EMULATOR)  // the CUDA kernels compiled for the CPU by tests/emulator
#include "emulator.h"
#endif

namespace tfb {

// Words in the order of the Random123 known-answer table.
struct PhiloxWords {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The rounds are written over a `Lanes` trait, so that one scalar word, a GPU thread and a vector register of the CPU
// all run the same text. `Wide` holds 64-bit products.
struct ScalarLanes {
  using Word = uint32_t;
  using Wide = uint64_t;
};

TFB_HOST_DEVICE uint64_t wide_multiply(ScalarLanes, uint32_t word, uint32_t multiplier) {
  return static_cast<uint64_t>(word) * multiplier;
}
TFB_HOST_DEVICE uint32_t low_word(ScalarLanes, uint64_t wide) { return static_cast<uint32_t>(wide); }
TFB_HOST_DEVICE uint32_t high_word(ScalarLanes, uint64_t wide) { return static_cast<uint32_t>(wide >> 32); }
TFB_HOST_DEVICE uint32_t xor3(ScalarLanes, uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
TFB_HOST_DEVICE uint32_t broadcast_word(ScalarLanes, uint32_t word) { return word; }

// Replaces the counter in `x` by the ten-round output under the key (key0, key1).
template <class Lanes>
TFB_HOST_DEVICE void philox_rounds(Lanes lanes, typename Lanes::Word (&x)[4], uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const typename Lanes::Wide product0 = wide_multiply(lanes, x[0], kPhiloxMultiplier0);
    const typename Lanes::Wide product1 = wide_multiply(lanes, x[2], kPhiloxMultiplier1);
    x[0] = xor3(lanes, high_word(lanes, product1), x[1], broadcast_word(lanes, key0));
    x[1] = low_word(lanes, product1);
    x[2] = xor3(lanes, high_word(lanes, product0), x[3], broadcast_word(lanes, key1));
    x[3] = low_word(lanes, product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

TFB_HOST_DEVICE PhiloxWords philox(const PhiloxWords& counter, uint32_t key0, uint32_t key1) {
  PhiloxWords out = counter;
  philox_rounds(ScalarLanes{}, out.word, key0, key1);
  return out;
}

// The counter's sample word and the draw's sign.
TFB_HOST_DEVICE uint32_t noise_sample(uint32_t sample, bool antithetic) { return antithetic ? sample & ~1u : sample; }
TFB_HOST_DEVICE float noise_sign(uint32_t sample, bool antithetic) {
  return antithetic && (sample & 1u) != 0 ? -1.0f : 1.0f;
}

// Leading bits of square roots (of 2, 5 and 7).
constexpr uint32_t kInputSignKey = 0x6A09E667u;
constexpr uint32_t kRankSignKey = 0x3C6EF372u;
constexpr uint32_t kTokenKey = 0xA54FF53Au;
constexpr int kSignsPerCounter = 128;

// The signs' bits from `index` to the end of their word, the first in the lowest bit.
TFB_HOST_DEVICE uint32_t sign_bits(const PhiloxWords& words, uint32_t index) {
  const uint32_t place = index % 128 / 32;
  const uint32_t word = place == 0   ? words.word[0]
                        : place == 1 ? words.word[1]
                        : place == 2 ? words.word[2]
                                     : words.word[3];
  return word >> index % 32;
}
TFB_HOST_DEVICE float sign_of(const PhiloxWords& words, uint32_t index) {
  return (sign_bits(words, index) & 1u) != 0 ? -1.0f : 1.0f;
}

constexpr float kTwoToMinus32 = 2.3283064365386963e-10f;
constexpr float kTwoToMinus33 = 1.1641532182693481e-10f;

#if defined(__CUDACC__) || defined(TFB_EMULATOR)

#if defined(TFB_EMULATOR)
inline float approximate_sqrt(float x) { return sqrtf(x); }
#else
__device__ __forceinline__ float approximate_sqrt(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
#endif

// lg2.approx is off by up to 2^-22 for u in (0.5, 2), so the radius by up to 2^-22 / radius. Below v = 2^-6 (radius
// 0.18) the series takes over; its first dropped term is v^3 / 4 <= 1e-6 of the sum.
constexpr uint32_t kSeriesBelow = 1u << 26;

__device__ __forceinline__ void box_muller(uint32_t word_a, uint32_t word_b, float& first, float& second) {
  const float u = fmaf(__uint2float_rn(word_a), kTwoToMinus32, kTwoToMinus33);
  const float v = fmaf(__uint2float_rn(~word_a), kTwoToMinus32, kTwoToMinus33);
  const float series = v * fmaf(v, fmaf(v, 2.0f / 3.0f, 1.0f), 2.0f);
  const float twice_log = ~word_a < kSeriesBelow ? series : -2.0f * __logf(u);
  const float radius = approximate_sqrt(twice_log);
  const float turns = fmaf(__int2float_rn(static_cast<int>(word_b)), kTwoToMinus32, kTwoToMinus33);
  const float angle = turns * 6.283185307179586f;
  first = radius * __cosf(angle);
  second = radius * __sinf(angle);
}

// The four normals of one counter: columns 4 * column_block + 0..3 of row `row`.
__device__ __forceinline__ void normals4(uint32_t column_block, uint32_t row, uint32_t sample, uint32_t layer,
                                         uint32_t key0, uint32_t key1, float (&out)[4]) {
  const PhiloxWords words = philox({{column_block, row, sample, layer}}, key0, key1);
  box_muller(words.word[0], words.word[1], out[0], out[1]);
  box_muller(words.word[2], words.word[3], out[2], out[3]);
}

#else

// -2 ln(1 + f) / f on [-0.25, 0.5], relative error 1.8e-7; sin(2 pi s) / s in s^2 on |s| <= 0.25, absolute
// error 3.4e-9. Both are minimax fits; tests/test_ops.py holds the result to the contract.
constexpr float kLogTerms[] = {-2.000000294e+00f, 1.000004305e+00f, -6.665952924e-01f, 4.995358186e-01f,
                               -4.021606699e-01f, 3.474444439e-01f, -2.826373146e-01f, 1.329212016e-01f};
constexpr float kSineTerms[] = {6.283185160e+00f, -4.134165503e+01f, 8.160100407e+01f, -7.654978229e+01f,
                                3.953670605e+01f};

// Branch-free over a register of lanes. Float, Word and Int are vectors of equally many 32-bit lanes; `root` takes the
// square root of a Float.
template <class Float, class Word, class Int, class Root>
TFB_HOST_DEVICE void box_muller(Word word_a, Word word_b, Root root, Float& first, Float& second) {
  // Upper half of the words: `half` is 1 - u, else u. Below 2^31 a signed conversion is exact about the sign on every
  // ISA.
  const Int upper = (Int)word_a >> 31;
  const Int folded = (Int)word_a ^ upper;
  const Float half = __builtin_convertvector(folded, Float) * kTwoToMinus32 + kTwoToMinus33;
  const Float u = upper ? 1.0f - half : half;
  // u = 2^exponent (1 + f) with 1 + f in [0.75, 1.5). An exponent of 0 means u >= 0.75, where f = -(1 - u) is `-half`.
  const Int bits = (Int)u;
  const Int exponent = (bits - 0x3F400000) >> 23;
  const Float mantissa = (Float)(bits - (exponent << 23));
  const Float f = exponent == 0 ? -half : mantissa - 1.0f;
  const Float f2 = f * f;
  const Float low = (f * kLogTerms[1] + kLogTerms[0]) + f2 * (f * kLogTerms[3] + kLogTerms[2]);
  const Float high = (f * kLogTerms[5] + kLogTerms[4]) + f2 * (f * kLogTerms[7] + kLogTerms[6]);
  const Float ratio = low + (f2 * f2) * high;
  const Float twice_log = __builtin_convertvector(exponent, Float) * -1.3862943611198906f + f * ratio;
  const Float radius = root(twice_log);

  // cos(2 pi t) = sin(2 pi c) with c = 1/4 - |t|, and sin(2 pi t) = sin(2 pi s) with s = sign(t) (1/4 - |c|).
  const Float turns = __builtin_convertvector((Int)word_b, Float) * kTwoToMinus32 + kTwoToMinus33;
  const Int sign = (Int)turns & INT32_MIN;
  const Float c = 0.25f - (Float)((Int)turns ^ sign);
  const Float folded_s = 0.25f - (Float)((Int)c & 0x7FFFFFFF);
  const Float s = (Float)((Int)folded_s ^ sign);
  const Float c2 = c * c;
  const Float s2 = s * s;
  const Float sine_c =
      ((((c2 * kSineTerms[4] + kSineTerms[3]) * c2 + kSineTerms[2]) * c2 + kSineTerms[1]) * c2 + kSineTerms[0]) * c;
  const Float sine_s =
      ((((s2 * kSineTerms[4] + kSineTerms[3]) * s2 + kSineTerms[2]) * s2 + kSineTerms[1]) * s2 + kSineTerms[0]) * s;
  first = radius * sine_c;
  second = radius * sine_s;
}

#endif

}  // namespace tfb
