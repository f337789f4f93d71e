// The contract between the ATen side of the CPU operators and the kernels, which are compiled once per instruction set.
// No torch header here: kernels are plain functions over pointers.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "../types.h"

namespace tfb::cpu {

// Weights are held in panels of eight rows: [row / 8][column][row % 8], rows padded with zeros to a multiple of eight.
constexpr int kPanelRows = 8;

// A slice is long enough to hide its partial sums and short enough to share a single sample among threads.
constexpr int64_t kSliceColumns = 1024;

inline int64_t panel_count(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

struct NoiseKey {
  uint32_t key0, key1;  // low and high word of the seed
  uint32_t layer;
};

// E for all columns of rows row0 .. row0 + rows (rows <= 8) of an (r, n) matrix.
struct NoiseParams {
  float* out;  // (rows, n), contiguous
  int64_t n;
  int64_t row0;
  int rows;
  NoiseKey key;
  uint32_t sample;
  float sign;
};

// Columns [column0, column1) of the (r, n) `mean` into panels that begin at column0.
struct PanelParams {
  const void* mean;
  Format format;
  float* panels;  // (panel_count(r), kSliceColumns, 8)
  int64_t r, n;
  int64_t column0, column1;
};

// Rows of one group that share one weight W = M + scale * E(sample).
struct Segment {
  const RowMap* map;  // of the group's rows in x
  int64_t group;
  int64_t token, rows;  // the first row's number within its group
  int64_t place;        // of the first row among the partial sums
  uint32_t sample;      // the counter's word
  float scale;          // sigma times the antithetic sign
};

// A run of segments that share E, over the columns [column0, column1): partial[t][i] = sum_j W[i][j] x[t][j].
struct ShrinkParams {
  const void* x;
  int64_t x_stride;  // elements between rows
  Format format;
  const float* panels;  // of these columns, as PanelParams leaves them
  int64_t r;
  NoiseKey key;
  bool signs;  // flipout's, of the inputs
  const Segment* segments;
  int64_t segment_count;
  int64_t column0, column1;
  float* partial;  // (T, 8 * panel_count(r)), of these columns
  float* scratch;  // shrink_scratch(r) floats, 64-byte aligned
};

// Columns that are generated, multiplied and forgotten together: E and W of all panels stay in the second-level cache.
inline int64_t shrink_block_columns(int64_t r) { return panel_count(r) <= 8 ? 256 : 64; }

constexpr int64_t kMaxTileTokens = 16;
constexpr int64_t kTilePitch = 256 + 16;  // floats between packed rows of x; not a multiple of the cache's set stride

inline int64_t panel_scratch(int64_t r) { return panel_count(r) * kPanelRows * kSliceColumns; }

inline int64_t shrink_scratch(int64_t r) {
  return 2 * panel_count(r) * kPanelRows * shrink_block_columns(r) + kMaxTileTokens * kTilePitch;
}

// out[t - token0] = |x[row of t]|^2 for a group's tokens [token0, token1).
struct SquaresParams {
  const void* x;
  int64_t x_stride, n;
  Format format;
  RowMap map;
  int64_t group;
  float* out;
  int64_t token0, token1;
};

// z[row of t][i] = sum of the slices' partials of place t in slice order (and `addend`), rounded once.
struct ReduceParams {
  CallRows rows;
  const float* partials;  // (slices, T, 8 * panel_count(r))
  const float* addend;    // (T, 8 * panel_count(r)), or null
  int64_t slices, tokens, r;
  void* z;  // (T, r), contiguous
  Format format;
  int64_t token0, token1;
};

// y[t][j] += scaling * sum_i z[t][i] basis[j][i] for tokens [token0, token1) and columns [column0, column1).
constexpr int64_t kExpandColumns = 256;
constexpr int64_t kExpandTokens = 4;

struct ExpandParams {
  void* y;
  int64_t y_stride;
  const void* z;
  int64_t z_stride;
  Format format;
  const void* basis;
  Format basis_format;
  int64_t r;
  float scaling;
  int64_t token0, token1;
  int64_t column0, column1;
  float* scratch;  // expand_scratch(r) floats, 64-byte aligned
};

inline int64_t expand_scratch(int64_t r) { return r * (kExpandColumns + kExpandTokens); }

struct Kernels {
  const char* name;
  void (*noise)(const NoiseParams&);
  void (*panels)(const PanelParams&);
  void (*shrink)(const ShrinkParams&);
  void (*squares)(const SquaresParams&);
  void (*reduce)(const ReduceParams&);
  void (*expand)(const ExpandParams&);
};

// One table an instruction set; see isa_*.cpp.
extern const Kernels kBaselineKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TFB_X86_DISPATCH 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The fastest table this machine runs, within what torch itself was told to use (ATEN_CPU_CAPABILITY).
const Kernels& kernels();

}  // namespace tfb::cpu
