// Half the launch splits the columns of x: a unit is one sample, one tile of eight ranks and 512 columns, of which each
// of a block's warps takes 64. A block's units are neighbours in the order of the samples; two of them that share E (an
// antithetic pair, one sample under two sigmas) draw it once. The sums of a unit go to global memory. After a barrier
// over the grid every block adds them up in the order of the columns, for all rows and ranks, and its warps write the
// outputs, 64 columns at a time. What does not depend on the sums, the first basis rows, is fetched before the barrier.
//
// A row's bits depend on neither the rows nor the samples beside it. They may differ in the last place from shrink's.
#include "decode.h"

#include "elements.cuh"
#include "grid_barrier.cuh"
#include "machine.h"
#include "sample.cuh"
#include "tuning.h"

namespace tfb::cuda {

namespace {

constexpr int kThreads = kDecodeWarps * kWarpLanes;

// Floats of one row of a unit: eight sums, and eight of the noise (flipout) or the squares (token, padded).
template <Mode kMode>
constexpr int kUnitPitch = kMode == Mode::kWeight ? kTileRanks : 2 * kTileRanks;

// Units that a block takes at a time at most. In token mode there is no E to share.
template <Mode kMode>
constexpr int kSharing = kMode == Mode::kToken ? 1 : 2;

// Floats of a unit's sums in shared memory: each warp's.
template <Mode kMode>
constexpr int kUnitFloats = kDecodeWarps * kTileRows * kUnitPitch<kMode>;

int64_t slice_count(const ShrinkParams& p) { return (p.n + kDecodeSliceColumns - 1) / kDecodeSliceColumns; }
int64_t unit_count(const ShrinkParams& p) { return slice_count(p) * p.groups * p.tile_count; }

struct DecodeLayout {
  int64_t slices, units;
  int32_t block_units, longer_blocks;  // units of a block; blocks that have one more
  int64_t output_units;                // of 64 columns, all layers
  bool x_aligned, mean_aligned, basis_aligned;
};

// One tile's sums over a warp's columns: rows 0 .. 15 of a group, eight ranks.
template <class T>
struct Sums {
  // d0, d1: row i, ranks 2c, 2c + 1; d2, d3: row i + 8.
  float value[4] = {};
  __device__ __forceinline__ void add(uint4 upper, uint4 lower, const float (&weight)[8]) {
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) b[k] = Pack<T>::pack(weight[2 * k], weight[2 * k + 1]);
    multiply_16x8x16<T>(value, upper.x, lower.x, upper.y, lower.y, b[0], b[1]);
    multiply_16x8x16<T>(value, upper.z, lower.z, upper.w, lower.w, b[2], b[3]);
  }
  __device__ __forceinline__ void store(float* row0, int pitch, int i, int c) const {
    *reinterpret_cast<float2*>(row0 + i * pitch + 2 * c) = make_float2(value[0], value[1]);
    *reinterpret_cast<float2*>(row0 + (i + 8) * pitch + 2 * c) = make_float2(value[2], value[3]);
  }
};

// The share of one warp in a unit and, where the next one draws the same E (`both`), in that; half precision. The rows
// of a next one that is there (`more`) are asked for before it is known what it draws.
template <class T, Mode kMode>
__device__ __forceinline__ void sum_columns(const ShrinkParams& p, const DecodeLayout& layout, const RankTile& tile,
                                            const Sample& sample, float next_scale, bool more, bool both, int64_t group,
                                            int64_t column0, float* out) {
  constexpr int kPitch = kUnitPitch<kMode>;
  constexpr int kUnits = kSharing<kMode>;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const T* const x = static_cast<const T*>(p.x);
  const Weights<T> mean{tile.mean, p.mean_format == Format::kFloat32, layout.mean_aligned};
  Sums<T> sums[kUnits], noise[kUnits];
  float squares[2] = {};
#pragma unroll
  for (int piece = 0; piece < kDecodeWarpColumns / kPieceColumns; ++piece) {
    const int64_t column = column0 + piece * kPieceColumns + 8 * c;
    const int64_t columns = p.n - column;
    uint4 rows[kUnits][2];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i + 8 * half;
        const T* const from = x + row_of(p.map, group + u, row) * p.x_stride + column;
        rows[u][half] = load_eight(from, row < p.rows_per_group && (u == 0 || more) ? columns : 0, layout.x_aligned);
      }
    }
    float weight[8];
    mean.load(i * p.n + column, i < tile.rows ? columns : 0, weight);
    float normal[2][4] = {};
    if (kMode != Mode::kToken && (sample.scale != 0.0f || both)) {
      sample.draw(tile.layer, static_cast<uint32_t>(tile.row + i), column, normal[0]);
      sample.draw(tile.layer, static_cast<uint32_t>(tile.row + i), column + 4, normal[1]);
    }
    uint32_t signs[2];
    if constexpr (kMode == Mode::kFlipout) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PhiloxWords words = sample.input_signs(tile.layer, static_cast<uint32_t>(i + 8 * half),
                                                     static_cast<uint32_t>(column / kSignsPerCounter));
        signs[half] = sign_bits(words, static_cast<uint32_t>(column % kSignsPerCounter));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u > 0 && !both) break;
      float own[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float scale = u == 0 ? sample.scale : next_scale;
        own[k] = kMode == Mode::kWeight ? fmaf(scale, normal[k / 4][k % 4], weight[k]) : weight[k];
      }
      sums[u].add(rows[u][0], rows[u][1], own);
      if constexpr (kMode == Mode::kFlipout) {
#pragma unroll
        for (int k = 0; k < 8; ++k) own[k] = normal[k / 4][k % 4];
        noise[u].add(flip(rows[u][0], signs[0]), flip(rows[u][1], signs[1]), own);
      }
    }
    if constexpr (kMode == Mode::kToken) {
#pragma unroll
      for (int half = 0; half < 2; ++half) squares[half] = sum_of_squares<T>(rows[0][half], squares[half]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u, out += kUnitFloats<kMode>) {
    if (u > 0 && !both) break;
    sums[u].store(out, kPitch, i, c);
    if constexpr (kMode == Mode::kFlipout) noise[u].store(out + kTileRanks, kPitch, i, c);
  }
  if constexpr (kMode == Mode::kToken) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 1);
      squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 2);
      if (c == 0) out[(i + 8 * half) * kPitch + kTileRanks] = squares[half];
    }
  }
}

