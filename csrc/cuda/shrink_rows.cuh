// How shrink's rows come to a block, half precision: ranges of tiles of 16 rows, and each warp's queue of their stages.
//
// Each warp has its own queue in shared memory: no block-wide barrier stands between the copies and the products.
#pragma once

#include "elements.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

// Where a row of a stage starts, in chunks of 16 bytes.
__device__ __forceinline__ int row_chunk(int row) { return row / 2 * kPairChunks + row % 2 * (kRowChunks + 4); }

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
  static constexpr int kMinBlocks = shrink_min_blocks(kMode, kRankTiles, kWarps);
  static constexpr int kWeightUnroll = shrink_weight_unroll(kRankTiles);
  static_assert(kStageColumns == 4 * kWarpLanes, "a lane makes four columns of a rank");
  static_assert(kStageColumns == kSignsPerCounter, "one counter's signs cover a stage");
};

// The rows of a group, and where they lie in x. Behind the samples' groups comes that of the mean's rows.
template <class Traits>
__device__ __forceinline__ bool is_lead(const ShrinkParams& p, int64_t group) {
  return Traits::kMode == Mode::kWeight && group >= p.groups;
}
template <class Traits>
__device__ __forceinline__ int64_t rows_of(const ShrinkParams& p, int64_t group) {
  return is_lead<Traits>(p, group) ? p.lead_rows : p.rows_per_group;
}
template <class Traits>
__device__ __forceinline__ const RowMap& map_of(const ShrinkParams& p, int64_t group) {
  return p.maps[is_lead<Traits>(p, group)];
}

__host__ __device__ __forceinline__ int64_t rows_in_all(const ShrinkParams& p) {
  return p.groups * p.rows_per_group + p.lead_rows;
}

struct ShrinkLayout {
  int32_t panel_columns;  // a multiple of a stage
  int32_t panels;
  int32_t ranges;                   // of the groups' tiles
  int32_t group_ranges;             // of each group, or 0 where ranges cross groups
  int32_t groups;                   // and the mean's rows behind them
  int32_t group_tiles, tiles;       // of 16 rows: in a group, in all groups
  int32_t lead_ranges, lead_tiles;  // of the mean's rows
  int64_t item_step[2];             // elements of x between a group's rows in one item and in the next
  int32_t round_tiles;              // between two meetings of the cluster: as many as the sums have room for
  bool clustered;                   // the panels of a range are a cluster
  bool mean_aligned, z_aligned;
};

// First tile of a range; the end of the last range, too.
__device__ __forceinline__ int32_t range_start(const ShrinkLayout& layout, int32_t range) {
  if (range >= layout.ranges) {
    if (layout.lead_ranges == 0) return layout.tiles;
    const int64_t part = range - layout.ranges;
    return layout.tiles + static_cast<int32_t>(part * layout.lead_tiles / layout.lead_ranges);
  }
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
    group = first < layout.tiles ? first / layout.group_tiles : layout.groups;
    count_tiles(layout, end);
  }
  __device__ __forceinline__ void count_tiles(const ShrinkLayout& layout, int32_t end) {
    int32_t left = (group + 1) * layout.group_tiles - tile;
    if (end - tile < left || group == layout.groups) left = end - tile;
    count = left < layout.round_tiles ? left : layout.round_tiles;
  }
  __device__ __forceinline__ void advance(const ShrinkLayout& layout, int32_t end) {
    tile += count;
    if (tile == (group + 1) * layout.group_tiles && group < layout.groups) ++group;
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
  int rows = 0;               // of the tile, 0 without one; and kApart
  static constexpr int kApart = 2 * kTileRows;  // the rows lie in several items

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
    const int64_t left = rows_of<Traits>(p, round.group) - row;
    rows = index < round.count ? static_cast<int>(left < kTileRows ? left : kTileRows) : 0;
    const RowMap& map = map_of<Traits>(p, round.group);
    if (item_of(map, row) != item_of(map, row + kTileRows - 1)) rows |= kApart;
    source = static_cast<const T*>(p.x) + row_of(map, round.group, row + lane / kRowChunks) * p.x_stride + column0 +
             8 * (lane % kRowChunks);
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
      const int64_t first = round.row(layout, index) + lane / kRowChunks;
      for (int pair = 0; 2 * pair + lane / kRowChunks < (rows & (kApart - 1)) && count > 0; ++pair, from += step) {
        const RowMap& map = map_of<Traits>(p, round.group);
        const T* row = from + (item_of(map, first + 2 * pair) - item_of(map, first)) *
                                  layout.item_step[is_lead<Traits>(p, round.group)];
        if constexpr (Traits::kFeed == Feed::kAsync) copy_async(to + pair * kPairChunks, row);
        else to[pair * kPairChunks] = load_eight(row, count, false);
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

}  // namespace tfb::cuda
