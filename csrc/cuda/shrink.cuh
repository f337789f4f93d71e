// shrink in half precision, the kernel and its launch; shrink_bfloat16.cu and shrink_float16.cu instantiate it.
//
// Weights stand still and rows stream past. The columns are split into panels, one a block; the blocks of all panels
// share a range of rows, which they go through together, a tile of rows a warp at a time. A block makes its panel's
// weights, M + sigma E, when the first rows of a sample come, chunk by chunk between their products, and keeps them in
// shared memory for the sample's other rows: noise is made once a sample and range, not once a tile.
//
// Each warp has a queue of stages of x in shared memory, its own: no block-wide barrier stands between the copies and
// the products. Within 32 columns the order of k is permuted so that lane (i = lane / 4, c = lane % 4) owns columns 8c
// .. 8c + 7 of rows i and i + 8, one 16-byte read a row.
//
// The panels' sums of a row meet in the order of the panels: in distributed shared memory where the panels of a range
// are a cluster, else in global memory, where a second kernel adds them up. plan.h says how a call is cut up.
#pragma once

#include "elements.cuh"
#include "machine.h"
#include "plan.h"
#include "sample.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

// Where a row of a stage starts, in chunks of 16 bytes.
__device__ __forceinline__ int row_chunk(int row) { return row / 2 * kPairChunks + row % 2 * (kRowChunks + 4); }
// How x comes to shared memory: kPlain through registers, for rows that do not start and end on 16 bytes.
enum class Feed { kAsync, kPlain };

template <class T, int kRankTiles_, int kWarps_, Mode kMode_, Feed kFeed_>
struct ShrinkTraits {
  using Element = T;
  static constexpr int kRankTiles = kRankTiles_;  // of 8 ranks
  static constexpr int kWarps = kWarps_;
  static constexpr Mode kMode = kMode_;
  static constexpr Feed kFeed = kFeed_;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kRanks = kTileRanks * kRankTiles;
  static constexpr int kPlanes = shrink_planes(kMode);
  static constexpr int kQueueBytes = queue_bytes(kWarps);
  static constexpr int kSumPitch = sum_pitch(kMode, kRankTiles);
  static constexpr int kTileSumBytes = tile_sum_bytes(kMode, kRankTiles);  // of one tile of rows
  // Where shared memory has room for several blocks, registers should have it too.
  static constexpr int kMinBlocks = kWarps == 4       ? (kRankTiles <= 2 && kMode == Mode::kWeight ? 4 : 3)
                                    : kRankTiles <= 3 ? 2
                                                      : 1;
  // Ranks whose noise a thread makes at a time: two chains overlap, where registers allow it.
  static constexpr int kWeightUnroll = kRankTiles == 8 ? 1 : 2;
  static_assert(kStageColumns == 4 * kWarpLanes, "a lane makes four columns of a rank");
  static_assert(kStageColumns == kSignsPerCounter, "one counter's signs cover a stage");
};

struct ShrinkLayout {
  int32_t panel_columns;  // a multiple of a stage
  int32_t panels;
  int32_t ranges;
  int32_t group_ranges;        // of each group, or 0 where ranges cross groups
  int32_t group_tiles, tiles;  // of 16 rows: in a group, in all groups
  int32_t round_tiles;         // between two meetings of the cluster: as many as the sums have room for
  bool clustered;              // the panels of a range are a cluster
  bool mean_aligned, z_aligned;
};

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

// Flips the signs of eight elements where the bits of `signs` are set, the lowest for the first.
__device__ __forceinline__ uint4 flip(uint4 x, uint32_t signs) {
  const auto mask = [signs](int pair) { return (signs >> 2 * pair & 1u) << 15 | (signs >> (2 * pair + 1) & 1u) << 31; };
  return make_uint4(x.x ^ mask(0), x.y ^ mask(1), x.z ^ mask(2), x.w ^ mask(3));
}

template <class T>
__device__ __forceinline__ float sum_of_squares(uint4 x, float sum) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = Pack<T>::unpack(pairs[k]);
    sum = fmaf(pair.y, pair.y, fmaf(pair.x, pair.x, sum));
  }
  return sum;
}

