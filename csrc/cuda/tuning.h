// Every choice that shapes the CUDA kernels, each with its reason: a pure function of a call's sizes and of what the
// machine has, so that machines that are not at hand can be planned for.
#pragma once

#include <cstdint>
#include <iterator>

#include "../types.h"

namespace tfb::cuda {

constexpr int kWarpLanes = 32;
constexpr int kMaxGridY = 65535;
constexpr int kNoiseThreads = 256;
// mma.m16n8k16: rows of x, ranks.
constexpr int kTileRows = 16;
constexpr int kTileRanks = 8;
// Rank tiles and layers of one launch: parameters stay under the 4 KiB that every driver takes.
constexpr int kMaxRankTiles = 32;
constexpr int kMaxLayers = 8;
// Shared memory of a block on the smallest machines that are served: compute capabilities 8.6, 8.9 and 12.0.
constexpr int64_t kLeastSharedBytes = 99 * 1024;

struct Machine {
  int multiprocessors = 0;
  int shared_bytes = 0;    // that a block may ask for
  int cluster_blocks = 1;  // blocks of the largest cluster in which each may have that much; 1 where there are none
};

// shrink, half precision ----------------------------------------------------------------------------------------------

// x comes in stages of 128 columns: 256 bytes of a row at a time keep the memory's pages busy (64 reached half of the
// copy bandwidth on an H200), a lane with a Philox counter each cover a rank's 128 columns, and so do flipout's signs
// from one counter. Two stages in the queues of 12 to 16 warps hold over 48 KiB a multiprocessor in flight; the latency
// of an H200 asks for 32.
constexpr int kPieceColumns = 32;
constexpr int kStagePieces = 4;
constexpr int kStageColumns = kStagePieces * kPieceColumns;
constexpr int kShrinkStages = 2;
// A row of a stage has 16 chunks of 16 bytes. Four of nothing lie in the middle of a pair of rows, so that the two,
// which are read together, lie in different banks.
constexpr int kRowChunks = kStageColumns / 8;
constexpr int kPairChunks = 2 * kRowChunks + 4;
constexpr int kStageChunks = kTileRows / 2 * kPairChunks;

// What a block keeps in shared memory: its warps' queues of x; the sums of the tiles of rows that its warps have in
// hand; the weights of its panel's columns. flipout sums M x and E (s o x) apart.
constexpr int shrink_planes(Mode mode) { return mode == Mode::kFlipout ? 2 : 1; }
constexpr int queue_bytes(int warps) { return warps * kShrinkStages * kStageChunks * 16; }
// Floats between rows of the sums: the planes and, in token mode, |x|^2; even, and not a multiple of 32 banks.
constexpr int sum_pitch(Mode mode, int tiles) { return shrink_planes(mode) * kTileRanks * tiles + 2; }
constexpr int tile_sum_bytes(Mode mode, int tiles) { return kTileRows * sum_pitch(mode, tiles) * 4; }
constexpr int column_weight_bytes(Mode mode, int tiles) { return shrink_planes(mode) * kTileRanks * tiles * 2; }

// How x comes to shared memory: kPlain through registers, for rows that do not start and end on 16 bytes.
enum class Feed { kAsync, kPlain };
// Where the panels of a range of rows meet: in the shared memory of a cluster or in global memory.
enum class Meeting { kCluster, kGlobal, kEither };

// The kernels there are, by rank tiles and warps of a block. Where a block's weights leave a multiprocessor to it
// alone, it has more warps to share them. flipout, token and rows off 16 bytes are rare and have fewer kernels.
struct ShrinkKernel {
  Mode mode;
  Feed feed;
  Meeting meeting;
  int tiles, warps;

