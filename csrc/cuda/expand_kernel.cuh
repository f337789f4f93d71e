// expand in half precision: bound by y, which is written (and read, where it is added to) once.
//
// A warp keeps its columns' basis in registers while it moves down the rows, 16 at a time. The product's columns are
// permuted so that lane (i = lane / 4, c = lane % 4) ends with eight neighbours of rows i and i + 8; k is permuted too:
// within 16 ranks, lane c reads ranks 4c .. 4c + 3 of z and of the basis in one piece. The tile then changes hands
// through shared memory, so that y is accessed 256 bytes of a row at a time: the memory's pages do not like less.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "expand.h"
#include "tuning.h"

namespace tfb::cuda {

// What the update is added to.
enum class Start { kNothing, kBias, kOutput };

constexpr int kExpandThreads = kExpandWarps * kWarpLanes;

template <class T, int kSteps_, Start kStart_>
struct ExpandTraits {
  using Element = T;
  static constexpr int kSteps = kSteps_;  // of 16 ranks
  static constexpr Start kStart = kStart_;
  static constexpr int kRanks = 16 * kSteps;
  static constexpr int kGroups = expand_groups(kSteps);  // of 32 columns
  static constexpr int kColumns = kGroups * kExpandGroupColumns;
  static constexpr int kRowChunks = kColumns / 8;             // 16-byte chunks of y in a row of the tile
  static constexpr int kChunkRows = kWarpLanes / kRowChunks;  // rows that a warp accesses at once
  static constexpr int kPasses = kTileRows / kChunkRows;
  // Sums wait in float32 where something is added to them, so that they are rounded once.
  static constexpr bool kWide = kStart != Start::kNothing;
  static constexpr int kTileChunks = kTileRows * kRowChunks * (kWide ? 2 : 1);  // of 16 bytes, in shared memory
  // Above 16 ranks z waits in a queue of asynchronous copies in shared memory: more tiles ahead than registers could
  // hold.
  static constexpr bool kQueued = kSteps > 1;
  static constexpr int kRankChunks = 2 * kSteps;  // of a row of z
  static constexpr int kQueueChunks = kQueued ? kExpandStages * kTileRows * kRankChunks : 0;
  static constexpr int kSharedBytes = kExpandWarps * (kTileChunks + kQueueChunks) * 16;
  static constexpr int kMinBlocks = expand_min_blocks(kSteps);
  // Calls that add to y come alone, and have no registers to spare.
  static constexpr int kCalls = kStart == Start::kOutput ? 1 : kMaxLayers;
};

// The fragments of 16 ranks of the basis from rank0 on, for 32 columns. Product j's column i is the physical column
// 8 (i / 2) + 2 j + i % 2.
template <class T, bool kPieces>
__device__ __forceinline__ void load_basis(uint32_t (&b)[4][2], const ExpandParams& p, int64_t column0, int64_t rank0,
                                           int i, int c) {
  const int64_t rank = rank0 + 4 * c;
  int64_t column = column0 + 8 * (i / 2) + i % 2;
  const T* from = static_cast<const T*>(p.basis) + column * p.r + rank;
#pragma unroll
  for (int j = 0; j < 4; ++j, column += 2, from += 2 * p.r) {
    const int64_t count = column < p.m ? p.r - rank : 0;
    if constexpr (kPieces) {
      const uint2 four = count > 0 ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
      b[j][0] = four.x, b[j][1] = four.y;
    } else {
      b[j][0] = load_pair(from, count), b[j][1] = load_pair(from + 2, count - 2);
    }
  }
}

// Chunks of a tile of 16-bit results and of float32 sums. Odd rows change places, so that the rows that are written
// together lie in different banks.
__device__ __forceinline__ int narrow_place(int row, int chunk, int row_chunks) {
  return row * row_chunks + (chunk ^ (row % 2 * 4));
}
__device__ __forceinline__ int wide_place(int row, int chunk, int row_chunks) {
  return row * 2 * row_chunks + (chunk ^ row % 2);
}

struct ExpandLayout {
  int64_t column_groups;  // of a warp's columns
  int64_t stripes;        // warps that share a column group, each every stripes-th tile of rows
  int32_t blocks;
};

// Calls side by side, one for each row of the grid.
template <class Each, int kCalls>
struct ExpandGroup {
  Each of[kCalls];
};

// A chunk of z in the queue. Rows that are read together change places, each by its own number.
template <class Traits>
__device__ __forceinline__ int queue_place(int row, int chunk) {
  return row * Traits::kRankChunks + (chunk ^ row % Traits::kRankChunks);
}

// For what can be accessed in whole pieces: see fits_pieces().
template <class Traits>
__global__ void __launch_bounds__(kExpandThreads, Traits::kMinBlocks)
    expand_kernel(const __grid_constant__ ExpandGroup<ExpandParams, Traits::kCalls> calls,
                  const ExpandGroup<ExpandLayout, Traits::kCalls> layouts) {
  const unsigned own = Traits::kCalls == 1 ? 0 : blockIdx.y;
  const ExpandParams& p = calls.of[own];
  const ExpandLayout& layout = layouts.of[own];
  // The width of a count, and where the layouts lie, leave the most registers on both architectures.
  using Count = std::conditional_t<Traits::kCalls == 1, int64_t, int32_t>;
  const auto column_groups = static_cast<Count>(layout.column_groups);
  const Count blocks = Traits::kCalls == 1 ? static_cast<Count>(gridDim.x) : layout.blocks;
  const auto block = static_cast<Count>(blockIdx.x);
  if (Traits::kCalls > 1 && block >= blocks) return;
  using T = typename Traits::Element;
  constexpr int kSteps = Traits::kSteps;
  constexpr int kRowChunks = Traits::kRowChunks;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  uint4* const tile_chunks =
      reinterpret_cast<uint4*>(dynamic_shared()) + warp * (Traits::kTileChunks + Traits::kQueueChunks);
  uint4* const queue = tile_chunks + Traits::kTileChunks;
  const Count warps = blocks * kExpandWarps;
  const Count unit = block * kExpandWarps + warp;
  const Count stripe = unit / column_groups;
  if (stripe >= layout.stripes) return;
  const auto r = static_cast<int>(p.r);
  // Where the lane accesses y: chunk `own_chunk` of row kChunkRows * pass + own_row.
  const int own_chunk = lane % kRowChunks;
  const int own_row = lane / kRowChunks;

  for (Count column_group = unit % column_groups; column_group < column_groups; column_group += warps) {
    const int64_t column0 = static_cast<int64_t>(column_group) * Traits::kColumns;
    const int64_t column = column0 + 8 * own_chunk;
    const bool in_row = column < p.m;
    uint32_t b[Traits::kGroups][kSteps][4][2];
#pragma unroll
    for (int g = 0; g < Traits::kGroups; ++g) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_basis<T, true>(b[g][step], p, column0 + g * kExpandGroupColumns, 16 * step, i, c);
      }
    }
    uint4 bias = make_uint4(0, 0, 0, 0);
    if (Traits::kStart == Start::kBias && in_row) {
      bias = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.bias) + column));
    }
    // Rows that are left from the stripe's tile on; pointers to its rows of z and (this lane's) of y.
    int64_t left = p.tokens - stripe * kTileRows;
    const T* z = static_cast<const T*>(p.z) + stripe * kTileRows * p.z_stride;
    T* y = static_cast<T*>(p.y) + (stripe * kTileRows + own_row) * p.y_stride + column;
    const int64_t z_step = layout.stripes * kTileRows * p.z_stride;
    const int pass_step = Traits::kChunkRows * static_cast<int>(p.y_stride);
    const auto z_stride = static_cast<int>(p.z_stride);
    const int64_t y_step = layout.stripes * kTileRows * p.y_stride;
    // Upper and lower rows' ranks of z; the next tile's are asked for as soon as this one's have served.
    uint2 ranks[kSteps][2];
    const auto load_z = [&](const T* from, int64_t rows) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int rank = 16 * step + 4 * c;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = i + 8 * half;
          ranks[step][half] = make_uint2(0, 0);
          if (rank < r && row < rows) {
            ranks[step][half] = __ldg(reinterpret_cast<const uint2*>(from + row * z_stride + rank));
          }
        }
      }
    };
    int64_t asked = left;  // rows from the tile on that is asked for next
    const auto request_z = [&](int slot) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int row = (k * kWarpLanes + lane) / Traits::kRankChunks;
        const int chunk = (k * kWarpLanes + lane) % Traits::kRankChunks;
        if (8 * chunk < r && row < asked) {
          copy_async(queue + slot * kTileRows * Traits::kRankChunks + queue_place<Traits>(row, chunk),
                     z + row * z_stride + 8 * chunk);
        }
      }
      commit_copies();
      z += z_step;
      asked -= layout.stripes * kTileRows;
    };
    int slot = 0;
    if constexpr (Traits::kQueued) {
      for (int e = lane; e < Traits::kQueueChunks; e += kWarpLanes)
        queue[e] = make_uint4(0, 0, 0, 0);  // ranks behind r
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kExpandStages - 1; ++k) request_z(k);
    } else {
      load_z(z, left);
    }

    for (; left > 0; left -= layout.stripes * kTileRows, y += y_step) {
      const int rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
      uint4 old[Traits::kStart == Start::kOutput ? Traits::kPasses : 1];
      if constexpr (Traits::kStart == Start::kOutput) {
        const T* from = y;
#pragma unroll
        for (int pass = 0; pass < Traits::kPasses; ++pass, from += pass_step) {
          old[pass] = make_uint4(0, 0, 0, 0);
          if (in_row && Traits::kChunkRows * pass + own_row < rows) old[pass] = *reinterpret_cast<const uint4*>(from);
        }
      }
      const uint4* const waiting = queue + slot * kTileRows * Traits::kRankChunks;
      if constexpr (Traits::kQueued) {
        wait_copies<kExpandStages - 2>();
        __syncwarp();  // all lanes' copies of this tile have come, and all lanes have read the tile before
        request_z(slot == 0 ? kExpandStages - 1 : slot - 1);
        slot = slot == kExpandStages - 1 ? 0 : slot + 1;
      }
      // From fragments to rows, 32 columns at a time.
#pragma unroll
      for (int g = 0; g < Traits::kGroups; ++g) {
        float sum[4][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint2 upper = ranks[step][0];
          uint2 lower = ranks[step][1];
          if constexpr (Traits::kQueued) {
            const int chunk = 2 * step + c / 2;
            upper = reinterpret_cast<const uint2*>(waiting + queue_place<Traits>(i, chunk))[c % 2];
            lower = reinterpret_cast<const uint2*>(waiting + queue_place<Traits>(i + 8, chunk))[c % 2];
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply_16x8x16<T>(sum[j], upper.x, lower.x, upper.y, lower.y, b[g][step][j][0], b[g][step][j][1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = i + 8 * half;
          const int e = 2 * half;
          if constexpr (Traits::kWide) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              float4* const to =
                  reinterpret_cast<float4*>(tile_chunks) + wide_place(row, 8 * g + 2 * c + k, kRowChunks);
              *to = make_float4(sum[2 * k][e], sum[2 * k][e + 1], sum[2 * k + 1][e], sum[2 * k + 1][e + 1]);
            }
          } else {
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = Pack<T>::pack(p.scaling * sum[j][e], p.scaling * sum[j][e + 1]);
            tile_chunks[narrow_place(row, 4 * g + c, kRowChunks)] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          }
        }
        __syncwarp();  // keeps the sums of one group alive at a time
      }
      if constexpr (!Traits::kQueued) {
        z += z_step;
        load_z(z, left - layout.stripes * kTileRows);
      }
      T* to = y;
#pragma unroll
      for (int pass = 0; pass < Traits::kPasses; ++pass, to += pass_step) {
        const int row = Traits::kChunkRows * pass + own_row;
        uint4 out;
        if constexpr (Traits::kWide) {
          const float4* const from = reinterpret_cast<const float4*>(tile_chunks);
          const float4 low = from[wide_place(row, 2 * own_chunk, kRowChunks)];
          const float4 high = from[wide_place(row, 2 * own_chunk + 1, kRowChunks)];
          const uint4 start = Traits::kStart == Start::kBias ? bias : old[Traits::kStart == Start::kOutput ? pass : 0];
          const float2 start0 = Pack<T>::unpack(start.x), start1 = Pack<T>::unpack(start.y);
          const float2 start2 = Pack<T>::unpack(start.z), start3 = Pack<T>::unpack(start.w);
          out.x = Pack<T>::pack(fmaf(p.scaling, low.x, start0.x), fmaf(p.scaling, low.y, start0.y));
          out.y = Pack<T>::pack(fmaf(p.scaling, low.z, start1.x), fmaf(p.scaling, low.w, start1.y));
          out.z = Pack<T>::pack(fmaf(p.scaling, high.x, start2.x), fmaf(p.scaling, high.y, start2.y));
          out.w = Pack<T>::pack(fmaf(p.scaling, high.z, start3.x), fmaf(p.scaling, high.w, start3.y));
        } else {
          out = tile_chunks[narrow_place(row, own_chunk, kRowChunks)];
        }
        if (in_row && row < rows) *reinterpret_cast<uint4*>(to) = out;
      }
      __syncwarp();  // the tile's memory is free again
    }
  }
}

}  // namespace tfb::cuda
