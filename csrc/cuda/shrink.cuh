// shrink in half precision, the kernel and its launch; shrink_bfloat16.cu and shrink_float16.cu instantiate it.
//
// Weights stand still and rows stream past. The columns are split into panels, one a block; the blocks of all panels share
// a range of rows, which they go through together, a tile of rows a warp at a time. A block makes its panel's weights,
// M + sigma E, when the first rows of a sample come, chunk by chunk between their products, and keeps them in shared
// memory for the sample's other rows: noise is made once a sample and range, not once a tile.
//
// Each warp has a queue of stages of x in shared memory, its own: no block-wide barrier stands between the copies and the
// products. Within 32 columns the order of k is permuted so that lane (i = lane / 4, c = lane % 4) owns columns
// 8c .. 8c + 7 of rows i and i + 8, one 16-byte read a row. The copies are the bulk engine's, a row's 256 bytes each, where
// there is one; else each lane's own.
//
// The panels' sums of a row meet in the order of the panels: in distributed shared memory where the panels of a range are
// a cluster, else in global memory, where a second kernel adds them up.
#pragma once

#include "elements.cuh"
#include "machine.h"
#include "sample.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

// 16-byte chunks of a stage: a row has 16. Four of nothing lie in the middle of a pair of rows, so that the two, which are
// read together, lie in different banks.
constexpr int kRowChunks = kStageColumns / 8;
constexpr int kPairChunks = 2 * kRowChunks + 4;
__device__ __forceinline__ int row_chunk(int row) { return row / 2 * kPairChunks + row % 2 * (kRowChunks + 4); }
constexpr int kBarrierBytes = 256;  // of all warps' stages

// Tiles of a warp between two meetings of the cluster: as many as the sums have room for beside two blocks' queues.
constexpr int warp_tiles_of(int rank_tiles) { return rank_tiles == 1 ? 4 : rank_tiles == 2 ? 2 : 1; }

// How x comes to shared memory: kPlain through registers, for rows that do not start and end on 16 bytes.
enum class Feed { kBulk, kAsync, kPlain };

template <class T, int kRankTiles_, int kWarps_, Mode kMode_, Feed kFeed_>
struct ShrinkTraits {
  using Element = T;
  static constexpr int kRankTiles = kRankTiles_;  // of 8 ranks
  static constexpr int kWarps = kWarps_;
  static constexpr Mode kMode = kMode_;
  static constexpr Feed kFeed = kFeed_;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kRanks = kTileRanks * kRankTiles;
  static constexpr int kWarpTiles = kMode == Mode::kWeight ? warp_tiles_of(kRankTiles) : 1;
  static constexpr int kRoundTiles = kWarpTiles * kWarps;
  static constexpr int kRoundRows = kTileRows * kRoundTiles;
  // flipout sums M x and E (s o x) apart.
  static constexpr int kPlanes = kMode == Mode::kFlipout ? 2 : 1;
  static constexpr int kStageChunks = kTileRows / 2 * kPairChunks;
  static constexpr int kQueueBytes = kWarps * kShrinkStages * kStageChunks * 16;
  static constexpr int kWeightBytes = kPlanes * kRanks * 2;  // of one column
  // Floats between rows of the sums: the planes and, in token mode, |x|^2; even, and not a multiple of 32 banks.
  static constexpr int kSumPitch = kPlanes * kRanks + 2;
  static constexpr int kSumBytes = kRoundRows * kSumPitch * 4;
  static constexpr int kFixedBytes = kBarrierBytes + kQueueBytes + kSumBytes;  // shared memory but for the weights
  // Where shared memory has room for several blocks, registers should have it too.
  static constexpr int kMinBlocks =
      kWarps == 4 ? (kRankTiles <= 2 && kMode == Mode::kWeight ? 4 : 3) : kRankTiles <= 3 ? 2 : 1;
  // Ranks whose noise a thread makes at a time: two chains overlap, where registers allow it.
  static constexpr int kWeightUnroll = kRankTiles == 8 ? 1 : 2;
  static_assert(kBarrierBytes >= kWarps * kShrinkStages * 8);
  static_assert(kStageColumns == 4 * kWarpLanes, "a lane makes four columns of a rank");
  static_assert(kStageColumns == kSignsPerCounter, "one counter's signs cover a stage");
};