  constexpr int64_t shared_bytes(int64_t columns) const {
    return queue_bytes(warps) + warps * tile_sum_bytes(mode, tiles) + columns * column_weight_bytes(mode, tiles);
  }
};
constexpr ShrinkKernel kShrinkKernels[] = {
    {Mode::kWeight, Feed::kAsync, Meeting::kCluster, 1, 8}, {Mode::kWeight, Feed::kAsync, Meeting::kCluster, 2, 8},
    {Mode::kWeight, Feed::kAsync, Meeting::kCluster, 3, 8}, {Mode::kWeight, Feed::kAsync, Meeting::kCluster, 4, 12},
    {Mode::kWeight, Feed::kAsync, Meeting::kCluster, 8, 8}, {Mode::kWeight, Feed::kAsync, Meeting::kGlobal, 1, 4},
    {Mode::kWeight, Feed::kAsync, Meeting::kGlobal, 2, 4},  {Mode::kWeight, Feed::kAsync, Meeting::kGlobal, 4, 4},
    {Mode::kWeight, Feed::kPlain, Meeting::kEither, 1, 4},  {Mode::kWeight, Feed::kPlain, Meeting::kEither, 2, 4},
    {Mode::kFlipout, Feed::kAsync, Meeting::kEither, 1, 4}, {Mode::kFlipout, Feed::kAsync, Meeting::kEither, 2, 4},
    {Mode::kFlipout, Feed::kPlain, Meeting::kEither, 1, 4}, {Mode::kFlipout, Feed::kPlain, Meeting::kEither, 2, 4},
    {Mode::kToken, Feed::kAsync, Meeting::kEither, 2, 4},   {Mode::kToken, Feed::kPlain, Meeting::kEither, 2, 4},
};
constexpr int kShrinkKernelCount = static_cast<int>(std::size(kShrinkKernels));

// Blocks of a multiprocessor that the registers are limited for: as many as shared memory has room for.
constexpr int shrink_min_blocks(Mode mode, int tiles, int warps) {
  if (warps == 4) return tiles <= 2 && mode == Mode::kWeight ? 4 : 3;
  return tiles <= 3 ? 2 : 1;
}
// Ranks whose noise a thread makes at a time: two chains overlap, where registers allow it.
constexpr int shrink_weight_unroll(int tiles) { return tiles == 8 ? 1 : 2; }

constexpr int most_shrink_warps() {
  int most = 0;
  for (const ShrinkKernel& kernel : kShrinkKernels) most = kernel.warps > most ? kernel.warps : most;
  return most;
}

// The columns are split into panels, one a block: their weights stay in shared memory while rows stream past.
constexpr int64_t kPanelMinColumns = 1024;   // below, one panel
constexpr int64_t kPanelManyColumns = 7168;  // up to here 8, above 16 or more
constexpr int kMaxCluster = 16;              // the most blocks of a cluster

// The most columns of a panel: what the mode's narrowest kernel has room for on every machine.
constexpr int64_t most_panel_columns(Mode mode) {
  int64_t most = 0;
  for (const ShrinkKernel& kernel : kShrinkKernels) {
    if (kernel.mode != mode) continue;
    const int64_t room = kLeastSharedBytes - kernel.shared_bytes(0);
    const int64_t columns = room / column_weight_bytes(mode, kernel.tiles) / kStageColumns * kStageColumns;
    most = columns > most ? columns : most;
  }
  return most;
}

// The panels add up in their order, so their number, on which a row's last bit depends, is a function of n and the mode
// alone: not of the batch, the layers beside, the alignment or the machine. (Other bits differ between machines only
// where their instructions do.)
constexpr int64_t shrink_panels(Mode mode, int64_t n) {
  if (n < kPanelMinColumns) return 1;
  if (n <= kPanelManyColumns) return 8;
  const int64_t needed = (n + most_panel_columns(mode) - 1) / most_panel_columns(mode);
  return needed < kMaxCluster ? kMaxCluster : needed;
}

// Rows of the mean draw nothing: kWeight's kernels serve them in every mode whose panels are the same, and give the
// same bits.
constexpr Mode mean_mode(Mode mode, int64_t n) {
  return shrink_panels(mode, n) == shrink_panels(Mode::kWeight, n) ? Mode::kWeight : mode;
}

struct ShrinkPlan {
  int kernel;             // of kShrinkKernels; -1 where the machine has less than kLeastSharedBytes
  int64_t panels;         // of columns, one a block
  int64_t panel_columns;  // a multiple of a stage
  bool clustered;         // the panels of a range of rows are a cluster; otherwise they meet in global memory
  int round_tiles;        // tiles of rows between two meetings of a cluster: as many as the sums have room for
  int64_t shared;         // bytes of a block
};

// Tiles of a warp in a round: as many as leave room for two blocks on a multiprocessor of compute capability 9.0, up to
// four; at least one.
constexpr int warp_tiles(int64_t fixed_bytes, int64_t sum_bytes, int64_t room) {
  constexpr int64_t kHalf = 112 * 1024;
  const int64_t fit = ((room < kHalf ? room : kHalf) - fixed_bytes) / sum_bytes;
  return fit < 1 ? 1 : fit > 4 ? 4 : static_cast<int>(fit);
}

// The first kernel with room for all the tiles, else the last that shared memory holds, else -1.
constexpr int choose_shrink(Mode mode, Feed feed, Meeting meeting, int64_t columns, int64_t tiles, int64_t room) {
  int best = -1;
  for (int k = 0; k < kShrinkKernelCount; ++k) {
    const ShrinkKernel& kernel = kShrinkKernels[k];
    if (kernel.mode != mode || kernel.feed != feed) continue;
    if (kernel.meeting != meeting && kernel.meeting != Meeting::kEither) continue;
    if (kernel.shared_bytes(columns) > room) continue;
    best = k;
    if (kernel.tiles >= tiles) break;
  }
  return best;
}

// `tiles` of eight ranks are asked for. Whether the blocks meet in clusters does not depend on `tiles`.
constexpr ShrinkPlan plan_shrink(Mode mode, int64_t n, int64_t tiles, Feed feed, const Machine& machine) {
  ShrinkPlan plan{};
  plan.kernel = -1;
  plan.panels = shrink_panels(mode, n);
  plan.panel_columns = ((n + plan.panels - 1) / plan.panels + kStageColumns - 1) / kStageColumns * kStageColumns;
  plan.clustered = plan.panels <= machine.cluster_blocks;
  const int64_t columns = plan.panel_columns;
  const int64_t room = machine.shared_bytes;
  if (plan.clustered && machine.cluster_blocks > 1) {
    plan.kernel = choose_shrink(mode, feed, Meeting::kCluster, columns, tiles, room);
  }
  if (plan.kernel < 0) {
    plan.clustered = plan.panels == 1;
    plan.kernel = choose_shrink(mode, feed, Meeting::kGlobal, columns, tiles, room);
  }
  if (plan.kernel < 0) return plan;
  const ShrinkKernel& kernel = kShrinkKernels[plan.kernel];
  const int64_t sums = kernel.warps * tile_sum_bytes(mode, kernel.tiles);
  const int64_t fixed = kernel.shared_bytes(columns) - sums;
  const int own = warp_tiles(fixed, sums, room);
  plan.round_tiles = kernel.warps * own;
  plan.shared = fixed + own * sums;
  return plan;
}

// Of `room` ranges those of the mean's tiles, where they stand beside the tiles of `groups` of samples: what these
// leave. They take their share of the work, a group's weights counted as eight tiles (a launch for ten groups of one
// tile took as long as one for 128 tiles of the mean on an H200), in whole groups.
constexpr int32_t ranges_of_lead(int32_t room, int32_t tiles, int64_t groups, int32_t lead_tiles) {
  if (lead_tiles == 0) return 0;
  const int64_t work = tiles + 8 * groups;
  int64_t own = room * work / (work + lead_tiles);
  own = own > tiles ? tiles : own >= room ? room - 1 : own;
  if (own < 1) own = 1;
  if (own >= groups) {
    own -= own % groups;
  } else {
    const int64_t together = (groups + own - 1) / own;
    own = (groups + together - 1) / together;
  }
  const auto left = static_cast<int32_t>(room > own ? room - own : 1);
  return left < lead_tiles ? left : lead_tiles;
}

// Ranges of rows, a cluster (or panels in global memory) each, for `resident` of them and `tiles` of 16 rows. Ranges
// that stay within a group make its noise once. That is worth a few idle clusters, not many.
struct Ranges {
  int32_t all;
  int32_t of_group;  // 0 where ranges cross groups
};
constexpr Ranges split_ranges(int32_t resident, int32_t tiles, int64_t groups) {
  Ranges ranges{resident < tiles ? resident : tiles, 0};
  const int32_t parts = groups < ranges.all ? static_cast<int32_t>(groups) : ranges.all + 1;
  const int32_t even = ranges.all / parts * parts;
  if (8 * even >= 7 * ranges.all) ranges = {even, even / parts};
  return ranges;
}

// shrink, float32 -----------------------------------------------------------------------------------------------------

// float32 has no tensor-core path of its own precision: 8 tokens x 8 ranks of accumulators per lane, eight warps that
// share the columns of a tile in turns.
constexpr int kShrinkFloatWarps = 8;
constexpr int kShrinkFloatTokens = 8;
constexpr int kShrinkFloatRank = 8;

// decode --------------------------------------------------------------------------------------------------------------

// Up to this many rows go through one launch that shrinks, waits for the whole grid and expands. Above, the waste of
// tiles filled with one sample's few rows costs more than a second launch.
constexpr int64_t kDecodeRows = 128;
constexpr int64_t kDecodeGroupRows = kTileRows;  // one tile of the product holds a sample's rows
constexpr int kDecodeBlocks = 2;                 // a multiprocessor: more would only make the barrier slower
constexpr int kDecodeWarps = 8;
constexpr int kDecodeWarpColumns = 2 * kPieceColumns;
constexpr int kDecodeSliceColumns = kDecodeWarps * kDecodeWarpColumns;
constexpr int kDecodeOutputColumns = 2 * kWarpLanes;  // of a warp, two a lane
constexpr int kDecodeRowTile = 8;
constexpr int64_t kDecodeSharedBytes = 32 * 1024;  // of z: (rows, ranks) float32

constexpr bool decode_serves(Format format, int64_t groups, int64_t rows_per_group, int64_t rank_tiles) {
  const int64_t rows = groups * rows_per_group;
  return format != Format::kFloat32 && rows <= kDecodeRows && rows_per_group <= kDecodeGroupRows &&
         rows * kTileRanks * rank_tiles * 4 <= kDecodeSharedBytes;
}

// attend --------------------------------------------------------------------------------------------------------------

// Rows of a block, 16 a warp, and columns that it takes at a time. Up to this many rows of a key head are few: above,
// torch's attention reads keys no more often.
constexpr int kAttendWarps = 4;
constexpr int kAttendKeys = 64;
constexpr int64_t kAttendRows = 256;
constexpr int kAttendSplits = 8;  // the largest cluster that needs no asking

// Blocks that share the columns of a head: as many as keep every multiprocessor busy, each with 64 columns at least.
constexpr int attend_splits(int64_t heads, int64_t columns, const Machine& machine) {
  int splits = 1;
  while (splits < kAttendSplits && splits < machine.cluster_blocks && heads * splits < machine.multiprocessors &&
         columns > splits * kAttendKeys) {
    splits *= 2;
  }
  return splits;
}

// expand --------------------------------------------------------------------------------------------------------------

// A warp owns 16 rows x 128 columns of y at a time, so that it writes 256 bytes of a row at once (64 bytes reached a
// third of the bandwidth on an H200); above rank 16 64 columns, since the basis of more would not fit its registers.
// All warps of the device move down the rows side by side.
constexpr int kExpandWarps = 4;
constexpr int kExpandStages = 4;         // tiles of z in a warp's queue, three of them ahead
constexpr int kExpandGroupColumns = 32;  // of one product
constexpr int64_t kExpandRanks = 64;     // above, the kernel that reads the basis anew for every 16 ranks
// Steps of 16 ranks that the kernel has.
constexpr int expand_steps(int64_t r) { return r <= 16 ? 1 : r <= 32 ? 2 : 4; }
constexpr int expand_groups(int steps) { return steps == 1 ? 4 : 2; }
// 12 or 8 warps a multiprocessor: what the basis leaves of the registers.
constexpr int expand_min_blocks(int steps) { return steps == 4 ? 2 : 3; }

constexpr int kExpandFloatThreads = 128;
constexpr int kExpandFloatTokens = 8;
constexpr int kExpandFloatRank = 8;
constexpr int kExpandFloatTiles = 4;

}  // namespace tfb::cuda
