// expand in half precision: bound by y, which is read (where it is added to) and written once.
//
// A warp owns 32 columns; the product's columns are permuted so that lane (i = lane / 4, c = lane % 4) ends with the
// eight neighbours 8c .. 8c + 7 of rows i and i + 8, one 16-byte access each. k is permuted too: within 16 ranks, lane
// c reads ranks 4c .. 4c + 3 of z and of the basis in one piece. Up to 64 ranks the basis stays in registers over the
// block's rows and z lies in shared memory; larger ranks fetch both again for every 64.
#pragma once

#include "elements.cuh"
#include "expand.h"
#include "tuning.h"

namespace tfb::cuda {

constexpr int kWarpColumns = 32;
constexpr int kExpandColumns = kWarpColumns * kExpandWarps;
constexpr int kExpandRows = kTileRows * kExpandRowTiles;
constexpr int kExpandThreads = kExpandWarps * kWarpLanes;

template <class T, int kSteps_, bool kOnePass_, bool kAdd_>
struct ExpandTraits {
  using Element = T;
  static constexpr int kSteps = kSteps_;       // of 16 ranks
  static constexpr bool kOnePass = kOnePass_;  // the ranks are no more than these steps
  static constexpr bool kAdd = kAdd_;
  static constexpr int kRanks = 16 * kSteps;
  // Elements between rows of z in shared memory: the eight rows that half a warp reads fall on different banks.
  static constexpr int kPitch = kSteps == 1 ? kRanks : kRanks + 16;
  // Bound by memory: many warps where registers allow it.
  static constexpr int kMinBlocks = kSteps == 4 || !kOnePass ? 2 : kAdd ? 3 : 4;
};

// Four neighbouring ranks of one row of z as two registers.
template <class T>
__device__ __forceinline__ uint2 load_four(const T* source, int64_t count, bool aligned) {
  if (aligned && count >= 4) return __ldg(reinterpret_cast<const uint2*>(source));
  if (count <= 0) return make_uint2(0, 0);
  return make_uint2(load_pair(source, count), load_pair(source + 2, count - 2));
}

// The fragments of 16 * kSteps ranks of the basis from rank0 on, for the warp's 32 columns. Product j's column i is the
// physical column 8 (i / 2) + 2 j + i % 2.
template <class T, int kSteps>
__device__ __forceinline__ void load_basis(uint32_t (&b)[kSteps][4][2], const ExpandParams& p, const Weights<T>& basis,
                                           int64_t column0, int64_t rank0, int i, int c) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t rank = rank0 + 16 * step + 4 * c;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t column = column0 + 8 * (i / 2) + 2 * j + i % 2;
      float weight[4];
      basis.load(column * p.r + rank, column < p.m ? p.r - rank : 0, weight);
      b[step][j][0] = Pack<T>::pack(weight[0], weight[1]);
      b[step][j][1] = Pack<T>::pack(weight[2], weight[3]);
    }
  }
}

// The lane's eight columns of a row: start + scaling * (its sums of that row).
template <class T>
__device__ __forceinline__ uint4 finish_eight(const float (&sum)[4][4], int half, float scaling, uint4 start) {
  const uint32_t before[4] = {start.x, start.y, start.z, start.w};
  uint32_t after[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 old = Pack<T>::unpack(before[j]);
    after[j] = Pack<T>::pack(fmaf(scaling, sum[j][2 * half], old.x), fmaf(scaling, sum[j][2 * half + 1], old.y));
  }
  return make_uint4(after[0], after[1], after[2], after[3]);
}

// Eight neighbouring elements of which `count` are written.
template <class T>
__device__ __forceinline__ void store_eight(T* target, uint4 bits, int64_t count, bool aligned) {
  if (aligned && count >= 8) {
    *reinterpret_cast<uint4*>(target) = bits;
    return;
  }
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
  uint16_t* const out = reinterpret_cast<uint16_t*>(target);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k < count) out[k] = static_cast<uint16_t>(pairs[k / 2] >> 16 * (k % 2));
  }
}

struct ExpandLayout {
  bool y_aligned, z_aligned, basis_aligned, bias_aligned;  // z: on 16 bytes if it goes through shared memory, else on 8
};