struct ShrinkLayout {
  int32_t panel_columns;  // a multiple of a stage
  int32_t panels;
  int32_t ranges;
  int32_t group_ranges;        // of each group, or 0 where ranges cross groups
  int32_t group_tiles, tiles;  // of 16 rows: in a group, in all groups
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
  const auto mask = [signs](int pair) {
    return (signs >> 2 * pair & 1u) << 15 | (signs >> (2 * pair + 1) & 1u) << 31;
  };
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

// A round of a block's work, between two meetings of the cluster: tiles of one group, up to kTiles of them.
template <int kTiles>
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
    count = left < kTiles ? left : kTiles;
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

// Copies stages of this warp's tiles into its queue: tiles warp, warp + kWarps, ... of a round, one round after the other.
// The first of them takes its turn in every round, whether it exists or not, as it does in the kernel.
template <class Traits>
struct Feeder {
  using T = typename Traits::Element;
  const ShrinkParams& p;
  const ShrinkLayout& layout;
  uint4* queue;
  CopyBarrier* barriers;
  const int64_t column0;
  const int columns;  // of the panel
  const int32_t end;
  const int warp, lane;
  Round<Traits::kRoundTiles> round;
  int index;  // of the tile in its round
  int stage = 0;
  const T* source = nullptr;  // of the tile's first row and the panel's first column
  int rows = 0;               // of the tile, 0 without one

  __device__ __forceinline__ Feeder(const ShrinkParams& p, const ShrinkLayout& layout, unsigned char* shared,
                                    int64_t column0, int columns, int32_t first, int32_t end)
      : p(p),
        layout(layout),
        column0(column0),
        columns(columns),
        end(end),
        warp(threadIdx.x / kWarpLanes),
        lane(threadIdx.x % kWarpLanes),
        round(layout, first, end),
        index(warp) {
    barriers = reinterpret_cast<CopyBarrier*>(shared) + warp * kShrinkStages;
    queue = reinterpret_cast<uint4*>(shared + kBarrierBytes) + warp * kShrinkStages * Traits::kStageChunks;
    aim();
  }

  __device__ __forceinline__ void aim() {
    const int64_t row = round.row(layout, index);
    const int64_t left = p.rows_per_group - row;
    rows = index < round.count ? static_cast<int>(left < kTileRows ? left : kTileRows) : 0;
    source = static_cast<const T*>(p.x) + (round.group * p.rows_per_group + row) * p.x_stride + column0;
  }

