// shrink in half precision, the kernel.
//
// Weights stand still and rows stream past. The columns are split into panels, one a block; the blocks of all panels
// share a range of rows, which they go through together, a tile of rows a warp at a time. A block makes its panel's
// weights, M + sigma E, when the first rows of a sample come, chunk by chunk between their products, and keeps them in
// shared memory for the sample's other rows: noise is made once a sample and range, not once a tile.
//
// Within 32 columns the order of k is permuted so that lane (i = lane / 4, c = lane % 4) owns columns 8c .. 8c + 7 of
// rows i and i + 8, one 16-byte read a row.
//
// The panels' sums of a row meet in the order of the panels: in distributed shared memory where the panels of a range
// are a cluster, else in global memory, where a second kernel adds them up.
#pragma once

#include "sample.cuh"
#include "shrink_rows.cuh"

namespace tfb::cuda {

// Where a stage's weights of one rank lie: [stage][piece][plane][rank][column].
template <class Traits>
__device__ __forceinline__ int weight_offset(int stage, int piece, int plane, int rank) {
  return (((stage * kStagePieces + piece) * Traits::kPlanes + plane) * Traits::kRanks + rank) * kPieceColumns;
}

// Makes M + scale E (in flipout mode M and E apart) of the block's ranks and of a stage's columns.
template <class Traits>
__device__ __forceinline__ void make_weights(const ShrinkParams& p, bool mean_aligned, const Sample& sample, int stage,
                                             int64_t column0, typename Traits::Element* weights) {
  using T = typename Traits::Element;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t column = column0 + 4 * lane;
  const int piece = lane / 8;
  const int place = 4 * (lane % 8);
#pragma unroll Traits::kWeightUnroll
  for (int rank0 = 0; rank0 < Traits::kRanks; rank0 += Traits::kWarps) {
    const int rank = rank0 + warp;  // of the block; the same for the whole warp
    if (Traits::kRanks % Traits::kWarps != 0 && rank >= Traits::kRanks) break;
    const int tile = rank / kTileRanks;
    const int row = rank % kTileRanks;
    float weight[4] = {};
    float normal[4] = {};
    if (tile < p.tile_count && row < p.tiles[tile].rows) {
      const Weights<T> mean{p.tiles[tile].mean, p.mean_format == Format::kFloat32, mean_aligned};
      mean.load(row * p.n + column, p.n - column, weight);
      if (Traits::kMode != Mode::kToken && sample.scale != 0.0f) {
        sample.draw(p.tiles[tile].layer, static_cast<uint32_t>(p.tiles[tile].row + row), column, normal);
      }
    }
    if constexpr (Traits::kMode == Mode::kWeight) {
#pragma unroll
      for (int k = 0; k < 4; ++k) weight[k] = fmaf(sample.scale, normal[k], weight[k]);
    }
    *reinterpret_cast<uint2*>(weights + weight_offset<Traits>(stage, piece, 0, rank) + place) =
        make_uint2(Pack<T>::pack(weight[0], weight[1]), Pack<T>::pack(weight[2], weight[3]));
    if constexpr (Traits::kMode == Mode::kFlipout) {
      *reinterpret_cast<uint2*>(weights + weight_offset<Traits>(stage, piece, 1, rank) + place) =
          make_uint2(Pack<T>::pack(normal[0], normal[1]), Pack<T>::pack(normal[2], normal[3]));
    }
  }
}

// Adds up the panels' sums of two ranks of a group's row `token`, finishes them for the mode and writes them to z.
template <class Traits, class Load>
__device__ __forceinline__ void store_pair(const ShrinkParams& p, const ShrinkLayout& layout, const Sample& sample,
                                           int64_t group, int64_t token, int rank, const Load& load) {
  using T = typename Traits::Element;
  float2 mean = make_float2(0.0f, 0.0f);
  float2 other = make_float2(0.0f, 0.0f);
  const int tile = rank / kTileRanks;
  if (tile >= p.tile_count) return;
  for (int member = 0; member < layout.panels; ++member) {
    const float2 part = load(member, rank);
    mean.x += part.x, mean.y += part.y;
    if constexpr (Traits::kMode == Mode::kFlipout) {
      const float2 more = load(member, Traits::kRanks + rank);
      other.x += more.x, other.y += more.y;
    }
    if constexpr (Traits::kMode == Mode::kToken) {
      const float2 more = load(member, Traits::kRanks);
      other.x += more.x, other.y += more.x;
    }
  }
  const RankTile& out = p.tiles[tile];
  const int place = rank % kTileRanks;
  const auto counter = static_cast<uint32_t>(token);
  const auto out_rank = static_cast<uint32_t>(out.row + place);
  mean.x = sample.template finish<Traits::kMode>(mean.x, other.x, out.layer, counter, out_rank);
  mean.y = sample.template finish<Traits::kMode>(mean.y, other.y, out.layer, counter, out_rank + 1);
  T* const z = static_cast<T*>(out.z) + row_of(map_of<Traits>(p, group), group, token) * out.z_stride + place;
  if (layout.z_aligned && place + 1 < out.rows) {
    *reinterpret_cast<uint32_t*>(z) = Pack<T>::pack(mean.x, mean.y);
  } else {
    if (place < out.rows) z[0] = Pack<T>::from_float(mean.x);
    if (place + 1 < out.rows) z[1] = Pack<T>::from_float(mean.y);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    shrink_kernel(const __grid_constant__ ShrinkParams p, const __grid_constant__ ShrinkLayout layout) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (Traits::kWarps > 4) return;  // for clusters, never launched: leave the rest out of the binary
#endif
  using T = typename Traits::Element;
  constexpr int kRankTiles = Traits::kRankTiles;
  constexpr int kPitch = Traits::kSumPitch;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  unsigned char* const shared = dynamic_shared();
  uint4* const queue = reinterpret_cast<uint4*>(shared) + warp * kShrinkStages * kStageChunks;
  float* const sums = reinterpret_cast<float*>(shared + Traits::kQueueBytes);
  T* const weights = reinterpret_cast<T*>(shared + Traits::kQueueBytes + layout.round_tiles * Traits::kTileSumBytes);

  const auto panel = static_cast<int>(blockIdx.x % layout.panels);
  const auto range = static_cast<int32_t>(blockIdx.x / layout.panels);
  const int32_t first = range_start(layout, range);
  const int32_t end = range_start(layout, range + 1);
  const int64_t column0 = static_cast<int64_t>(panel) * layout.panel_columns;
  const int64_t rest = p.n - column0;
  const int columns = rest <= 0 ? 0 : rest < layout.panel_columns ? static_cast<int>(rest) : layout.panel_columns;
  const int stages = (columns + kStageColumns - 1) / kStageColumns;

  Feeder<Traits> feeder(p, layout, queue, column0, columns, first, end);
  if (stages > 0) {
#pragma unroll
    for (int slot = 0; slot < kShrinkStages; ++slot) feeder.request(slot);
  }

  int slot = 0;
  int32_t group = -1;
  for (Round now(layout, first, end); now.count > 0; now.advance(layout, end)) {
    const bool fresh = now.group != group;
    group = now.group;
    const int64_t token0 = group * p.rows_per_group;
    const Sample sample(p, group);
    if (fresh && stages > 0) {
      __syncthreads();  // the weights of the sample before have served
      make_weights<Traits>(p, layout.mean_aligned, sample, 0, column0, weights);
      __syncthreads();
    }
    bool meeting = layout.clustered && now.tile != first;

    for (int index = warp; index < now.count || index == warp; index += Traits::kWarps) {
      const bool making = fresh && index == warp;  // weights, stage by stage, together with all other warps
      const bool busy = index < now.count;
      const int64_t tile_row = now.row(layout, index);  // within the group
      float sum[Traits::kPlanes][kRankTiles][4];
      float squares[2] = {};
#pragma unroll
      for (int plane = 0; plane < Traits::kPlanes; ++plane) {
#pragma unroll
        for (int q = 0; q < kRankTiles; ++q) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[plane][q][k] = 0.0f;
        }
      }

      for (int stage = 0; stage < stages; ++stage) {
        if (making && stage + 1 < stages) {
          make_weights<Traits>(p, layout.mean_aligned, sample, stage + 1, column0 + (stage + 1) * kStageColumns,
                               weights);
        }
        if constexpr (Traits::kFeed == Feed::kAsync) wait_copies<kShrinkStages - 1>();
        __syncwarp();
        if (busy) {
          uint32_t signs[2][kStagePieces];
          if constexpr (Traits::kMode == Mode::kFlipout) {
            // Lane c draws for the row of half c % 2; the four lanes of a row then read each other's.
            const auto token = static_cast<uint32_t>(tile_row + i + 8 * (c % 2));
            const auto block = static_cast<uint32_t>((column0 + stage * kStageColumns) / kSignsPerCounter);
            const PhiloxWords own = sample.input_signs(p.tiles[0].layer, token, block);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int piece = 0; piece < kStagePieces; ++piece) {
                signs[half][piece] = __shfl_sync(0xFFFFFFFFu, own.word[piece], 4 * i + half) >> 8 * c;
              }
            }
          }
          const uint4* const from = queue + slot * kStageChunks + row_chunk(i) + c;
          // Behind the last column the queue holds what lay there before.
          const int left = columns - stage * kStageColumns - 8 * c;
#pragma unroll
          for (int piece = 0; piece < kStagePieces; ++piece) {
            uint4 upper = from[4 * piece];
            uint4 lower = from[4 * kPairChunks + 4 * piece];
            if (left <= piece * kPieceColumns) upper = lower = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int plane = 0; plane < Traits::kPlanes; ++plane) {
              if (plane == 1) {
                upper = flip(upper, signs[0][piece]);
                lower = flip(lower, signs[1][piece]);
              }
#pragma unroll
              for (int q = 0; q < kRankTiles; ++q) {
                const int offset = weight_offset<Traits>(stage, piece, plane, kTileRanks * q + i) + 8 * c;
                const uint4 b = *reinterpret_cast<const uint4*>(weights + offset);
                multiply_16x8x16<T>(sum[plane][q], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
                multiply_16x8x16<T>(sum[plane][q], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
              }
            }
            if constexpr (Traits::kMode == Mode::kToken) {
              squares[0] = sum_of_squares<T>(upper, squares[0]);
              squares[1] = sum_of_squares<T>(lower, squares[1]);
            }
          }
        }
        __syncwarp();  // the whole warp has read the stage
        feeder.request(slot);
        if (++slot == kShrinkStages) slot = 0;
        if (making) __syncthreads();
      }

      // The tile's sums, for the blocks of the cluster or to global memory.
      if (meeting) cluster_wait();  // all have read the round before
      meeting = false;
      if (!busy) continue;
      if constexpr (Traits::kMode == Mode::kToken) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 1);
          squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 2);
        }
      }
      float* to = sums + index * kTileRows * kPitch;
      if (!layout.clustered) to = p.partial + (panel * rows_in_all(p) + token0 + tile_row) * kPitch;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i + 8 * half;
        if (tile_row + row >= rows_of<Traits>(p, group)) continue;
