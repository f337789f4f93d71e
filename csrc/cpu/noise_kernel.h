// The noise of eight rows in registers. Included per instruction set; see simd.h.

// Columns come in pairs of Philox blocks, so that one pass fills the widest register: 8 rows x 8 columns.
constexpr int kPassColumns = 8;
constexpr int kPasses = 16 / kLanes;

// A pass is one register of counters. Its lane p is place `place0 + p`, and place q is row q % 8 of Philox block q / 8
// of the eight columns: the widest register holds both blocks, the narrowest half of the rows of one. Its four words
// wait where its normals will lie: as four registers from here, this far apart.
constexpr int pass_offset(int place0) { return 4 * (place0 / 8) * kPanelRows + place0 % 8; }
constexpr int kWordPitch = kLanes < kPanelRows ? kPanelRows : kLanes;

TFB_INLINE void write_words(float* out, int64_t first_column, int64_t columns, uint32_t row0, uint32_t sample,
                            NoiseKey key, int place0) {
  constexpr RegisterLanes lanes{};
  WideVector row_a{}, row_b{}, block_a{}, block_b{};
  for (int lane = 0; lane < kWideLanes; ++lane) {
    const int place_a = place0 + packed_place(lane);
    const int place_b = place_a + 2;
    row_a[lane] = row0 + place_a % 8;
    row_b[lane] = row0 + place_b % 8;
    block_a[lane] = place_a / 8;
    block_b[lane] = place_b / 8;
  }
  for (int64_t column = 0; column < columns; column += kPassColumns) {
    const uint64_t block = static_cast<uint64_t>((first_column + column) / 4);
    WideVector a[4] = {block_a + block, row_a, WideVector{} + sample, WideVector{} + key.layer};
    WideVector b[4] = {block_b + block, row_b, WideVector{} + sample, WideVector{} + key.layer};
    philox_rounds(lanes, a, key.key0, key.key1);
    philox_rounds(lanes, b, key.key0, key.key1);
    float* words = out + column * kPanelRows + pass_offset(place0);
    for (int w = 0; w < 4; ++w) store_as(words + w * kWordPitch, pack_low_words(a[w], b[w]));
  }
}

TFB_INLINE void words_to_normals(float* out, int64_t columns, int place0) {
  constexpr int chunk = kLanes < kPanelRows ? kLanes : kPanelRows;
  const auto root = [](FloatVector x) __attribute__((always_inline)) { return square_root(x); };
  for (int64_t column = 0; column < columns; column += kPassColumns) {
    const float* words = out + column * kPanelRows + pass_offset(place0);
    WordVector word[4];
    FloatVector normal[4];
    for (int w = 0; w < 4; ++w) word[w] = load_as<WordVector>(words + w * kWordPitch);
    box_muller<FloatVector, WordVector, IntVector>(word[0], word[1], root, normal[0], normal[1]);
    box_muller<FloatVector, WordVector, IntVector>(word[2], word[3], root, normal[2], normal[3]);
    for (int c = 0; c < 4; ++c) {
      const float* values = reinterpret_cast<const float*>(&normal[c]);
      for (int part = 0; part < kLanes; part += chunk) {
        float* target = out + (column + c) * kPanelRows + pass_offset(place0 + part);
        __builtin_memcpy(target, values + part, chunk * sizeof(float));
      }
    }
  }
}

// Writes E[row0 .. row0 + 8][first_column .. first_column + columns) as out[column][8]. `first_column` is a multiple of
// four and `columns` of kPassColumns; columns past the matrix's edge are valid draws that nobody reads. The key comes
// by value: `out` might overlap a referenced one, and its schedule would be made anew for every register. The bits and
// the normals take a loop each: one chain through both is longer than a core looks ahead, two short ones overlap with
// their successors.
TFB_INLINE void noise_panel(float* out, int64_t first_column, int64_t columns, uint32_t row0, uint32_t sample,
                            NoiseKey key) {
  for (int pass = 0; pass < kPasses; ++pass) {
    write_words(out, first_column, columns, row0, sample, key, pass * kLanes);
  }
  for (int pass = 0; pass < kPasses; ++pass) words_to_normals(out, columns, pass * kLanes);
}

static void noise_rows(const NoiseParams& p) {
  constexpr int64_t block_columns = 256;
  alignas(64) float block[block_columns * kPanelRows];
  for (int64_t column0 = 0; column0 < p.n; column0 += block_columns) {
    const int64_t columns = p.n - column0 < block_columns ? p.n - column0 : block_columns;
    const int64_t padded = (columns + kPassColumns - 1) / kPassColumns * kPassColumns;
    noise_panel(block, column0, padded, static_cast<uint32_t>(p.row0), p.sample, p.key);
    for (int row = 0; row < p.rows; ++row) {
      float* out = p.out + row * p.n + column0;
      for (int64_t column = 0; column < columns; ++column) out[column] = p.sign * block[column * kPanelRows + row];
    }
  }
}
