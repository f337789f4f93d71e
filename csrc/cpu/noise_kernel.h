// The noise of eight rows in registers. Included per instruction set; see simd.h.

// Columns come in pairs of Philox blocks, so that one pass fills the widest register: 8 rows x 8 columns.
constexpr int kPassColumns = 8;

// Writes E[row0 .. row0 + 8][first_column .. first_column + columns) as out[column][8]. `first_column` is a multiple of four
// and `columns` of kPassColumns; columns past the matrix's edge are valid draws that nobody reads.
TFB_INLINE void noise_panel(float* out, int64_t first_column, int64_t columns, uint32_t row0, uint32_t sample,
                            const NoiseKey& key) {
  constexpr RegisterLanes lanes{};
  // A register of results holds places 0 .. kLanes-1; place p is row p % 8 of Philox block p / 8 (with four lanes: of block
  // `pass / 2`, rows 4 * (pass % 2) + p).
  constexpr int passes = 16 / kLanes;
  for (int pass = 0; pass < passes; ++pass) {
    const int place0 = pass * kLanes;
    WideVector row_a{}, row_b{}, block_a{}, block_b{};
    for (int lane = 0; lane < kWideLanes; ++lane) {
      const int place_a = place0 + packed_place(lane);
      const int place_b = place_a + 2;
      row_a[lane] = row0 + place_a % 8;
      row_b[lane] = row0 + place_b % 8;
      block_a[lane] = place_a / 8;
      block_b[lane] = place_b / 8;
    }
    const uint32_t block0 = static_cast<uint32_t>(first_column / 4);
    for (int64_t column = 0; column < columns; column += kPassColumns) {
      const uint64_t block = block0 + static_cast<uint64_t>(column / 4);
      WideVector a[4] = {block_a + block, row_a, WideVector{} + sample, WideVector{} + key.layer};
      WideVector b[4] = {block_b + block, row_b, WideVector{} + sample, WideVector{} + key.layer};
      philox_rounds(lanes, a, key.key0, key.key1);
      philox_rounds(lanes, b, key.key0, key.key1);
      FloatVector normal[4];
      const auto root = [](FloatVector x) __attribute__((always_inline)) { return square_root(x); };
      for (int pair = 0; pair < 4; pair += 2) {
        box_muller<FloatVector, WordVector, IntVector>(pack_low_words(a[pair], b[pair]),
                                                       pack_low_words(a[pair + 1], b[pair + 1]), root, normal[pair],
                                                       normal[pair + 1]);
      }
      for (int c = 0; c < 4; ++c) {
        constexpr int chunk = kLanes < 8 ? kLanes : 8;
        const float* values = reinterpret_cast<const float*>(&normal[c]);
        for (int part = 0; part < kLanes; part += chunk) {
          const int place = place0 + part;
          __builtin_memcpy(out + (column + 4 * (place / 8) + c) * kPanelRows + place % 8, values + part,
                           chunk * sizeof(float));
        }
      }
    }
  }
}

static void noise_rows(const NoiseParams& p) {
  constexpr int64_t block_columns = 256;
  alignas(64) float block[block_columns * kPanelRows];
  for (int64_t column0 = 0; column0 < p.n; column0 += block_columns) {
    const int64_t columns = p.n - column0 < block_columns ? p.n - column0 : block_columns;
    const int64_t padded = (columns + kPassColumns - 1) / kPassColumns * kPassColumns;
    noise_panel(block, column0, padded, static_cast<uint32_t>(p.row0), p.sample, p.key);
    for (int row = 0; row < p.rows; ++row) {
      float* out = p.out + (p.row0 + row) * p.n + column0;
      for (int64_t column = 0; column < columns; ++column) out[column] = p.sign * block[column * kPanelRows + row];
    }
  }
}