#pragma unroll
        for (int plane = 0; plane < Traits::kPlanes; ++plane) {
#pragma unroll
          for (int q = 0; q < kRankTiles; ++q) {
            *reinterpret_cast<float2*>(to + row * kPitch + plane * Traits::kRanks + kTileRanks * q + 2 * c) =
                make_float2(sum[plane][q][2 * half], sum[plane][q][2 * half + 1]);
          }
        }
        if (Traits::kMode == Mode::kToken && c == 0) to[row * kPitch + Traits::kRanks] = squares[half];
      }
    }
    if (!layout.clustered) continue;
    cluster_arrive();
    cluster_wait();
    constexpr int kPairs = Traits::kRanks / 2;
    const int64_t row0 = now.row(layout, 0);
    const int64_t left = rows_of<Traits>(p, group) - row0;
    const int rows = left < now.count * kTileRows ? static_cast<int>(left) : now.count * kTileRows;
    for (int e = panel * Traits::kThreads + threadIdx.x; e < rows * kPairs; e += layout.panels * Traits::kThreads) {
      const int row = e / kPairs;
      store_pair<Traits>(p, layout, sample, group, row0 + row, 2 * (e % kPairs),
                         [&](int member, int place) { return load_peer(sums + row * kPitch + place, member); });
    }
    cluster_arrive_reads();
  }
  if (layout.clustered && end > first) cluster_wait();  // no block leaves while another reads its sums
}

// z from the panels' sums in global memory.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    reduce_kernel(const __grid_constant__ ShrinkParams p, const ShrinkLayout layout) {
  constexpr int kPairs = Traits::kRanks / 2;
  const int64_t rows = rows_in_all(p);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
  const int64_t row = e / kPairs;
  if (row >= rows) return;
  const int64_t group = row < p.groups * p.rows_per_group ? row / p.rows_per_group : p.groups;
  const Sample sample(p, group);
  const float* const own = p.partial + row * Traits::kSumPitch;
  store_pair<Traits>(p, layout, sample, group, row - group * p.rows_per_group, static_cast<int>(2 * (e % kPairs)),
                     [&](int member, int place) {
                       return __ldcg(reinterpret_cast<const float2*>(own + member * rows * Traits::kSumPitch + place));
                     });
}

}  // namespace tfb::cuda
