// Vector registers of one instruction set, as the kernels see them. This header has no include guard on purpose: each
// isa_*.cpp includes the kernels once, inside namespace tfb::TFB_ISA and under its own target, so no symbol is shared
// between instruction sets. Arithmetic goes through the compiler's vector types; only what those cannot say is here.
// TFB_REGISTER_BYTES (64 AVX-512, 32 AVX2, 16 anything) comes from the including file: GCC's C++ front end reads the
// file before it obeys a target pragma, so __AVX512F__ and its like do not tell.

constexpr int kRegisterBytes = TFB_REGISTER_BYTES;
constexpr int kLanes = kRegisterBytes / 4;
constexpr int kWideLanes = kRegisterBytes / 8;

typedef float FloatVector __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t WordVector __attribute__((vector_size(kRegisterBytes)));
typedef int32_t IntVector __attribute__((vector_size(kRegisterBytes)));
typedef uint64_t WideVector __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfVector __attribute__((vector_size(kRegisterBytes / 2)));
// Eight rows of the noise, the unit in which weights are laid out for every instruction set.
typedef float Rows8 __attribute__((vector_size(32)));

#define TFB_INLINE static inline __attribute__((always_inline))

template <class To, class From>
TFB_INLINE To load_as(const From* source) {
  To value;
  __builtin_memcpy(&value, source, sizeof(To));
  return value;
}

template <class Value, class To>
TFB_INLINE void store_as(To* target, Value value) {
  __builtin_memcpy(target, &value, sizeof(Value));
}

TFB_INLINE FloatVector as_float(WordVector bits) { return (FloatVector)bits; }
TFB_INLINE WordVector as_words(FloatVector value) { return (WordVector)value; }

// scale * values + sum with one rounding wherever the instruction set has it. Left to the compiler, a loop over one
// token and a loop over sixteen may be contracted differently, and a row's last bit would depend on the rows beside it.
TFB_INLINE Rows8 multiply_add(float scale, Rows8 values, Rows8 sum) {
#if TFB_REGISTER_BYTES >= 32
  return (Rows8)_mm256_fmadd_ps(_mm256_set1_ps(scale), (__m256)values, (__m256)sum);
#else
  return scale * values + sum;
#endif
}
#if TFB_REGISTER_BYTES == 64
TFB_INLINE FloatVector multiply_add(float scale, FloatVector values, FloatVector sum) {
  return (FloatVector)_mm512_fmadd_ps(_mm512_set1_ps(scale), (__m512)values, (__m512)sum);
}
#elif TFB_REGISTER_BYTES != 32  // with 32, FloatVector is Rows8
TFB_INLINE FloatVector multiply_add(float scale, FloatVector values, FloatVector sum) { return scale * values + sum; }
#endif

// Philox over kWideLanes counters, one word in the low half of each 64-bit lane. The upper halves hold leftovers that
// the widening multiply never reads, which saves the masks and blends of a packed layout.
struct RegisterLanes {
  using Word = WideVector;
  using Wide = WideVector;
};

TFB_INLINE WideVector low_word(RegisterLanes, WideVector wide) { return wide; }
TFB_INLINE WideVector high_word(RegisterLanes, WideVector wide) { return wide >> 32; }
TFB_INLINE WideVector broadcast_word(RegisterLanes, uint32_t word) {
  return WideVector{} + static_cast<uint64_t>(word);
}

#if TFB_REGISTER_BYTES == 64
TFB_INLINE WideVector wide_multiply(RegisterLanes, WideVector word, uint32_t multiplier) {
  return (WideVector)_mm512_mul_epu32((__m512i)word, _mm512_set1_epi64(multiplier));
}
TFB_INLINE WideVector xor3(RegisterLanes, WideVector a, WideVector b, WideVector c) {
  return (WideVector)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
TFB_INLINE WordVector pack_low_words(WideVector a, WideVector b) {
  return (WordVector)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
}
TFB_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm512_sqrt_ps((__m512)x); }
#elif TFB_REGISTER_BYTES == 32
TFB_INLINE WideVector wide_multiply(RegisterLanes, WideVector word, uint32_t multiplier) {
  return (WideVector)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x(multiplier));
}
TFB_INLINE WideVector xor3(RegisterLanes, WideVector a, WideVector b, WideVector c) { return a ^ b ^ c; }
TFB_INLINE WordVector pack_low_words(WideVector a, WideVector b) {
  return (WordVector)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
}
TFB_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm256_sqrt_ps((__m256)x); }
#elif defined(__SSE2__)
TFB_INLINE WideVector wide_multiply(RegisterLanes, WideVector word, uint32_t multiplier) {
  return (WideVector)_mm_mul_epu32((__m128i)word, _mm_set1_epi64x(multiplier));
}
TFB_INLINE WideVector xor3(RegisterLanes, WideVector a, WideVector b, WideVector c) { return a ^ b ^ c; }
TFB_INLINE WordVector pack_low_words(WideVector a, WideVector b) {
  return (WordVector)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88);
}
TFB_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm_sqrt_ps((__m128)x); }
#else
TFB_INLINE WideVector wide_multiply(RegisterLanes, WideVector word, uint32_t multiplier) {
  return (word & 0xFFFFFFFFull) * static_cast<uint64_t>(multiplier);
}
TFB_INLINE WideVector xor3(RegisterLanes, WideVector a, WideVector b, WideVector c) { return a ^ b ^ c; }
TFB_INLINE WordVector pack_low_words(WideVector a, WideVector b) {
  return WordVector{static_cast<uint32_t>(a[0]), static_cast<uint32_t>(a[1]), static_cast<uint32_t>(b[0]),
                    static_cast<uint32_t>(b[1])};
}
TFB_INLINE FloatVector square_root(FloatVector x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
#endif

// pack_low_words takes 64-bit lanes 2p and 2p+1 of each source to dwords 4p.. and 4p+2..: this is the place
// (0..kLanes-1) that lane `lane` of the first source ends up in; the second source's is two further on.
constexpr int packed_place(int lane) { return 4 * (lane / 2) + lane % 2; }
