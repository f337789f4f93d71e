// The numbers that shape the CUDA kernels, each with its reason.
#pragma once

#include <cstdint>

namespace tfb::cuda {

constexpr int kWarpLanes = 32;
// mma.m16n8k16: rows of x, ranks.
constexpr int kTileRows = 16;
constexpr int kTileRanks = 8;

// shrink takes x in stages of 128 columns: 256 bytes of a row at a time keep the memory's pages busy (64 reached half
// of the copy bandwidth on an H200), a lane with a Philox counter each cover a rank's 128 columns, and so do flipout's
// signs from one counter. Two stages in the queues of 12 to 16 warps hold over 48 KiB a multiprocessor in flight; the
// latency of an H200 asks for 32.
constexpr int kPieceColumns = 32;
constexpr int kStagePieces = 4;
constexpr int kStageColumns = kStagePieces * kPieceColumns;
constexpr int kShrinkStages = 2;
// The columns are split into panels, one a block: their weights stay in shared memory while rows stream past. How many
// there are is plan.h's shrink_panels.
constexpr int64_t kPanelMinColumns = 1024;   // below, one panel
constexpr int64_t kPanelManyColumns = 7168;  // up to here 8, above 16 or more
constexpr int kMaxCluster = 16;              // the most blocks of a cluster
// Shared memory of a block on the smallest machines that are served: compute capabilities 8.6, 8.9 and 12.0.
constexpr int64_t kLeastSharedBytes = 99 * 1024;
// float32 has no tensor-core path of its own precision: 8 tokens x 8 ranks of accumulators per lane, eight warps that
// share the columns of a tile in turns.
constexpr int kShrinkFloatWarps = 8;
constexpr int kShrinkFloatTokens = 8;
constexpr int kShrinkFloatRank = 8;
// Rank tiles and layers of one launch: parameters stay under the 4 KiB that every driver takes.
constexpr int kMaxRankTiles = 32;
constexpr int kMaxLayers = 8;

// few: up to this many rows go through one launch that shrinks, waits for the whole grid and expands. Above, the waste
// of tiles filled with one sample's few rows costs more than a second launch.
constexpr int64_t kFewRows = 128;
constexpr int64_t kFewGroupRows = kTileRows;  // one tile of the product holds a sample's rows
constexpr int kFewWarps = 8;
constexpr int kFewWarpColumns = 2 * kPieceColumns;
constexpr int kFewSliceColumns = kFewWarps * kFewWarpColumns;
constexpr int kFewOutputColumns = 2 * kWarpLanes;  // of a warp, two a lane
constexpr int kFewRowTile = 8;
constexpr int64_t kFewSharedBytes = 32 * 1024;  // of z: (rows, ranks) float32

// expand: a warp owns 16 rows x 128 columns of y at a time (64 columns above rank 16, whose basis would not fit its
// registers), so that it writes 256 bytes of a row at once; all warps of the device move down the rows side by side.
constexpr int kExpandWarps = 4;
constexpr int kExpandStages = 4;  // tiles of z in a warp's queue, three of them ahead
constexpr int kExpandFloatThreads = 128;
constexpr int kExpandFloatTokens = 8;
constexpr int kExpandFloatRank = 8;
constexpr int kExpandFloatTiles = 4;

constexpr int kNoiseThreads = 256;
constexpr int kMaxGridY = 65535;

}  // namespace tfb::cuda