template <class Traits>
__global__ void __launch_bounds__(kExpandThreads, Traits::kMinBlocks)
    expand_kernel(const __grid_constant__ ExpandParams p, const ExpandLayout layout) {
  using T = typename Traits::Element;
  constexpr int kSteps = Traits::kSteps;
  constexpr int kPitch = Traits::kPitch;
  __shared__ uint4 tile_of_z[Traits::kOnePass ? kExpandRows * kPitch / 8 : 1];
  T* const z_tile = reinterpret_cast<T*>(tile_of_z);

  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kExpandColumns + threadIdx.x / kWarpLanes * kWarpColumns;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kExpandRows;
  const T* const z = static_cast<const T*>(p.z);
  if constexpr (Traits::kOnePass) {
    constexpr int kPieces = Traits::kRanks / 8;  // of a row
    for (int e = threadIdx.x; e < kExpandRows * kPieces; e += kExpandThreads) {
      const int row = e / kPieces;
      const int rank = 8 * (e % kPieces);
      const int64_t count = row0 + row < p.tokens ? p.r - rank : 0;
      tile_of_z[(row * kPitch + rank) / 8] = load_eight(z + (row0 + row) * p.z_stride + rank, count, layout.z_aligned);
    }
  }
  const Weights<T> basis{p.basis, p.basis_format == Format::kFloat32, layout.basis_aligned};
  uint32_t b[kSteps][4][2];
  if constexpr (Traits::kOnePass) load_basis<T, kSteps>(b, p, basis, column0, 0, i, c);
  if constexpr (Traits::kOnePass) __syncthreads();
  if (column0 >= p.m) return;

  const int64_t column = column0 + 8 * c;
  const int64_t columns = p.m - column;
  T* const y = static_cast<T*>(p.y) + row0 * p.y_stride + column;
  const int rows = p.tokens - row0 < kExpandRows ? static_cast<int>(p.tokens - row0) : kExpandRows;
  uint4 bias = make_uint4(0, 0, 0, 0);
  if (!Traits::kAdd && p.bias != nullptr) {
    bias = load_eight(static_cast<const T*>(p.bias) + column, columns, layout.bias_aligned);
  }
  const auto load_y = [&](int row) {
    if constexpr (Traits::kAdd) {
      return load_eight_again(y + row * p.y_stride, row < rows ? columns : 0, layout.y_aligned);
    } else {
      return bias;
    }
  };

  uint4 next[2] = {load_y(i), load_y(i + 8)};
#pragma unroll 2
  for (int tile = 0; tile < kExpandRowTiles; ++tile) {
    const int row = kTileRows * tile + i;
    if (kTileRows * tile >= rows) return;
    const uint4 start[2] = {next[0], next[1]};
    if (Traits::kAdd && tile + 1 < kExpandRowTiles) {
      next[0] = load_y(row + kTileRows);
      next[1] = load_y(row + kTileRows + 8);
    }
    float sum[4][4] = {};
    for (int64_t rank0 = 0; rank0 < p.r; rank0 += Traits::kRanks) {
      if constexpr (!Traits::kOnePass) load_basis<T, kSteps>(b, p, basis, column0, rank0, i, c);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint2 upper, lower;
        if constexpr (Traits::kOnePass) {
          upper = *reinterpret_cast<const uint2*>(z_tile + row * kPitch + 16 * step + 4 * c);
          lower = *reinterpret_cast<const uint2*>(z_tile + (row + 8) * kPitch + 16 * step + 4 * c);
        } else {
          const int64_t rank = rank0 + 16 * step + 4 * c;
          const T* const from = z + (row0 + row) * p.z_stride + rank;
          upper = load_four(from, row < rows ? p.r - rank : 0, layout.z_aligned);
          lower = load_four(from + 8 * p.z_stride, row + 8 < rows ? p.r - rank : 0, layout.z_aligned);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sum[j], upper.x, lower.x, upper.y, lower.y, b[step][j][0], b[step][j][1]);
        }
      }
      if constexpr (Traits::kOnePass) break;
    }
    if (row < rows) {
      store_eight(y + row * p.y_stride, finish_eight<T>(sum, 0, p.scaling, start[0]), columns, layout.y_aligned);
    }
    if (row + 8 < rows) {
      store_eight(y + (row + 8) * p.y_stride, finish_eight<T>(sum, 1, p.scaling, start[1]), columns, layout.y_aligned);
    }
  }
}

template <class Traits>
cudaError_t launch_expand_tiles(const ExpandParams& p, cudaStream_t stream) {
  const int64_t columns = (p.m + kExpandColumns - 1) / kExpandColumns;
  const int64_t blocks = (p.tokens + kExpandRows - 1) / kExpandRows;
  if (columns > INT32_MAX) return cudaErrorInvalidConfiguration;
  ExpandLayout layout{};
  layout.y_aligned = is_aligned(p.y, 16) && p.y_stride % 8 == 0;
  layout.z_aligned =
      Traits::kOnePass ? is_aligned(p.z, 16) && p.z_stride % 8 == 0 : is_aligned(p.z, 8) && p.z_stride % 4 == 0;
  layout.basis_aligned = is_aligned(p.basis, 16) && p.r % 4 == 0;
  layout.bias_aligned = is_aligned(p.bias, 16);
  // Columns first: blocks that run together write whole rows. The grid's second axis is short, so rows come in parts.
  for (int64_t first = 0; first < blocks; first += kMaxGridY) {
    ExpandParams part = p;
    const int64_t row = first * kExpandRows;
    part.y = static_cast<typename Traits::Element*>(p.y) + row * p.y_stride;
    part.z = static_cast<const typename Traits::Element*>(p.z) + row * p.z_stride;
    part.tokens = p.tokens - row;
    const int64_t count = blocks - first < kMaxGridY ? blocks - first : kMaxGridY;
    const LaunchShape shape{dim3(static_cast<unsigned>(columns), static_cast<unsigned>(count)), kExpandThreads};
    const cudaError_t status = launch(expand_kernel<Traits>, shape, stream, part, layout);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <class T, int kSteps, bool kOnePass>
cudaError_t launch_expand_steps(const ExpandParams& p, cudaStream_t stream) {
  if (p.add) return launch_expand_tiles<ExpandTraits<T, kSteps, kOnePass, true>>(p, stream);
  return launch_expand_tiles<ExpandTraits<T, kSteps, kOnePass, false>>(p, stream);
}

template <class T>
cudaError_t launch_expand_half(const ExpandParams& p, cudaStream_t stream) {
  if (p.r <= 16) return launch_expand_steps<T, 1, true>(p, stream);
  if (p.r <= 32) return launch_expand_steps<T, 2, true>(p, stream);
  if (p.r <= 64) return launch_expand_steps<T, 4, true>(p, stream);
  return launch_expand_steps<T, 4, false>(p, stream);
}

}  // namespace tfb::cuda
