// shrink in half precision, the kernel and its choice of tiles; shrink_bfloat16.cu and shrink_float16.cu instantiate
// it.
//
// A block owns a tile of rows of one group and up to 64 ranks; each of its warps owns some of the rows. Blocks of a
// cluster own the same tile and split the columns; their sums meet through distributed shared memory, in the order of
// the blocks.
//
// x is bound for the fragments of the product from the start: within 32 columns the order of k is permuted so that lane
// (i = lane / 4, c = lane % 4) owns columns 8c .. 8c + 7 of rows i and i + 8, one 16-byte copy a row. Each lane copies
// only what it will read itself, into a queue of its own in shared memory: no barrier stands between the copies and the
// products, and as many copies are under way as the queue holds.
//
// The weights of a chunk of columns are made once a block, by all of its threads, four columns a Philox counter, while
// the products of the chunk before still wait for x: a barrier a chunk, two buffers in turn. The more rows a block
// owns, the less often the same noise is made again.
#pragma once

#include "elements.cuh"
#include "machine.h"
#include "sample.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

template <class T, int kRankTiles_, int kRowTiles_, int kWarps_, Mode kMode_>
struct ShrinkTraits {
  using Element = T;
  static constexpr int kRankTiles = kRankTiles_;  // of 8 ranks, in a block
  static constexpr int kRowTiles = kRowTiles_;    // of 16 rows, in a warp
  static constexpr int kWarps = kWarps_;
  static constexpr Mode kMode = kMode_;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kRanks = kTileRanks * kRankTiles;
  static constexpr int kWarpRows = kTileRows * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarps;
  // flipout sums M x and E (s o x) apart.
  static constexpr int kPlanes = kMode == Mode::kFlipout ? 2 : 1;
  static constexpr int kItems = 2 * kRowTiles;   // 16-byte copies of a lane for one piece of columns
  static constexpr int kStages = 8 / kRowTiles;  // pieces in the queue: 256 bytes a lane
  static constexpr int kQueueBytes = kStages * kItems * kThreads * 16;
  static constexpr int kWeightBytes = kPlanes * kRanks * kChunkColumns * 2;  // of one of the two buffers
  // Floats between rows of the sums: the planes, and in token mode |x|^2; even, and not a multiple of 32 banks.
  static constexpr int kSumPitch = kPlanes * kRanks + 2;
  static constexpr int kSumBytes = kRows * kSumPitch * 4;
  static constexpr int kSharedBytes =
      kQueueBytes + 2 * kWeightBytes > kSumBytes ? kQueueBytes + 2 * kWeightBytes : kSumBytes;
  // 16 warps a multiprocessor, with up to 128 registers a thread.
  static constexpr int kMinBlocks = 16 / kWarps;
  static_assert(kRanks % kWarps == 0, "every warp makes the weights of equally many ranks");
  static_assert(kChunkColumns == 4 * kWarpLanes, "a lane makes four columns of a rank");
  static_assert(kPlanes * kRankTiles * kRowTiles <= 16, "accumulators would not leave room for the noise");
  static_assert(kMode != Mode::kFlipout || kItems == 2, "a lane draws the signs of one of two rows");
  static_assert(kStages % kChunkPieces == 0, "a piece's stage is known at compile time but for its chunk");
};

struct ShrinkLayout {
  int64_t block_columns;  // of one block of a cluster, a multiple of a chunk
  int32_t cluster;        // blocks of a cluster
  bool x_aligned, mean_aligned, z_aligned;
};

// Where one piece's weights of one rank lie in a buffer: [piece][plane][rank][column].
template <class Traits>
__device__ __forceinline__ int weight_offset(int piece, int plane, int rank) {
  return ((piece * Traits::kPlanes + plane) * Traits::kRanks + rank) * kPieceColumns;
}

