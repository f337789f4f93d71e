// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11): the one source of
// random bits, compiled by the host compiler and by nvcc. The rounds are written over a `Lanes` trait, so that one
// scalar word, a GPU thread and a vector register of the CPU all run the same text.
#pragma once

#include <cstdint>

// TFB_EMULATOR: the CUDA kernels compiled for the CPU by tests/emulator.
#if defined(__CUDACC__)
#define TFB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TFB_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace tfb {

// The counter and the key, words in the order of the Random123 known-answer table.
struct PhiloxWords {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// One word at a time. `Wide` holds a 64-bit product; `low` and `high` give its halves.
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

// The noise counter's sample word and sign: with antithetic pairs sample 2k+1 is minus the noise of sample 2k.
TFB_HOST_DEVICE uint32_t noise_sample(uint32_t sample, bool antithetic) { return antithetic ? sample & ~1u : sample; }
TFB_HOST_DEVICE float noise_sign(uint32_t sample, bool antithetic) {
  return antithetic && (sample & 1u) != 0 ? -1.0f : 1.0f;
}

// Draws other than E come from the same generator under a key of their own: a constant xor-ed into its high word. The
// constants are leading bits of square roots (of 2, 5 and 7). `token` is a row's number within its group.
//   input signs (flipout)   counter (column / 128, token, sample, layer): bit column % 32 of word column % 128 / 32
//   rank signs (flipout)    counter (rank / 128, token, sample, layer): bit rank % 32 of word rank % 128 / 32
//   token normals           counter (rank / 4, token, sample, layer): place rank % 4 of Box-Muller's four
// A set bit means minus one.
constexpr uint32_t kInputSignKey = 0x6A09E667u;
constexpr uint32_t kRankSignKey = 0x3C6EF372u;
constexpr uint32_t kTokenKey = 0xA54FF53Au;
constexpr int kSignsPerCounter = 128;

TFB_HOST_DEVICE float sign_of(const PhiloxWords& words, uint32_t index) {
  const uint32_t place = index % 128 / 32;
  const uint32_t word = place == 0   ? words.word[0]
                        : place == 1 ? words.word[1]
                        : place == 2 ? words.word[2]
                                     : words.word[3];
  return (word >> index % 32 & 1u) != 0 ? -1.0f : 1.0f;
}

}  // namespace tfb
