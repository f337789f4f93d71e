// z_t = (M + sigma E) x_t with E made in cache-sized blocks. Included per instruction set; see simd.h.

// Tokens whose accumulators fit the registers beside one weight vector (and, without AVX-512, one broadcast).
#if TFB_REGISTER_BYTES == 64
constexpr int kTileTokens = 16;
#elif TFB_REGISTER_BYTES == 32
constexpr int kTileTokens = 12;
#else
constexpr int kTileTokens = 4;
#endif

template <class Type>
static void fill_panels_as(const PanelParams& p) {
  for (int64_t panel = 0; panel < panel_count(p.r); ++panel) {
    const int64_t row0 = panel * kPanelRows;
    for (int64_t row = row0; row < row0 + kPanelRows; ++row) {
      float* out = p.panels + panel * kSliceColumns * kPanelRows + row % kPanelRows;
      const auto* mean = static_cast<const typename Type::Element*>(p.mean) + row * p.n;
      for (int64_t column = p.column0; column < p.column1; column += kLanes) {
        const int64_t count = p.column1 - column < kLanes ? p.column1 - column : kLanes;
        const FloatVector values = row < p.r ? load_some<Type>(mean + column, count) : FloatVector{};
        for (int64_t lane = 0; lane < count; ++lane) out[(column - p.column0 + lane) * kPanelRows] = values[lane];
      }
    }
  }
}

static void fill_panels(const PanelParams& p) {
  if (p.format == Format::kFloat32) fill_panels_as<Float32>(p);
  else if (p.format == Format::kBFloat16) fill_panels_as<BFloat16>(p);
  else fill_panels_as<Float16>(p);
}

// sums[t][0..8) (+)= sum_j x[t][j] weights[j][0..8), j ascending for every token whatever the tile holds beside it.
template <int tokens>
TFB_INLINE void multiply_tile(const float* x, const float* weights, int64_t columns, float* sums, int64_t pitch,
                              bool accumulate) {
  Rows8 sum[tokens];
  for (int t = 0; t < tokens; ++t) sum[t] = accumulate ? load_as<Rows8>(sums + t * pitch) : Rows8{};
  for (int64_t j = 0; j < columns; ++j) {
    const Rows8 weight = load_as<Rows8>(weights + j * kPanelRows);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) sum[t] = multiply_add(x[t * kTilePitch + j], weight, sum[t]);
  }
  for (int t = 0; t < tokens; ++t) store_as(sums + t * pitch, sum[t]);
}

template <class Type>
TFB_INLINE void pack_rows(float* packed, const typename Type::Element* x, int64_t stride, const Segment& segment,
                          int64_t first, int64_t rows, int64_t columns) {
  for (int64_t t = 0; t < rows; ++t) {
    const auto* row = x + row_of(*segment.map, segment.group, segment.token + first + t) * stride;
    float* out = packed + t * kTilePitch;
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) store_as(out + column, Type::load(row + column));
    if (column < columns) store_as(out + column, load_some<Type>(row + column, columns - column));
  }
}

// Flips the signs of packed rows where flipout's bits say so; the rows are tokens token0 .. of their group.
TFB_INLINE void flip_rows(float* packed, int64_t rows, int64_t token0, int64_t column0, int64_t columns,
                          uint32_t sample, NoiseKey key) {
  static_assert(kLanes <= 32, "a register's signs lie in one word");
  WordVector place{};
  for (int lane = 0; lane < kLanes; ++lane) place[lane] = lane;
  for (int64_t t = 0; t < rows; ++t) {
    PhiloxWords words{};
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t bit = column0 + column;
      if (column == 0 || bit % kSignsPerCounter == 0) {
        words = philox(
            {{static_cast<uint32_t>(bit / kSignsPerCounter), static_cast<uint32_t>(token0 + t), sample, key.layer}},
            key.key0, key.key1 ^ kInputSignKey);
      }
      const WordVector signs = (words.word[bit % kSignsPerCounter / 32] >> (place + static_cast<uint32_t>(bit % 32)))
                               << 31;
      float* target = packed + t * kTilePitch + column;
      store_as(target, as_words(load_as<FloatVector>(target)) ^ signs);
    }
  }
}

// One tile of `tokens` rows against every panel.
struct TileParams {
  const float* packed;
  const float* weights;
  int64_t panels, panel_pitch;  // floats between panels of `weights`
  int64_t columns;
  float* sums;
  int64_t pitch;
  bool accumulate;
};

template <int tokens>
TFB_INLINE void multiply_panels(const TileParams& p) {
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    multiply_tile<tokens>(p.packed, p.weights + panel * p.panel_pitch, p.columns, p.sums + panel * kPanelRows, p.pitch,
                          p.accumulate);
  }
}