// First tile of a range; the end of the last range, too.
__device__ __forceinline__ int32_t range_start(const ShrinkLayout& layout, int32_t range) {
  if (layout.group_ranges == 0) {
    return static_cast<int32_t>(static_cast<int64_t>(range) * layout.tiles / layout.ranges);
  }
  const int32_t group = range / layout.group_ranges;
  const int64_t part = range - group * layout.group_ranges;
  return group * layout.group_tiles + static_cast<int32_t>(part * layout.group_tiles / layout.group_ranges);
}

// A round of a block's work, between two meetings of the cluster: tiles of one group.
struct Round {
  int32_t tile, group;
  int32_t count;  // of tiles; 0 behind the end

  __device__ __forceinline__ Round(const ShrinkLayout& layout, int32_t first, int32_t end) {
    tile = first;
    group = first / layout.group_tiles;
    count_tiles(layout, end);
  }
  __device__ __forceinline__ void count_tiles(const ShrinkLayout& layout, int32_t end) {
    int32_t left = (group + 1) * layout.group_tiles - tile;
    if (end - tile < left) left = end - tile;
    count = left < layout.round_tiles ? left : layout.round_tiles;
  }
  __device__ __forceinline__ void advance(const ShrinkLayout& layout, int32_t end) {
    tile += count;
    if (tile == (group + 1) * layout.group_tiles) ++group;
    count_tiles(layout, end);
  }
  // First row of the round's tile `index`, within the group.
  __device__ __forceinline__ int64_t row(const ShrinkLayout& layout, int index) const {
    return static_cast<int64_t>(tile + index - group * layout.group_tiles) * kTileRows;
  }
};

// Copies stages of this warp's tiles into its queue: tiles warp, warp + kWarps, ... of a round, one round after the
// other. The first of them takes its turn in every round, whether it exists or not, as it does in the kernel.
template <class Traits>
struct Feeder {
  using T = typename Traits::Element;
  const ShrinkParams& p;
  const ShrinkLayout& layout;
  uint4* const queue;  // of the warp
  const int64_t column0;
  const int columns;  // of the panel
  const int32_t end;
  Round round;
  int index;  // of the tile in its round
  int stage = 0;
  const T* source = nullptr;  // of this lane's first row (0 or 1) and chunk of the tile, and the panel's first column
  int rows = 0;               // of the tile, 0 without one

  __device__ __forceinline__ Feeder(const ShrinkParams& p, const ShrinkLayout& layout, uint4* queue, int64_t column0,
                                    int columns, int32_t first, int32_t end)
      : p(p),
        layout(layout),
        queue(queue),
        column0(column0),
        columns(columns),
        end(end),
        round(layout, first, end),
        index(threadIdx.x / kWarpLanes) {
    aim();
  }

  __device__ __forceinline__ void aim() {
    const int lane = threadIdx.x % kWarpLanes;
    const int64_t row = round.row(layout, index);
    const int64_t left = p.rows_per_group - row;
    rows = index < round.count ? static_cast<int>(left < kTileRows ? left : kTileRows) : 0;
    source = static_cast<const T*>(p.x) + (round.group * p.rows_per_group + row + lane / kRowChunks) * p.x_stride +
             column0 + 8 * (lane % kRowChunks);
  }

