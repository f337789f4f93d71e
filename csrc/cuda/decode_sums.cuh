// decode's units: the sums of one sample's rows over 512 columns for eight ranks, by a block.
#pragma once

#include "elements.cuh"
#include "sample.cuh"
#include "tuning.h"

namespace tfb::cuda {

constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;

// Floats of one row of a unit: eight sums, and eight of the noise (flipout) or the squares (token, padded).
template <Mode kMode>
constexpr int kUnitPitch = kMode == Mode::kWeight ? kTileRanks : 2 * kTileRanks;

// Units that a block takes at a time at most. In token mode there is no E to share.
template <Mode kMode>
constexpr int kSharing = kMode == Mode::kToken ? 1 : 2;

// Floats of a unit's sums in shared memory: each warp's.
template <Mode kMode>
constexpr int kUnitFloats = kDecodeWarps * kTileRows * kUnitPitch<kMode>;

struct DecodeLayout {
  int64_t slices, units;
  int32_t block_units, longer_blocks;  // units of a block; blocks that have one more
  int64_t output_units;                // of 64 columns, all layers
  bool x_aligned, mean_aligned, basis_aligned;
};

// One tile's sums over a warp's columns: rows 0 .. 15 of a group, eight ranks.
template <class T>
struct Sums {
  // d0, d1: row i, ranks 2c, 2c + 1; d2, d3: row i + 8.
  float value[4] = {};
  __device__ __forceinline__ void add(uint4 upper, uint4 lower, const float (&weight)[8]) {
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) b[k] = Pack<T>::pack(weight[2 * k], weight[2 * k + 1]);
    multiply_16x8x16<T>(value, upper.x, lower.x, upper.y, lower.y, b[0], b[1]);
    multiply_16x8x16<T>(value, upper.z, lower.z, upper.w, lower.w, b[2], b[3]);
  }
  __device__ __forceinline__ void store(float* row0, int pitch, int i, int c) const {
    *reinterpret_cast<float2*>(row0 + i * pitch + 2 * c) = make_float2(value[0], value[1]);
    *reinterpret_cast<float2*>(row0 + (i + 8) * pitch + 2 * c) = make_float2(value[2], value[3]);
  }
};

// The share of one warp in a unit and, where the next one draws the same E (`both`), in that; half precision. The rows
// of a next one that is there (`more`) are asked for before it is known what it draws.
template <class T, Mode kMode>
__device__ __forceinline__ void sum_columns(const ShrinkParams& p, const DecodeLayout& layout, const RankTile& tile,
                                            const Sample& sample, float next_scale, bool more, bool both, int64_t group,
                                            int64_t column0, float* out) {
  constexpr int kPitch = kUnitPitch<kMode>;
  constexpr int kUnits = kSharing<kMode>;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const T* const x = static_cast<const T*>(p.x);
  const Weights<T> mean{tile.mean, p.mean_format == Format::kFloat32, layout.mean_aligned};
  Sums<T> sums[kUnits], noise[kUnits];
  float squares[2] = {};
#pragma unroll
  for (int piece = 0; piece < kDecodeWarpColumns / kPieceColumns; ++piece) {
    const int64_t column = column0 + piece * kPieceColumns + 8 * c;
    const int64_t columns = p.n - column;
    uint4 rows[kUnits][2];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i + 8 * half;
        const T* const from = x + row_of(p.maps[0], group + u, row) * p.x_stride + column;
        rows[u][half] = load_eight(from, row < p.rows_per_group && (u == 0 || more) ? columns : 0, layout.x_aligned);
      }
    }
    float weight[8];
    mean.load(i * p.n + column, i < tile.rows ? columns : 0, weight);
    float normal[2][4] = {};
    if (kMode != Mode::kToken && (sample.scale != 0.0f || both)) {
      sample.draw(tile.layer, static_cast<uint32_t>(tile.row + i), column, normal[0]);
      sample.draw(tile.layer, static_cast<uint32_t>(tile.row + i), column + 4, normal[1]);
    }
    uint32_t signs[2];
    if constexpr (kMode == Mode::kFlipout) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PhiloxWords words = sample.input_signs(tile.layer, static_cast<uint32_t>(i + 8 * half),
                                                     static_cast<uint32_t>(column / kSignsPerCounter));
        signs[half] = sign_bits(words, static_cast<uint32_t>(column % kSignsPerCounter));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u > 0 && !both) break;
      float own[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float scale = u == 0 ? sample.scale : next_scale;
        own[k] = kMode == Mode::kWeight ? fmaf(scale, normal[k / 4][k % 4], weight[k]) : weight[k];
      }
      sums[u].add(rows[u][0], rows[u][1], own);
      if constexpr (kMode == Mode::kFlipout) {
#pragma unroll
        for (int k = 0; k < 8; ++k) own[k] = normal[k / 4][k % 4];
        noise[u].add(flip(rows[u][0], signs[0]), flip(rows[u][1], signs[1]), own);
      }
    }
    if constexpr (kMode == Mode::kToken) {
#pragma unroll
      for (int half = 0; half < 2; ++half) squares[half] = sum_of_squares<T>(rows[0][half], squares[half]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u > 0 && !both) break;
    float* const own = out + u * kUnitFloats<kMode>;
    sums[u].store(own, kPitch, i, c);
    if constexpr (kMode == Mode::kFlipout) noise[u].store(own + kTileRanks, kPitch, i, c);
  }
  if constexpr (kMode == Mode::kToken) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 1);
      squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 2);
      if (c == 0) out[(i + 8 * half) * kPitch + kTileRanks] = squares[half];
    }
  }
}

// The sums of one unit over its block's warps, in order, to global memory.
template <Mode kMode>
__device__ __forceinline__ void store_unit(const float (*sums)[kTileRows][kUnitPitch<kMode>], float* target,
                                           int64_t rows) {
  constexpr int kPitch = kUnitPitch<kMode>;
  constexpr int kUsed = kMode == Mode::kToken ? kTileRanks + 1 : kPitch;
  for (int e = threadIdx.x; e < rows * kPitch; e += kDecodeThreads) {
    const int row = e / kPitch;
    const int place = e % kPitch;
    if (place >= kUsed) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[w][row][place];
    target[e] = total;
  }
}

}  // namespace tfb::cuda