template <class Type>
static void shrink_as(const ShrinkParams& p) {
  const int64_t panels = panel_count(p.r);
  const int64_t pitch = panels * kPanelRows;
  const int64_t block_columns = shrink_block_columns(p.r);
  const int64_t block_pitch = block_columns * kPanelRows;
  float* noise = p.scratch;
  float* weights = noise + panels * block_pitch;
  float* packed = weights + panels * block_pitch;
  const auto* x = static_cast<const typename Type::Element*>(p.x);

  for (int64_t column0 = p.column0; column0 < p.column1; column0 += block_columns) {
    const int64_t columns = p.column1 - column0 < block_columns ? p.column1 - column0 : block_columns;
    const int64_t padded = (columns + kPassColumns - 1) / kPassColumns * kPassColumns;
    bool generated = false;
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const Segment& segment = p.segments[s];
      TileParams tile{packed,  p.panels + (column0 - p.column0) * kPanelRows,
                      panels,  kSliceColumns * kPanelRows,
                      columns, nullptr,
                      pitch,   column0 > p.column0};
      if (segment.scale != 0.0f) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          float* panel_noise = noise + panel * block_pitch;
          float* panel_weights = weights + panel * block_pitch;
          const float* panel_mean = p.panels + (panel * kSliceColumns + column0 - p.column0) * kPanelRows;
          if (!generated) {
            noise_panel(panel_noise, column0, padded, static_cast<uint32_t>(panel * kPanelRows), segment.sample, p.key);
          }
          for (int64_t j = 0; j < columns * kPanelRows; j += kPanelRows) {
            store_as(panel_weights + j,
                     multiply_add(segment.scale, load_as<Rows8>(panel_noise + j), load_as<Rows8>(panel_mean + j)));
          }
        }
        generated = true;
        tile.weights = weights;
        tile.panel_pitch = block_pitch;
      }
      for (int64_t row = 0; row < segment.rows;) {
        const int64_t left = segment.rows - row;
        const int tokens = left >= kTileTokens ? kTileTokens : left >= 8 && kTileTokens > 8 ? 8 : left >= 4 ? 4 : 1;
        pack_rows<Type>(packed, x + column0, p.x_stride, segment, row, tokens, columns);
        if (p.signs) flip_rows(packed, tokens, segment.token + row, column0, columns, segment.sample, p.key);
        tile.sums = p.partial + (segment.place + row) * pitch;
        if (tokens == kTileTokens) multiply_panels<kTileTokens>(tile);
        else if (tokens == 8) multiply_panels<8>(tile);
        else if (tokens == 4) multiply_panels<4>(tile);
        else multiply_panels<1>(tile);
        row += tokens;
      }
    }
  }
}

static void shrink_run(const ShrinkParams& p) {
  if (p.format == Format::kFloat32) shrink_as<Float32>(p);
  else if (p.format == Format::kBFloat16) shrink_as<BFloat16>(p);
  else shrink_as<Float16>(p);
}

template <class Type>
static void sum_squares_as(const SquaresParams& p) {
  for (int64_t t = p.token0; t < p.token1; ++t) {
    const auto* row = static_cast<const typename Type::Element*>(p.x) + row_of(p.map, p.group, t) * p.x_stride;
    FloatVector sum{};
    for (int64_t column = 0; column < p.n; column += kLanes) {
      const int64_t count = p.n - column < kLanes ? p.n - column : kLanes;
      const FloatVector values = count == kLanes ? Type::load(row + column) : load_some<Type>(row + column, count);
      sum += values * values;
    }
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    p.out[t - p.token0] = total;
  }
}

static void sum_squares(const SquaresParams& p) {
  if (p.format == Format::kFloat32) sum_squares_as<Float32>(p);
  else if (p.format == Format::kBFloat16) sum_squares_as<BFloat16>(p);
  else sum_squares_as<Float16>(p);
}

template <class Type>
static void reduce_as(const ReduceParams& p) {
  const int64_t pitch = panel_count(p.r) * kPanelRows;
  for (int64_t t = p.token0; t < p.token1; ++t) {
    auto* z = static_cast<typename Type::Element*>(p.z) + p.rows.row_of_place(t) * p.r;
    for (int64_t i = 0; i < p.r; i += kPanelRows) {
      Rows8 sum = load_as<Rows8>(p.partials + t * pitch + i);
      for (int64_t slice = 1; slice < p.slices; ++slice) {
        sum += load_as<Rows8>(p.partials + (slice * p.tokens + t) * pitch + i);
      }
      if (p.addend != nullptr) sum += load_as<Rows8>(p.addend + t * pitch + i);
      float values[kPanelRows + kLanes] = {};
      store_as(values, sum);
      const int64_t count = p.r - i < kPanelRows ? p.r - i : kPanelRows;
      for (int64_t done = 0; done < count; done += kLanes) {
        const int64_t some = count - done < kLanes ? count - done : kLanes;
        store_some<Type>(z + i + done, load_as<FloatVector>(values + done), some);
      }
    }
  }
}

static void reduce_rows(const ReduceParams& p) {
  if (p.format == Format::kFloat32) reduce_as<Float32>(p);
  else if (p.format == Format::kBFloat16) reduce_as<BFloat16>(p);
  else reduce_as<Float16>(p);
}
