// Half the launch splits the columns of x: a unit is one sample, one tile of eight ranks and 512 columns, of which each
// of a block's warps takes 64. A block's units are neighbours in the order of the samples; two of them that share E (an
// antithetic pair, one sample under two sigmas) draw it once. The sums of a unit go to global memory. After a barrier
// over the grid every block adds them up in the order of the columns, for all rows and ranks, and its warps write the
// outputs, 64 columns at a time. What does not depend on the sums, the first basis rows, is fetched before the barrier.
//
// A row's bits depend on neither the rows nor the samples beside it. They may differ in the last place from shrink's.
#include "decode.h"

#include "decode_sums.cuh"
#include "elements.cuh"
#include "grid_barrier.cuh"
#include "machine.h"
#include "sample.cuh"
#include "tuning.h"

namespace tfb::cuda {

namespace {

int64_t slice_count(const ShrinkParams& p) { return (p.n + kDecodeSliceColumns - 1) / kDecodeSliceColumns; }
int64_t unit_count(const ShrinkParams& p) { return slice_count(p) * p.groups * p.tile_count; }

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
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
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
  for (int e = threadIdx.x; e < tokens * ranks; e += kDecodeThreads) {
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
    z[row_of(p.maps[0], group, row) * ranks + rank] = sample.template finish<kMode>(
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
  LaunchShape shape{dim3(1), kDecodeThreads};
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
