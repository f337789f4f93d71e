// y += scaling z U^T. Included per instruction set; see simd.h.

template <class Type>
static void load_basis(const ExpandParams& p, float* transposed) {
  const int64_t columns = p.column1 - p.column0;
  const auto* basis = static_cast<const typename Type::Element*>(p.basis) + p.column0 * p.r;
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t i = 0; i < p.r; i += kLanes) {
      const int64_t count = p.r - i < kLanes ? p.r - i : kLanes;
      const FloatVector values = load_some<Type>(basis + column * p.r + i, count);
      for (int64_t lane = 0; lane < count; ++lane) transposed[(i + lane) * kExpandColumns + column] = values[lane];
    }
  }
  // Whole registers are read, so the columns past a ragged edge must be numbers.
  for (int64_t i = 0; i < p.r; ++i) {
    for (int64_t column = columns; column % kLanes != 0; ++column) transposed[i * kExpandColumns + column] = 0.0f;
  }
}

template <class Type, int tokens>
TFB_INLINE void expand_tile(const ExpandParams& p, const float* transposed, float* z, int64_t token) {
  for (int t = 0; t < tokens; ++t) {
    const auto* row = static_cast<const typename Type::Element*>(p.z) + (token + t) * p.z_stride;
    for (int64_t i = 0; i < p.r; i += kLanes) {
      const int64_t count = p.r - i < kLanes ? p.r - i : kLanes;
      const FloatVector values = p.scaling * load_some<Type>(row + i, count);
      for (int64_t lane = 0; lane < count; ++lane) z[(i + lane) * tokens + t] = values[lane];
    }
  }
  auto* y = static_cast<typename Type::Element*>(p.y) + token * p.y_stride + p.column0;
  const int64_t columns = p.column1 - p.column0;
  for (int64_t column = 0; column < columns; column += kLanes) {
    FloatVector sum[tokens] = {};
    for (int64_t i = 0; i < p.r; ++i) {
      const FloatVector direction = load_as<FloatVector>(transposed + i * kExpandColumns + column);
      for (int t = 0; t < tokens; ++t) sum[t] = multiply_add(z[i * tokens + t], direction, sum[t]);
    }
    const int64_t count = columns - column < kLanes ? columns - column : kLanes;
    for (int t = 0; t < tokens; ++t) {
      auto* target = y + t * p.y_stride + column;
      if (count == kLanes) Type::store(target, Type::load(target) + sum[t]);
      else store_some<Type>(target, load_some<Type>(target, count) + sum[t], count);
    }
  }
}

template <class Type>
static void expand_as(const ExpandParams& p) {
  float* transposed = p.scratch;
  float* z = transposed + p.r * kExpandColumns;
  if (p.basis_format == Format::kFloat32) load_basis<Float32>(p, transposed);
  else load_basis<Type>(p, transposed);
  int64_t token = p.token0;
  for (; token + kExpandTokens <= p.token1; token += kExpandTokens) {
    expand_tile<Type, kExpandTokens>(p, transposed, z, token);
  }
  for (; token < p.token1; ++token) expand_tile<Type, 1>(p, transposed, z, token);
}

static void expand_rows(const ExpandParams& p) {
  if (p.format == Format::kFloat32) expand_as<Float32>(p);
  else if (p.format == Format::kBFloat16) expand_as<BFloat16>(p);
  else expand_as<Float16>(p);
}
