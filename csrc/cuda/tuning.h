// The numbers that shape the CUDA kernels, each with its reason.
#pragma once

#include <cstdint>

namespace tfb::cuda {

constexpr int kWarpLanes = 32;
// mma.m16n8k16: rows of x, ranks.
constexpr int kTileRows = 16;
constexpr int kTileRanks = 8;

// shrink reads x in pieces of 32 columns (a lane's 16 bytes of a row, four lanes a row) and makes weights for four
// pieces at a time: one barrier a chunk, and 32 lanes with a Philox counter each cover a rank's 128 columns.
constexpr int kPieceColumns = 32;
constexpr int kChunkPieces = 4;
constexpr int kChunkColumns = kChunkPieces * kPieceColumns;
// Blocks of a cluster split the columns of x. Eight is the largest portable cluster, and at n = 4096 leaves each block
// four chunks. The split depends on n alone: the order of a row's sum, and so its last bit, must not depend on the
// batch.
constexpr int kClusterBlocks = 8;
constexpr int64_t kClusterMinColumns = kClusterBlocks * kChunkColumns;
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

// expand: eight warps side by side cover 256 columns, a 512-byte stretch of each row of y in half precision; z of the
// block's rows lies in shared memory, so that nothing in the loop waits for a load but y itself.
constexpr int kExpandWarps = 8;
constexpr int kExpandRowTiles = 8;
constexpr int kExpandFloatThreads = 128;
constexpr int kExpandFloatTokens = 8;
constexpr int kExpandFloatRank = 8;
constexpr int kExpandFloatTiles = 4;

constexpr int kNoiseThreads = 256;
constexpr int kMaxGridY = 65535;

}  // namespace tfb::cuda