// The sums of one unit over its block's warps, in order, to global memory.
template <Mode kMode>
__device__ __forceinline__ void store_unit(const float (*sums)[kTileRows][kUnitPitch<kMode>], float* target,
                                           int64_t rows) {
  constexpr int kPitch = kUnitPitch<kMode>;
  constexpr int kUsed = kMode == Mode::kToken ? kTileRanks + 1 : kPitch;
  for (int e = threadIdx.x; e < rows * kPitch; e += kThreads) {
    const int row = e / kPitch;
    const int place = e % kPitch;
    if (place >= kUsed) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[w][row][place];
    target[e] = total;
  }
}

// Two columns' rows of a basis, eight ranks from rank0.
template <class T>
__device__ __forceinline__ void load_directions(const DecodeLayer& layer, const Weights<T>& basis, int64_t column,
                                                int rank0, float (&direction)[2][8]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    basis.load((column + k) * layer.r + rank0, column + k < layer.m ? layer.r - rank0 : 0, direction[k]);
  }
}

template <class T>
__device__ __forceinline__ void store_two(T* target, float first, float second, int64_t columns, bool paired) {
  if (paired && columns >= 2) {
    if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(target) = make_float2(first, second);
    else *reinterpret_cast<uint32_t*>(target) = Pack<T>::pack(first, second);
    return;
  }
  if (columns > 0) target[0] = Pack<T>::from_float(first);
  if (columns > 1) target[1] = Pack<T>::from_float(second);
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kThreads, kDecodeBlocks)
    decode_kernel(const __grid_constant__ DecodeParams f, const DecodeLayout layout) {
  constexpr int kPitch = kUnitPitch<kMode>;
  __shared__ float sums[kSharing<kMode>][kDecodeWarps][kTileRows][kPitch];
  float* const z = reinterpret_cast<float*>(dynamic_shared());  // [row of x][rank], of all layers
  const ShrinkParams& p = f.shrink;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;

  const auto block = static_cast<int>(blockIdx.x);
  const auto groups = static_cast<int>(p.groups);
  const int64_t unit =
      static_cast<int64_t>(block) * layout.block_units + (block < layout.longer_blocks ? block : layout.longer_blocks);
  int left = layout.block_units + (block < layout.longer_blocks ? 1 : 0);
  int group = static_cast<int>(unit % groups);
  int slice = static_cast<int>(unit / groups % layout.slices);
  int index = static_cast<int>(unit / groups / layout.slices);
  while (left > 0) {
    const RankTile& tile = p.tiles[index];
    const Sample sample(p, group);
    const bool more = kSharing<kMode> > 1 && left > 1 && group + 1 < groups;
    const Sample next(p, more ? group + 1 : group);
    const bool both = more && next.index == sample.index;
    sum_columns<T, kMode>(p, layout, tile, sample, next.scale, more, both, group,
                          static_cast<int64_t>(slice) * kDecodeSliceColumns + warp * kDecodeWarpColumns,
                          sums[0][warp][0]);
    __syncthreads();
    for (int u = 0; u < (both ? 2 : 1); ++u, ++group, --left) {
      float* const target =
          f.partial + ((index * p.groups + group) * layout.slices + slice) * p.rows_per_group * kPitch;
      store_unit<kMode>(sums[u], target, p.rows_per_group);
    }
    if (group == groups) group = 0, ++slice;
    if (slice == layout.slices) slice = 0, ++index;
    __syncthreads();
  }

  // Finds the layer of an output unit and turns the unit's number into one within the layer.
  const auto layer_of = [&](int64_t& unit) {
    int index = 0;
    for (; index + 1 < f.layer_count; ++index) {
      const int64_t own = (f.layers[index].m + kDecodeOutputColumns - 1) / kDecodeOutputColumns;
      if (unit < own) break;
      unit -= own;
    }
    return index;
  };
  const int64_t first_unit = static_cast<int64_t>(blockIdx.x) * kDecodeWarps + warp;
  float direction[2][8] = {};
  if (first_unit < layout.output_units) {
    int64_t unit = first_unit;
    const DecodeLayer& layer = f.layers[layer_of(unit)];
    const Weights<T> basis{layer.basis, f.basis_format == Format::kFloat32, layout.basis_aligned && layer.r % 8 == 0};
    load_directions(layer, basis, unit * kDecodeOutputColumns + 2 * lane, 0, direction);
  }
  grid_barrier();

  const int64_t tokens = p.groups * p.rows_per_group;
  const int ranks = kTileRanks * p.tile_count;
  for (int e = threadIdx.x; e < tokens * ranks; e += kThreads) {
    const int64_t token = e / ranks;
    const int rank = e % ranks;
    const RankTile& tile = p.tiles[rank / kTileRanks];
    const int place = rank % kTileRanks;
    const int64_t group = token / p.rows_per_group;
    const int64_t row = token - group * p.rows_per_group;
    const int64_t first = (rank / kTileRanks * p.groups + group) * layout.slices;
    const float* from = f.partial + (first * p.rows_per_group + row) * kPitch;
    float mean = 0.0f;
    float other = 0.0f;
    for (int64_t slice = 0; slice < layout.slices; ++slice, from += p.rows_per_group * kPitch) {
      mean += __ldcg(from + place);
      if constexpr (kMode == Mode::kFlipout) other += __ldcg(from + kTileRanks + place);
      if constexpr (kMode == Mode::kToken) other += __ldcg(from + kTileRanks);
    }
    const Sample sample(p, group);
    z[row_of(p.map, group, row) * ranks + rank] = sample.template finish<kMode>(
        mean, other, tile.layer, static_cast<uint32_t>(row), static_cast<uint32_t>(tile.row + place));
  }
  __syncthreads();

  bool fetched = true;
  for (int64_t next = first_unit; next < layout.output_units; next += static_cast<int64_t>(gridDim.x) * kDecodeWarps) {
    int64_t unit = next;
    const DecodeLayer& layer = f.layers[layer_of(unit)];
    const Weights<T> basis{layer.basis, f.basis_format == Format::kFloat32, layout.basis_aligned && layer.r % 8 == 0};
    const int64_t column = unit * kDecodeOutputColumns + 2 * lane;
    const int64_t columns = layer.m - column;
    const bool paired = layer.m % 2 == 0;
    float bias[2] = {};
    if (layer.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k < columns) bias[k] = Pack<T>::to_float(static_cast<const T*>(layer.bias)[column + k]);
      }
    }
    for (int64_t token0 = 0; token0 < tokens; token0 += kDecodeRowTile) {
      float sum[kDecodeRowTile][2] = {};
      for (int rank0 = 0; rank0 < layer.r; rank0 += 8) {
        if (!fetched) load_directions(layer, basis, column, rank0, direction);
        fetched = layer.r <= 8;
#pragma unroll
        for (int t = 0; t < kDecodeRowTile; ++t) {
          if (token0 + t >= tokens) break;
          const float* row = z + (token0 + t) * ranks + layer.first_tile * kTileRanks + rank0;
          const float4 low = *reinterpret_cast<const float4*>(row);
          const float4 high = *reinterpret_cast<const float4*>(row + 4);
          const float coefficient[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int q = 0; q < 8; ++q) {
            sum[t][0] = fmaf(coefficient[q], direction[0][q], sum[t][0]);
            sum[t][1] = fmaf(coefficient[q], direction[1][q], sum[t][1]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kDecodeRowTile; ++t) {
        if (token0 + t >= tokens) break;
        store_two(static_cast<T*>(layer.y) + (token0 + t) * layer.m + column, fmaf(layer.scaling, sum[t][0], bias[0]),
                  fmaf(layer.scaling, sum[t][1], bias[1]), columns, paired);
      }
    }
    fetched = false;
  }
}

template <class T, Mode kMode>
cudaError_t launch_kernel(const DecodeParams& f, cudaStream_t stream) {
  const ShrinkParams& p = f.shrink;
  DecodeLayout layout{};
  layout.slices = slice_count(p);
  layout.units = unit_count(p);
  layout.x_aligned = is_aligned(p.x, 16) && p.x_stride % 8 == 0;
  layout.mean_aligned = means_aligned(p, 16);
  layout.basis_aligned = true;
  for (int l = 0; l < f.layer_count; ++l) {
    layout.output_units += (f.layers[l].m + kDecodeOutputColumns - 1) / kDecodeOutputColumns;
    layout.basis_aligned = layout.basis_aligned && is_aligned(f.layers[l].basis, 16);
  }
  const int64_t tokens = p.groups * p.rows_per_group;
  const auto shared = static_cast<size_t>(tokens * kTileRanks * p.tile_count * sizeof(float));
  Machine machine;
  cudaError_t status = current_machine(machine);
  if (status != cudaSuccess) return status;
  LaunchShape shape{dim3(1), kThreads};
  shape.shared = kDecodeSharedBytes;  // the most that any call needs, so that one answer serves all
  int resident = 0;
  status = resident_clusters(decode_kernel<T, kMode>, shape, resident);
  if (status != cudaSuccess) return status;
  const int64_t output_blocks = (layout.output_units + kDecodeWarps - 1) / kDecodeWarps;
  const int64_t wanted = layout.units > output_blocks ? layout.units : output_blocks;
  const int64_t side_by_side = kDecodeBlocks * machine.multiprocessors;
  const int64_t most = resident < side_by_side ? resident : side_by_side;
  shape.grid = dim3(static_cast<unsigned>(wanted < most ? wanted : most));
  layout.block_units = static_cast<int32_t>(layout.units / shape.grid.x);
  layout.longer_blocks = static_cast<int32_t>(layout.units % shape.grid.x);
  shape.shared = shared;
  shape.cooperative = true;
  return launch(decode_kernel<T, kMode>, shape, stream, f, layout);
}

template <class T>
cudaError_t launch_type(const DecodeParams& f, cudaStream_t stream) {
  if (f.shrink.mode == Mode::kFlipout) return launch_kernel<T, Mode::kFlipout>(f, stream);
  if (f.shrink.mode == Mode::kToken) return launch_kernel<T, Mode::kToken>(f, stream);
  return launch_kernel<T, Mode::kWeight>(f, stream);
}

}  // namespace

int64_t decode_partial_floats(const ShrinkParams& p) {
  const int pitch = p.mode == Mode::kWeight ? kUnitPitch<Mode::kWeight> : kUnitPitch<Mode::kToken>;
  return unit_count(p) * p.rows_per_group * pitch;
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.shrink.format == Format::kBFloat16) return launch_type<__nv_bfloat16>(params, stream);
  return launch_type<__half>(params, stream);
}

}  // namespace tfb::cuda
