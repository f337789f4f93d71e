// Loads and stores of kLanes elements of a tensor's type as float32. Included per instruction set; see simd.h.

struct Float32 {
  using Element = float;
  static constexpr Format kFormat = Format::kFloat32;
  TFB_INLINE FloatVector load(const float* source) { return load_as<FloatVector>(source); }
  TFB_INLINE void store(float* target, FloatVector value) { store_as(target, value); }
};

TFB_INLINE WordVector load_halves(const uint16_t* source) {
  return __builtin_convertvector(load_as<HalfVector>(source), WordVector);
}
TFB_INLINE void store_halves(uint16_t* target, WordVector bits) {
  store_as(target, __builtin_convertvector(bits, HalfVector));
}

struct BFloat16 {
  using Element = uint16_t;
  static constexpr Format kFormat = Format::kBFloat16;
  TFB_INLINE FloatVector load(const uint16_t* source) { return as_float(load_halves(source) << 16); }
  TFB_INLINE void store(uint16_t* target, FloatVector value) {
    const WordVector bits = as_words(value);
    const WordVector rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    store_halves(target, value == value ? rounded : WordVector{} + 0x7FC0);
  }
};

struct Float16 {
  using Element = uint16_t;
  static constexpr Format kFormat = Format::kFloat16;
  TFB_INLINE FloatVector load(const uint16_t* source) {
    const WordVector bits = load_halves(source);
    // The product with 2^112 moves the exponent and normalises subnormals exactly; exponent 31 is infinity or NaN.
    const FloatVector magnitude = as_float((bits & 0x7FFF) << 13) * 0x1p112f;
    const WordVector special = (bits & 0x7C00) == 0x7C00 ? WordVector{} + 0x7F800000u : WordVector{};
    return as_float(as_words(magnitude) | special | ((bits & 0x8000) << 16));
  }
  TFB_INLINE void store(uint16_t* target, FloatVector value) {
    const WordVector bits = as_words(value);
    const WordVector sign = (bits >> 16) & 0x8000;
    const WordVector magnitude = bits & 0x7FFFFFFF;
    const WordVector normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    // Adding one half puts the subnormal result, rounded to nearest even, into the low bits of the mantissa.
    const WordVector subnormal = as_words(as_float(magnitude) + 0.5f) - as_words(FloatVector{} + 0.5f);
    WordVector out = magnitude < (113u << 23) ? subnormal : normal;
    out = magnitude >= (143u << 23) ? WordVector{} + 0x7C00 : out;
    out = magnitude > 0x7F800000u ? WordVector{} + 0x7E00 : out;
    store_halves(target, out | sign);
  }
};

// A row's last, partial register goes through a copy, so that nothing outside the row is touched.
template <class Type>
TFB_INLINE FloatVector load_some(const typename Type::Element* source, int64_t count) {
  typename Type::Element copy[kLanes] = {};
  __builtin_memcpy(copy, source, static_cast<size_t>(count) * sizeof(copy[0]));
  return Type::load(copy);
}

template <class Type>
TFB_INLINE void store_some(typename Type::Element* target, FloatVector value, int64_t count) {
  typename Type::Element copy[kLanes];
  Type::store(copy, value);
  __builtin_memcpy(target, copy, static_cast<size_t>(count) * sizeof(copy[0]));
}
