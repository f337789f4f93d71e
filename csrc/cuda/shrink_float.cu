// shrink in float32. tf32 would lose 13 bits of x, so the products are plain FMAs: a lane owns four columns, eight rows
// of x (four in flipout mode, whose sums are two) and eight ranks; a warp adds its lanes by a fixed butterfly, a block
// its warps through shared memory in order.
#include "elements.cuh"
#include "sample.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

namespace {

constexpr int kRank = kShrinkFloatRank;
constexpr int kThreads = kShrinkFloatWarps * kWarpLanes;
constexpr int kSums = kShrinkFloatTokens * kRank;
constexpr int kColumns = 4 * kWarpLanes;
static_assert(kSums == 2 * kWarpLanes, "the butterfly leaves two sums in each lane");
static_assert(kRank == kTileRanks);
static_assert(kColumns == kSignsPerCounter, "one counter's signs cover the columns of a warp");

// Adds each of 64 values over the warp. Every step hands half of a lane's values to its partner, so 62 exchanges do
// what 320 would; lane L ends with values 2L and 2L + 1 in places 0 and 1.
template <int kHalf = kSums / 2>
__device__ __forceinline__ void add_lanes(float (&value)[kSums], int lane) {
  constexpr int kOffset = kHalf / 2;
  const bool keeps_upper = lane & kOffset;
#pragma unroll
  for (int v = 0; v < kHalf; ++v) {
    const float kept = keeps_upper ? value[v + kHalf] : value[v];
    const float given = keeps_upper ? value[v] : value[v + kHalf];
    value[v] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kOffset);
  }
  if constexpr (kOffset > 1) add_lanes<kHalf / 2>(value, lane);
}

template <Mode kMode>
__global__ void __launch_bounds__(kThreads)
    shrink_float_kernel(const __grid_constant__ ShrinkParams p, bool x_aligned, bool mean_aligned) {
  constexpr int kPlanes = kMode == Mode::kFlipout ? 2 : 1;
  constexpr int kTokens = kShrinkFloatTokens / kPlanes;
  __shared__ float partial[kShrinkFloatWarps][kSums];  // [plane][token][rank]
  __shared__ float partial_squares[kShrinkFloatWarps][kShrinkFloatTokens];
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t tiles = (p.rows_per_group + kTokens - 1) / kTokens;
  const int64_t group = blockIdx.x / tiles;
  const int64_t tile_row = (blockIdx.x - group * tiles) * kTokens;
  const int64_t rows = p.rows_per_group - tile_row;
  const RankTile& tile = p.tiles[blockIdx.y];
  const Sample sample(p, group);
  const int64_t first_item = item_of(p.maps[0], tile_row);
  const int64_t place =
      tile_row - first_item * p.maps[0].each;  // of the tile's first row among its item's of the group
  const float* x = static_cast<const float*>(p.x) + row_of(p.maps[0], group, tile_row) * p.x_stride;
  const float* mean = static_cast<const float*>(tile.mean);

  float sum[kSums] = {};
  float squares[kTokens] = {};
  const int64_t chunks = (p.n + kColumns - 1) / kColumns;
  for (int64_t chunk = warp; chunk < chunks; chunk += kShrinkFloatWarps) {
    const int64_t column = chunk * kColumns + 4 * lane;
    const int64_t columns = p.n - column;
    float rows_of_x[kTokens][4];
    const float* row = x + column;
    int64_t next = place;
#pragma unroll
    for (int t = 0; t < kTokens; ++t, row += p.x_stride) {
      load_floats<4>(row, t < rows ? columns : 0, x_aligned, rows_of_x[t]);
      if (++next == p.maps[0].each) next = 0, row += p.maps[0].skip * p.x_stride;
    }
    uint32_t signs[kTokens];
    if constexpr (kMode == Mode::kFlipout) {
      const auto token = static_cast<uint32_t>(tile_row + lane % kTokens);
      const PhiloxWords own = sample.input_signs(tile.layer, token, static_cast<uint32_t>(chunk));
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) words[k] = __shfl_sync(0xFFFFFFFFu, own.word[k], t);
        const uint32_t word = lane < 16 ? (lane < 8 ? words[0] : words[1]) : (lane < 24 ? words[2] : words[3]);
        signs[t] = word >> 4 * (lane % 8);
      }
    }
#pragma unroll
    for (int q = 0; q < kRank; ++q) {
      float weight[4];
      float normal[4] = {};
      load_floats<4>(mean + q * p.n + column, q < tile.rows ? columns : 0, mean_aligned, weight);
      if (kMode != Mode::kToken && sample.scale != 0.0f) {
        sample.draw(tile.layer, static_cast<uint32_t>(tile.row + q), column, normal);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (kMode == Mode::kWeight) weight[k] = fmaf(sample.scale, normal[k], weight[k]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float value = rows_of_x[t][k];
          sum[t * kRank + q] = fmaf(value, weight[k], sum[t * kRank + q]);
          if constexpr (kMode == Mode::kFlipout) {
            const float flipped = (signs[t] >> k & 1u) != 0 ? -value : value;
            const int place = (kTokens + t) * kRank + q;
            sum[place] = fmaf(flipped, normal[k], sum[place]);
          }
        }
      }
    }
    if constexpr (kMode == Mode::kToken) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) squares[t] = fmaf(rows_of_x[t][k], rows_of_x[t][k], squares[t]);
      }
    }
  }

  add_lanes(sum, lane);
  partial[warp][2 * lane] = sum[0];
  partial[warp][2 * lane + 1] = sum[1];
  if constexpr (kMode == Mode::kToken) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
        squares[t] += __shfl_xor_sync(0xFFFFFFFFu, squares[t], offset);
      }
      if (lane == 0) partial_squares[warp][t] = squares[t];
    }
  }
  __syncthreads();
  if (threadIdx.x < kTokens * kRank) {
    const int row = threadIdx.x / kRank;
    const int rank = threadIdx.x % kRank;
    float total = 0.0f;
    float other = 0.0f;
#pragma unroll
    for (int w = 0; w < kShrinkFloatWarps; ++w) {
      total += partial[w][threadIdx.x];
      if constexpr (kMode == Mode::kFlipout) other += partial[w][kTokens * kRank + threadIdx.x];
      if constexpr (kMode == Mode::kToken) other += partial_squares[w][row];
    }
    if (row < rows && rank < tile.rows) {
      static_cast<float*>(tile.z)[row_of(p.maps[0], group, tile_row + row) * tile.z_stride + rank] =
          sample.template finish<kMode>(total, other, tile.layer, static_cast<uint32_t>(tile_row + row),
                                        static_cast<uint32_t>(tile.row + rank));
    }
  }
}

template <Mode kMode>
cudaError_t launch_mode(const ShrinkParams& p, cudaStream_t stream) {
  constexpr int kTokens = kShrinkFloatTokens / (kMode == Mode::kFlipout ? 2 : 1);
  const int64_t blocks = (p.rows_per_group + kTokens - 1) / kTokens * p.groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool x_aligned = is_aligned(p.x, 16) && p.x_stride % 4 == 0;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.tile_count)), kThreads};
  return launch(shrink_float_kernel<kMode>, shape, stream, p, x_aligned, means_aligned(p, 16));
}

}  // namespace

cudaError_t launch_shrink_float(const ShrinkParams& p, cudaStream_t stream) {
  if (p.mode == Mode::kFlipout) return launch_mode<Mode::kFlipout>(p, stream);
  if (p.mode == Mode::kToken) return launch_mode<Mode::kToken>(p, stream);
  return launch_mode<Mode::kWeight>(p, stream);
}

}  // namespace tfb::cuda