  // Asks for the next stage, to lie in `slot`.
  __device__ __forceinline__ void request(int slot) {
    if (rows > 0) {
      const int column = stage * kStageColumns;
      const int left = columns - column;  // at least 1
      uint4* const target = queue + slot * Traits::kStageChunks;
      if constexpr (Traits::kFeed == Feed::kBulk) {
        const uint32_t bytes = 2 * (left < kStageColumns ? left : kStageColumns);
        if (lane == 0) expect_bytes(barriers + slot, rows * bytes);
        if (lane < rows) {
          copy_bulk(target + row_chunk(lane), source + lane * p.x_stride + column, bytes, barriers + slot);
        }
      } else {
        const int chunk = lane % kRowChunks;
        const int parity = lane / kRowChunks;
        const T* from = source + parity * p.x_stride + column + 8 * chunk;
        uint4* to = target + row_chunk(parity) + chunk;
        const int count = left - 8 * chunk;
#pragma unroll
        for (int row = 0; row < kTileRows; row += 2, from += 2 * p.x_stride, to += kPairChunks) {
          if (row + parity >= rows || count <= 0) continue;
          if constexpr (Traits::kFeed == Feed::kAsync) copy_async(to, from);
          else *to = load_eight(from, count, false);
        }
      }
    }
    if constexpr (Traits::kFeed == Feed::kAsync) commit_copies();
    if (++stage * kStageColumns >= columns) {
      stage = 0;
      index += Traits::kWarps;
      if (index >= round.count) {
        round.advance(layout, end);
        index = warp;
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
  if constexpr (Traits::kFeed == Feed::kBulk) return;  // never launched: leave the rest out of the binary
#endif
  using T = typename Traits::Element;
  constexpr int kRankTiles = Traits::kRankTiles;
  constexpr int kPitch = Traits::kSumPitch;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  unsigned char* const shared = dynamic_shared();
  float* const sums = reinterpret_cast<float*>(shared + kBarrierBytes + Traits::kQueueBytes);
  T* const weights = reinterpret_cast<T*>(shared + Traits::kFixedBytes);

  const auto panel = static_cast<int>(blockIdx.x % layout.panels);
  const auto range = static_cast<int32_t>(blockIdx.x / layout.panels);
  const int32_t first = range_start(layout, range);
  const int32_t end = range_start(layout, range + 1);
  const int64_t column0 = static_cast<int64_t>(panel) * layout.panel_columns;
  const int64_t rest = p.n - column0;
  const int columns = rest <= 0 ? 0 : rest < layout.panel_columns ? static_cast<int>(rest) : layout.panel_columns;
  const int stages = (columns + kStageColumns - 1) / kStageColumns;

  Feeder<Traits> feeder(p, layout, shared, column0, columns, first, end);
  if constexpr (Traits::kFeed == Feed::kBulk) {
    if (lane == 0) {
#pragma unroll
      for (int slot = 0; slot < kShrinkStages; ++slot) start_barrier(feeder.barriers + slot);
    }
    __syncthreads();
  }
  if (stages > 0) {
#pragma unroll
    for (int slot = 0; slot < kShrinkStages; ++slot) feeder.request(slot);
  }

  int slot = 0;
  uint32_t phases = 0;  // a bit for each slot: the parity of the copy that comes next
  int32_t group = -1;
  for (Round<Traits::kRoundTiles> now(layout, first, end); now.count > 0; now.advance(layout, end)) {
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
        if (Traits::kFeed == Feed::kBulk && busy) {
          wait_bulk(feeder.barriers + slot, phases >> slot & 1u);
          phases ^= 1u << slot;
        }
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
          const uint4* const from = feeder.queue + slot * Traits::kStageChunks + row_chunk(i) + c;
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
    cluster_arrive();
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

inline int64_t panel_columns(int64_t n) {
  const int panels = shrink_panels(n);
  return ((n + panels - 1) / panels + kStageColumns - 1) / kStageColumns * kStageColumns;
}

template <class Traits>
cudaError_t launch_tiles(const ShrinkParams& p, const Machine& machine, cudaStream_t stream) {
  ShrinkLayout layout{};
  layout.panels = shrink_panels(p.n);
  layout.clustered = machine.clusters || layout.panels == 1;
  const int64_t columns = panel_columns(p.n);
  const int64_t group_tiles = (p.rows_per_group + kTileRows - 1) / kTileRows;
  if (columns > INT32_MAX / 2 || group_tiles * p.groups > INT32_MAX) return cudaErrorInvalidConfiguration;
  layout.panel_columns = static_cast<int32_t>(columns);
  layout.group_tiles = static_cast<int32_t>(group_tiles);
  layout.tiles = static_cast<int32_t>(group_tiles * p.groups);
  layout.mean_aligned = means_aligned(p, p.mean_format == Format::kFloat32 ? 16 : 8);
  layout.z_aligned = results_aligned(p, 4);
  LaunchShape shape{dim3(1), Traits::kThreads};
  shape.shared = Traits::kFixedBytes + static_cast<size_t>(columns) * Traits::kWeightBytes;
  shape.cluster = layout.clustered ? layout.panels : 1;
  int resident = 0;
  cudaError_t status = resident_clusters(shrink_kernel<Traits>, shape, resident);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  const int32_t ranges = layout.clustered ? resident : (resident + layout.panels - 1) / layout.panels;
  layout.ranges = ranges < layout.tiles ? ranges : layout.tiles;
  // Ranges that stay within a sample make its noise once; that is worth leaving a few clusters idle.
  if (p.groups <= layout.ranges) {
    layout.group_ranges = layout.ranges / static_cast<int32_t>(p.groups);
    layout.ranges = layout.group_ranges * static_cast<int32_t>(p.groups);
  }
  shape.grid = dim3(static_cast<unsigned>(layout.ranges * layout.panels));
  status = launch(shrink_kernel<Traits>, shape, stream, p, layout);
  if (status != cudaSuccess || layout.clustered) return status;
  const int64_t pairs = p.groups * p.rows_per_group * (Traits::kRanks / 2);
  const int64_t blocks = (pairs + Traits::kThreads - 1) / Traits::kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(reduce_kernel<Traits>, {dim3(static_cast<unsigned>(blocks)), Traits::kThreads}, stream, p, layout);
}

// Rank tiles and warps of a block. More warps share the weights of a block that has a multiprocessor to itself.
struct Choice {
  int tiles, warps;
};
constexpr Choice kBulkChoices[] = {{1, 8}, {2, 8}, {3, 8}, {4, 12}, {8, 8}};
constexpr Choice kAsyncChoices[] = {{1, 4}, {2, 4}, {4, 4}};
constexpr Choice kPlainChoices[] = {{2, 4}};  // the rare feed
constexpr Choice kModeChoices[] = {{2, 4}};   // flipout and token, whatever the feed

// The first with room for all the tiles, else the last that the device's shared memory holds; no tiles if it holds none.
template <int kCount>
Choice choose(const Choice (&choices)[kCount], const ShrinkParams& p, const Machine& machine, int planes) {
  Choice best{0, 0};
  for (const Choice& choice : choices) {
    const int64_t ranks = choice.tiles * kTileRanks;
    const int warp_tiles = p.mode == Mode::kWeight ? warp_tiles_of(choice.tiles) : 1;
    const int64_t sums = choice.warps * warp_tiles * kTileRows * (planes * ranks + 2) * 4;
    const int64_t queue = choice.warps * kShrinkStages * kTileRows / 2 * kPairChunks * 16;
    const int64_t weights = panel_columns(p.n) * planes * ranks * 2;
    if (kBarrierBytes + queue + sums + weights > machine.shared_bytes) continue;
    if (choice.tiles > best.tiles) best = choice;
    if (choice.tiles >= p.tile_count) break;
  }
  return best;
}

template <class T>
cudaError_t launch_pass(const ShrinkParams& p, const Machine& machine, Feed feed, const Choice& choice,
                        cudaStream_t stream) {
  const auto is = [&choice](int tiles, int warps) { return choice.tiles == tiles && choice.warps == warps; };
  if (p.mode == Mode::kFlipout) {
    if (feed == Feed::kPlain) return launch_tiles<ShrinkTraits<T, 2, 4, Mode::kFlipout, Feed::kPlain>>(p, machine, stream);
    return launch_tiles<ShrinkTraits<T, 2, 4, Mode::kFlipout, Feed::kAsync>>(p, machine, stream);
  }
  if (p.mode == Mode::kToken) {
    if (feed == Feed::kPlain) return launch_tiles<ShrinkTraits<T, 2, 4, Mode::kToken, Feed::kPlain>>(p, machine, stream);
    return launch_tiles<ShrinkTraits<T, 2, 4, Mode::kToken, Feed::kAsync>>(p, machine, stream);
  }
  constexpr Mode kWeight = Mode::kWeight;
  if (feed == Feed::kPlain) return launch_tiles<ShrinkTraits<T, 2, 4, kWeight, Feed::kPlain>>(p, machine, stream);
  if (feed == Feed::kAsync) {
    if (is(1, 4)) return launch_tiles<ShrinkTraits<T, 1, 4, kWeight, Feed::kAsync>>(p, machine, stream);
    if (is(2, 4)) return launch_tiles<ShrinkTraits<T, 2, 4, kWeight, Feed::kAsync>>(p, machine, stream);
    return launch_tiles<ShrinkTraits<T, 4, 4, kWeight, Feed::kAsync>>(p, machine, stream);
  }
  if (is(1, 8)) return launch_tiles<ShrinkTraits<T, 1, 8, kWeight, Feed::kBulk>>(p, machine, stream);
  if (is(2, 8)) return launch_tiles<ShrinkTraits<T, 2, 8, kWeight, Feed::kBulk>>(p, machine, stream);
  if (is(3, 8)) return launch_tiles<ShrinkTraits<T, 3, 8, kWeight, Feed::kBulk>>(p, machine, stream);
  if (is(4, 12)) return launch_tiles<ShrinkTraits<T, 4, 12, kWeight, Feed::kBulk>>(p, machine, stream);
  return launch_tiles<ShrinkTraits<T, 8, 8, kWeight, Feed::kBulk>>(p, machine, stream);
}

template <class T>
cudaError_t launch_shrink_half(const ShrinkParams& params, cudaStream_t stream) {
  Machine machine;
  cudaError_t status = current_machine(machine);
  const bool aligned = is_aligned(params.x, 16) && params.x_stride % 8 == 0 && params.n % 8 == 0;
  const Feed feed = !aligned ? Feed::kPlain : machine.clusters ? Feed::kBulk : Feed::kAsync;
  ShrinkParams pass = params;
  for (int first = 0; first < params.tile_count && status == cudaSuccess; first += pass.tile_count) {
    pass.tile_count = params.tile_count - first;
    const int planes = params.mode == Mode::kFlipout ? 2 : 1;
    const Choice choice = params.mode != Mode::kWeight ? choose(kModeChoices, pass, machine, planes)
                          : feed == Feed::kBulk        ? choose(kBulkChoices, pass, machine, planes)
                          : feed == Feed::kAsync       ? choose(kAsyncChoices, pass, machine, planes)
                                                       : choose(kPlainChoices, pass, machine, planes);
    if (choice.tiles == 0) return cudaErrorLaunchOutOfResources;
    if (pass.tile_count > choice.tiles) pass.tile_count = choice.tiles;
    for (int k = 0; k < pass.tile_count; ++k) pass.tiles[k] = params.tiles[first + k];
    status = launch_pass<T>(pass, machine, feed, choice, stream);
  }
  return status;
}

}  // namespace tfb::cuda
