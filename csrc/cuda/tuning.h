// The numbers that shape the CUDA kernels, each with its reason.
#pragma once

namespace tfb::cuda {

constexpr int kWarpLanes = 32;

// shrink: eight warps share a tile's columns. The number is fixed, because the order of a row's sum follows from it and
// a row's result must not depend on what else is in the batch.
constexpr int kShrinkWarps = 8;
// Rows of the weight per pass: 64 keep the accumulators of 32 tokens in registers. Larger ranks take several passes
// over x.
constexpr int kShrinkMaxRank = 64;
// float32 has no tensor-core path of its own precision: 8 tokens x 8 ranks of accumulators per lane.
constexpr int kShrinkFloatTokens = 8;
constexpr int kShrinkFloatRank = 8;

// expand: four warps side by side cover 128 columns, a 256-byte stretch of each row of y in half precision.
constexpr int kExpandWarps = 4;
// Sixteen warps an SM hide the latency of y; left to itself ptxas aims at more and spills.
constexpr int kExpandMinBlocks = 4;
// Token tiles of 16 per block: the basis is fetched once for 64 rows.
constexpr int kExpandTokenTiles = 4;
constexpr int kExpandFloatThreads = 128;
constexpr int kExpandFloatTokens = 8;
constexpr int kExpandFloatRank = 8;
constexpr int kExpandFloatTiles = 4;

constexpr int kNoiseThreads = 256;
constexpr int kMaxGridY = 65535;

}  // namespace tfb::cuda