  // Asks for the next stage, to lie in `slot`: 256 bytes of two rows at a time.
  __device__ __forceinline__ void request(int slot) {
    const int lane = threadIdx.x % kWarpLanes;
    const int left = columns - stage * kStageColumns;  // at least 1
    const T* from = source + stage * kStageColumns;
    uint4* const to = queue + slot * kStageChunks + row_chunk(lane / kRowChunks) + lane % kRowChunks;
    const int64_t step = 2 * p.x_stride;
    if (Traits::kFeed == Feed::kAsync && rows == kTileRows && left >= kStageColumns) {
#pragma unroll
      for (int pair = 0; pair < kTileRows / 2; ++pair, from += step) copy_async(to + pair * kPairChunks, from);
    } else {
      const int count = left - 8 * (lane % kRowChunks);
      for (int pair = 0; 2 * pair + lane / kRowChunks < rows && count > 0; ++pair, from += step) {
        if constexpr (Traits::kFeed == Feed::kAsync) copy_async(to + pair * kPairChunks, from);
        else to[pair * kPairChunks] = load_eight(from, count, false);
      }
    }
    if constexpr (Traits::kFeed == Feed::kAsync) commit_copies();
    if (++stage * kStageColumns >= columns) {
      stage = 0;
      index += Traits::kWarps;
      if (index >= round.count) {
        round.advance(layout, end);
        index = threadIdx.x / kWarpLanes;
      }
      aim();
    }
  }
};