// Makes M + scale E (in flipout mode M and E apart) of the block's ranks and of columns `column0` .. + 128.
template <class Traits>
__device__ __forceinline__ void make_weights(const ShrinkParams& p, bool mean_aligned, const Sample& sample,
                                             int first_tile, int64_t column0, typename Traits::Element* buffer) {
  using T = typename Traits::Element;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t column = column0 + 4 * lane;
  const int piece = lane / 8;
  const int place = 4 * (lane % 8);
#pragma unroll
  for (int u = 0; u < Traits::kRanks / Traits::kWarps; ++u) {
    const int rank = warp + Traits::kWarps * u;  // of the block; the same for the whole warp
    const int tile = first_tile + rank / kTileRanks;
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
    *reinterpret_cast<uint2*>(buffer + weight_offset<Traits>(piece, 0, rank) + place) =
        make_uint2(Pack<T>::pack(weight[0], weight[1]), Pack<T>::pack(weight[2], weight[3]));
    if constexpr (Traits::kMode == Mode::kFlipout) {
      *reinterpret_cast<uint2*>(buffer + weight_offset<Traits>(piece, 1, rank) + place) =
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

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    shrink_kernel(const __grid_constant__ ShrinkParams p, const ShrinkLayout layout) {
  using T = typename Traits::Element;
  constexpr int kItems = Traits::kItems;
  constexpr int kRankTiles = Traits::kRankTiles;
  constexpr int kPitch = Traits::kSumPitch;
  unsigned char* const shared = dynamic_shared();
  uint4* const queue = reinterpret_cast<uint4*>(shared) + threadIdx.x;  // [stage][item], kThreads apart
  T* const weights = reinterpret_cast<T*>(shared + Traits::kQueueBytes);

  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const int64_t row_tiles = (p.rows_per_group + Traits::kRows - 1) / Traits::kRows;
  const int64_t tile = blockIdx.x / layout.cluster;
  const auto member = static_cast<int>(blockIdx.x - tile * layout.cluster);
  const int64_t group = tile / row_tiles;
  const int64_t tile_row = (tile - group * row_tiles) * Traits::kRows;  // within the group
  const int64_t rows = p.rows_per_group - tile_row;                     // of this block; may exceed its tile
  const int first_tile = blockIdx.y * kRankTiles;
  const Sample sample(p, group);

  const int64_t begin = member * layout.block_columns;
  const int64_t end = begin + layout.block_columns < p.n ? begin + layout.block_columns : p.n;
  const int pieces = end > begin ? static_cast<int>((end - begin + kPieceColumns - 1) / kPieceColumns) : 0;
  const int chunks = (pieces + kChunkPieces - 1) / kChunkPieces;
  const auto lane_row = static_cast<int64_t>(warp * Traits::kWarpRows + i);
  const int64_t rows_left = rows - lane_row;  // item `it` of this lane exists where 8 it < rows_left
  const T* const x0 = static_cast<const T*>(p.x);
  const T* const source = x0 + (group * p.rows_per_group + tile_row + lane_row) * p.x_stride + begin + 8 * c;

  const auto request = [&](int piece) {
    if (piece < pieces) {
      const int64_t left = p.n - begin - piece * kPieceColumns - 8 * c;
      const int bytes = left >= 8 ? 16 : left > 0 ? static_cast<int>(2 * left) : 0;
      uint4* slot = queue + piece % Traits::kStages * kItems * Traits::kThreads;
#pragma unroll
      for (int item = 0; item < kItems; ++item, slot += Traits::kThreads) {
        const T* from = source + 8 * item * p.x_stride + piece * kPieceColumns;
        const bool exists = 8 * item < rows_left && bytes > 0;
        if (layout.x_aligned) copy_async(slot, exists ? from : x0, exists ? bytes : 0);
        else *slot = load_eight(from, exists ? left : 0, false);
      }
    }
    commit_copies();
  };

  float sum[Traits::kPlanes][Traits::kRowTiles][kRankTiles][4] = {};
  float squares[kItems] = {};
#pragma unroll
  for (int piece = 0; piece < Traits::kStages - 1; ++piece) request(piece);
  if (chunks > 0) make_weights<Traits>(p, layout.mean_aligned, sample, first_tile, begin, weights);
  __syncthreads();

  for (int chunk = 0; chunk < chunks; ++chunk) {
    constexpr int kBufferElements = Traits::kWeightBytes / 2;
    if (chunk + 1 < chunks) {
      make_weights<Traits>(p, layout.mean_aligned, sample, first_tile, begin + (chunk + 1) * kChunkColumns,
                           weights + (chunk + 1) % 2 * kBufferElements);
    }
    const T* buffer = weights + chunk % 2 * kBufferElements;
    uint32_t signs[2][kChunkPieces];
    if constexpr (Traits::kMode == Mode::kFlipout) {
      // Lane c draws for the rows of item c % 2; the four lanes of a row then read each other's.
      const auto token = static_cast<uint32_t>(tile_row + lane_row + 8 * (c % 2));
      const auto block = static_cast<uint32_t>((begin + chunk * kChunkColumns) / kSignsPerCounter);
      const PhiloxWords own = sample.input_signs(p.tiles[first_tile].layer, token, block);
#pragma unroll
      for (int item = 0; item < 2; ++item) {
#pragma unroll
        for (int k = 0; k < kChunkPieces; ++k) {
          signs[item][k] = __shfl_sync(0xFFFFFFFFu, own.word[k], 4 * i + item) >> 8 * c;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kChunkPieces; ++k) {
      const int piece = chunk * kChunkPieces + k;
      wait_copies<Traits::kStages - 2>();
      // The stage asked for now is the one whose products came last, all of them from registers by now.
      request(piece + Traits::kStages - 1);
      if (piece >= pieces) continue;
      const uint4* slot = queue + piece % Traits::kStages * kItems * Traits::kThreads;
      uint4 x[kItems];
#pragma unroll
      for (int item = 0; item < kItems; ++item) x[item] = slot[item * Traits::kThreads];
#pragma unroll
      for (int plane = 0; plane < Traits::kPlanes; ++plane) {
        if (plane == 1) {
          x[0] = flip(x[0], signs[0][k]);
          x[1] = flip(x[1], signs[1][k]);
        }
#pragma unroll
        for (int q = 0; q < kRankTiles; ++q) {
          const int offset = weight_offset<Traits>(k, plane, kTileRanks * q + i) + 8 * c;
          const uint4 b = *reinterpret_cast<const uint4*>(buffer + offset);
#pragma unroll
          for (int t = 0; t < Traits::kRowTiles; ++t) {
            const uint4 upper = x[2 * t];
            const uint4 lower = x[2 * t + 1];
            multiply_16x8x16<T>(sum[plane][t][q], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
            multiply_16x8x16<T>(sum[plane][t][q], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
          }
        }
      }
      if constexpr (Traits::kMode == Mode::kToken) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) squares[item] = sum_of_squares<T>(x[item], squares[item]);
      }
    }
    __syncthreads();
  }

  // The queue and the weights have served; their memory takes the sums, which the blocks of the cluster read from each
  // other. Copies past the last piece were never asked for.
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int t = 0; t < Traits::kRowTiles; ++t) {
    const int row = warp * Traits::kWarpRows + kTileRows * t + i;
#pragma unroll
    for (int plane = 0; plane < Traits::kPlanes; ++plane) {
#pragma unroll
      for (int q = 0; q < kRankTiles; ++q) {
        float* const upper = sums + row * kPitch + plane * Traits::kRanks + kTileRanks * q + 2 * c;
        *reinterpret_cast<float2*>(upper) = make_float2(sum[plane][t][q][0], sum[plane][t][q][1]);
        *reinterpret_cast<float2*>(upper + 8 * kPitch) = make_float2(sum[plane][t][q][2], sum[plane][t][q][3]);
      }
    }
  }
  if constexpr (Traits::kMode == Mode::kToken) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      float total = squares[item];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      if (c == 0) sums[(warp * Traits::kWarpRows + 8 * item + i) * kPitch + Traits::kRanks] = total;
    }
  }
  cluster_barrier();

  constexpr int kPairs = Traits::kRanks / 2;
  for (int e = member * Traits::kThreads + threadIdx.x; e < Traits::kRows * kPairs;
       e += layout.cluster * Traits::kThreads) {
    const int row = e / kPairs;
    const int rank = 2 * (e % kPairs);
    const int tile_index = first_tile + rank / kTileRanks;
    if (row >= rows || tile_index >= p.tile_count) continue;
    float2 mean = make_float2(0.0f, 0.0f);
    float2 other = make_float2(0.0f, 0.0f);
    for (int peer = 0; peer < layout.cluster; ++peer) {
      const float2 part = load_peer(sums + row * kPitch + rank, peer);
      mean.x += part.x, mean.y += part.y;
      if constexpr (Traits::kMode != Mode::kWeight) {
        const bool flipout = Traits::kMode == Mode::kFlipout;
        const float2 more = load_peer(sums + row * kPitch + Traits::kRanks + (flipout ? rank : 0), peer);
        other.x += more.x, other.y += flipout ? more.y : more.x;
      }
    }
    const RankTile& out = p.tiles[tile_index];
    const int place = rank % kTileRanks;
    const auto token = static_cast<uint32_t>(tile_row + row);
    const auto out_rank = static_cast<uint32_t>(out.row + place);
    mean.x = sample.template finish<Traits::kMode>(mean.x, other.x, out.layer, token, out_rank);
    mean.y = sample.template finish<Traits::kMode>(mean.y, other.y, out.layer, token, out_rank + 1);
    T* const z = static_cast<T*>(out.z) + (group * p.rows_per_group + tile_row + row) * out.z_stride + place;
    if (layout.z_aligned && place + 1 < out.rows) {
      *reinterpret_cast<uint32_t*>(z) = Pack<T>::pack(mean.x, mean.y);
    } else {
      if (place < out.rows) z[0] = Pack<T>::from_float(mean.x);
      if (place + 1 < out.rows) z[1] = Pack<T>::from_float(mean.y);
    }
  }
  cluster_barrier();  // no block leaves while another reads its sums
}

template <class Traits>
cudaError_t launch_tiles(const ShrinkParams& p, const Machine& machine, cudaStream_t stream) {
  ShrinkLayout layout{};
  layout.cluster = machine.clusters && p.n >= kClusterMinColumns ? kClusterBlocks : 1;
  layout.block_columns =
      ((p.n + layout.cluster - 1) / layout.cluster + kChunkColumns - 1) / kChunkColumns * kChunkColumns;
  layout.x_aligned = is_aligned(p.x, 16) && p.x_stride % 8 == 0;
  layout.mean_aligned = means_aligned(p, p.mean_format == Format::kFloat32 ? 16 : 8);
  layout.z_aligned = results_aligned(p, 4);
  const int64_t row_tiles = (p.rows_per_group + Traits::kRows - 1) / Traits::kRows;
  const int64_t blocks = row_tiles * p.groups * layout.cluster;
  const int passes = (p.tile_count + Traits::kRankTiles - 1) / Traits::kRankTiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  LaunchShape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(passes)), Traits::kThreads};
  shape.shared = Traits::kSharedBytes;
  shape.cluster = layout.cluster;
  return launch(shrink_kernel<Traits>, shape, stream, p, layout);
}

// Blocks that a tile of `rows` rows makes.
inline int64_t shrink_blocks(const ShrinkParams& p, const Machine& machine, int64_t rows, int rank_tiles) {
  const int64_t cluster = machine.clusters && p.n >= kClusterMinColumns ? kClusterBlocks : 1;
  return (p.rows_per_group + rows - 1) / rows * p.groups * cluster * ((p.tile_count + rank_tiles - 1) / rank_tiles);
}

// The largest tile that still gives every multiprocessor a block (two for the largest): large tiles make less noise
// again, small ones spread. It moves no bit of the result.
template <class T, int kRankTiles>
cudaError_t launch_ranks(const ShrinkParams& p, const Machine& machine, cudaStream_t stream) {
  const int64_t wanted = machine.multiprocessors;
  if constexpr (kRankTiles >= 4) {
    if (p.rows_per_group > 128 && shrink_blocks(p, machine, 256, kRankTiles) >= 2 * wanted) {
      return launch_tiles<ShrinkTraits<T, kRankTiles, 2, 8, Mode::kWeight>>(p, machine, stream);
    }
  }
  if (p.rows_per_group > 64 && shrink_blocks(p, machine, 128, kRankTiles) >= wanted) {
    return launch_tiles<ShrinkTraits<T, kRankTiles, 2, 4, Mode::kWeight>>(p, machine, stream);
  }
  return launch_tiles<ShrinkTraits<T, kRankTiles, 1, 4, Mode::kWeight>>(p, machine, stream);
}

template <class T>
cudaError_t launch_shrink_half(const ShrinkParams& p, cudaStream_t stream) {
  Machine machine;
  const cudaError_t status = current_machine(machine);
  if (status != cudaSuccess) return status;
  if (p.mode == Mode::kFlipout) return launch_tiles<ShrinkTraits<T, 2, 1, 4, Mode::kFlipout>>(p, machine, stream);
  if (p.mode == Mode::kToken) return launch_tiles<ShrinkTraits<T, 4, 1, 4, Mode::kToken>>(p, machine, stream);
  switch (p.tile_count) {
    case 1:
      return launch_ranks<T, 1>(p, machine, stream);
    case 2:
      return launch_ranks<T, 2>(p, machine, stream);
    case 3:
      return launch_ranks<T, 3>(p, machine, stream);
    case 4:
      return launch_ranks<T, 4>(p, machine, stream);
    default:
      return launch_ranks<T, 8>(p, machine, stream);
  }
}

}  // namespace tfb::cuda