// Adds up the panels' sums of two ranks of one row, finishes them for the mode and writes them to z.
template <class Traits, class Load>
__device__ __forceinline__ void store_pair(const ShrinkParams& p, const ShrinkLayout& layout, const Sample& sample,
                                           int64_t row, int64_t token, int rank, const Load& load) {
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
  T* const z = static_cast<T*>(out.z) + row * out.z_stride + place;
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
      if (!layout.clustered) to = p.partial + (panel * p.groups * p.rows_per_group + token0 + tile_row) * kPitch;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i + 8 * half;
        if (tile_row + row >= p.rows_per_group) continue;
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
    const int64_t left = p.rows_per_group - row0;
    const int rows = left < now.count * kTileRows ? static_cast<int>(left) : now.count * kTileRows;
    for (int e = panel * Traits::kThreads + threadIdx.x; e < rows * kPairs; e += layout.panels * Traits::kThreads) {
      const int row = e / kPairs;
      store_pair<Traits>(p, layout, sample, token0 + row0 + row, row0 + row, 2 * (e % kPairs),
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
  const int64_t rows = p.groups * p.rows_per_group;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
  const int64_t row = e / kPairs;
  if (row >= rows) return;
  const int64_t group = row / p.rows_per_group;
  const Sample sample(p, group);
  const float* const own = p.partial + row * Traits::kSumPitch;
  store_pair<Traits>(p, layout, sample, row, row - group * p.rows_per_group, static_cast<int>(2 * (e % kPairs)),
                     [&](int member, int place) {
                       return __ldcg(reinterpret_cast<const float2*>(own + member * rows * Traits::kSumPitch + place));
                     });
}

template <class Traits>
cudaError_t launch_tiles(const ShrinkParams& p, const ShrinkPlan& plan, cudaStream_t stream) {
  ShrinkLayout layout{};
  const int64_t group_tiles = (p.rows_per_group + kTileRows - 1) / kTileRows;
  if (group_tiles * p.groups > INT32_MAX) return cudaErrorInvalidConfiguration;
  layout.panels = static_cast<int32_t>(plan.panels);
  layout.clustered = plan.clustered;
  layout.panel_columns = static_cast<int32_t>(plan.panel_columns);
  layout.group_tiles = static_cast<int32_t>(group_tiles);
  layout.tiles = static_cast<int32_t>(group_tiles * p.groups);
  layout.mean_aligned = means_aligned(p, p.mean_format == Format::kFloat32 ? 16 : 8);
  layout.z_aligned = results_aligned(p, 4);
  layout.round_tiles = plan.round_tiles;
  LaunchShape shape{dim3(1), Traits::kThreads};
  shape.shared = static_cast<size_t>(plan.shared);
  shape.cluster = layout.clustered ? layout.panels : 1;
  int resident = 0;
  cudaError_t status = resident_clusters(shrink_kernel<Traits>, shape, resident);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  const int32_t ranges = layout.clustered ? resident : (resident + layout.panels - 1) / layout.panels;
  layout.ranges = ranges < layout.tiles ? ranges : layout.tiles;
  // Ranges that stay within a sample make its noise once. That is worth a few idle clusters, not many.
  const auto groups = static_cast<int32_t>(p.groups < layout.ranges ? p.groups : layout.ranges + 1);
  const int32_t even = layout.ranges / groups * groups;
  if (8 * even >= 7 * layout.ranges) {
    layout.group_ranges = even / groups;
    layout.ranges = even;
  }
  shape.grid = dim3(static_cast<unsigned>(layout.ranges * layout.panels));
  status = launch(shrink_kernel<Traits>, shape, stream, p, layout);
  if (status != cudaSuccess || layout.clustered) return status;
  const int64_t pairs = p.groups * p.rows_per_group * (Traits::kRanks / 2);
  const int64_t blocks = (pairs + Traits::kThreads - 1) / Traits::kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(reduce_kernel<Traits>, {dim3(static_cast<unsigned>(blocks)), Traits::kThreads}, stream, p, layout);
}

// The choices of plan.h for one mode and feed.
template <class T, Mode kMode, Feed kFeed>
cudaError_t launch_rare(const ShrinkParams& p, const ShrinkPlan& plan, cudaStream_t stream) {
  if constexpr (kMode != Mode::kToken) {
    if (plan.choice.tiles == 1) return launch_tiles<ShrinkTraits<T, 1, 4, kMode, kFeed>>(p, plan, stream);
  }
  return launch_tiles<ShrinkTraits<T, 2, 4, kMode, kFeed>>(p, plan, stream);
}

template <class T, int kRankTiles, int kWarps>
cudaError_t launch_common(const ShrinkParams& p, const ShrinkPlan& plan, cudaStream_t stream) {
  return launch_tiles<ShrinkTraits<T, kRankTiles, kWarps, Mode::kWeight, Feed::kAsync>>(p, plan, stream);
}

template <class T>
cudaError_t launch_pass(const ShrinkParams& p, const ShrinkPlan& plan, bool aligned, cudaStream_t stream) {
  if (p.mode == Mode::kFlipout) {
    return aligned ? launch_rare<T, Mode::kFlipout, Feed::kAsync>(p, plan, stream)
                   : launch_rare<T, Mode::kFlipout, Feed::kPlain>(p, plan, stream);
  }
  if (p.mode == Mode::kToken) {
    return aligned ? launch_rare<T, Mode::kToken, Feed::kAsync>(p, plan, stream)
                   : launch_rare<T, Mode::kToken, Feed::kPlain>(p, plan, stream);
  }
  if (!aligned) return launch_rare<T, Mode::kWeight, Feed::kPlain>(p, plan, stream);
  switch (100 * plan.choice.tiles + plan.choice.warps) {
    case 104:
      return launch_common<T, 1, 4>(p, plan, stream);
    case 204:
      return launch_common<T, 2, 4>(p, plan, stream);
    case 404:
      return launch_common<T, 4, 4>(p, plan, stream);
    case 108:
      return launch_common<T, 1, 8>(p, plan, stream);
    case 208:
      return launch_common<T, 2, 8>(p, plan, stream);
    case 308:
      return launch_common<T, 3, 8>(p, plan, stream);
    case 412:
      return launch_common<T, 4, 12>(p, plan, stream);
    default:
      return launch_common<T, 8, 8>(p, plan, stream);
  }
}

template <class T>
cudaError_t launch_shrink_half(const ShrinkParams& params, cudaStream_t stream) {
  Machine machine;
  cudaError_t status = current_machine(machine);
  const bool aligned = rows_aligned(params);
  ShrinkParams pass = params;
  for (int first = 0; first < params.tile_count && status == cudaSuccess; first += pass.tile_count) {
    pass.tile_count = params.tile_count - first;
    const ShrinkPlan plan = plan_shrink(params.mode, params.n, pass.tile_count, aligned, machine);
    if (plan.choice.tiles == 0) return cudaErrorLaunchOutOfResources;
    if (pass.tile_count > plan.choice.tiles) pass.tile_count = plan.choice.tiles;
    for (int k = 0; k < pass.tile_count; ++k) pass.tiles[k] = params.tiles[first + k];
    status = launch_pass<T>(pass, plan, aligned, stream);
  }
  return status;
}

}  // namespace tfb::cuda
