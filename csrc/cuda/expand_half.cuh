// expand in half precision: the kernel for what expand_kernel.cuh does not serve, and the launch of both;
// expand_bfloat16.cu and expand_float16.cu instantiate it.
#pragma once

#include "expand_kernel.cuh"

namespace tfb::cuda {

// Any alignment and rank: a warp owns 16 rows x 32 columns and reads the basis anew for every 16 ranks.
template <class T>
__global__ void __launch_bounds__(kExpandThreads) expand_any_kernel(const __grid_constant__ ExpandParams p) {
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const int64_t column_groups = (p.m + kExpandGroupColumns - 1) / kExpandGroupColumns;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kExpandWarps + threadIdx.x / kWarpLanes;
  const int64_t row = unit / column_groups * kTileRows + i;
  const int64_t column0 = unit % column_groups * kExpandGroupColumns;
  if (row - i >= p.tokens) return;
  float sum[4][4] = {};
  for (int64_t rank0 = 0; rank0 < p.r; rank0 += 16) {
    uint32_t b[4][2];
    load_basis<T, false>(b, p, column0, rank0, i, c);
    uint32_t a[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t rank = rank0 + 4 * c;
      const T* const from = static_cast<const T*>(p.z) + (row + 8 * half) * p.z_stride + rank;
      const int64_t count = row + 8 * half < p.tokens ? p.r - rank : 0;
      a[half][0] = load_pair(from, count);
      a[half][1] = load_pair(from + 2, count - 2);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_16x8x16<T>(sum[j], a[0][0], a[1][0], a[0][1], a[1][1], b[j][0], b[j][1]);
  }
  const T* const bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const int64_t at = row + 8 * (k / 8);
    const int64_t column = column0 + 8 * c + k % 8;
    if (at >= p.tokens || column >= p.m) continue;
    T* const y = static_cast<T*>(p.y) + at * p.y_stride + column;
    float start = 0.0f;
    if (p.add) start = Pack<T>::to_float(*y);
    else if (bias != nullptr) start = Pack<T>::to_float(bias[column]);
    *y = Pack<T>::from_float(fmaf(p.scaling, sum[k % 8 / 2][k / 8 * 2 + k % 2], start));
  }
}

// Whether rows of y consist of whole 16-byte chunks and ranks come in aligned fours (eights above 16).
inline bool fits_pieces(const ExpandParams& p) {
  constexpr int64_t kShort = INT32_MAX / kTileRows;  // offsets within a tile are counted in 32 bits
  if (p.y_stride > kShort || p.z_stride > kShort) return false;
  const bool eights = p.r % 8 == 0 && is_aligned(p.z, 16) && p.z_stride % 8 == 0;
  return p.m % 8 == 0 && p.r % 4 == 0 && p.r <= kExpandRanks && (p.r <= 16 || eights) && is_aligned(p.y, 16) &&
         p.y_stride % 8 == 0 && is_aligned(p.z, 8) && p.z_stride % 4 == 0 && is_aligned(p.basis, 8) &&
         is_aligned(p.bias, 16);
}

template <class Traits>
cudaError_t launch_expand_tiles(const ExpandParams& p, cudaStream_t stream) {
  LaunchShape shape{dim3(1), kExpandThreads};
  shape.shared = Traits::kSharedBytes;
  int resident = 0;
  const cudaError_t status = resident_clusters(expand_kernel<Traits>, shape, resident);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  ExpandLayout layout{};
  layout.column_groups = (p.m + Traits::kColumns - 1) / Traits::kColumns;
  const int64_t units = layout.column_groups * ((p.tokens + kTileRows - 1) / kTileRows);
  const int64_t wanted = (units + kExpandWarps - 1) / kExpandWarps;
  const int64_t blocks = wanted < resident ? wanted : resident;
  const int64_t stripes = blocks * kExpandWarps / layout.column_groups;
  layout.stripes = stripes < 1 ? 1 : stripes;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  return launch(expand_kernel<Traits>, shape, stream, p, layout);
}

template <class T>
cudaError_t launch_expand_any(const ExpandParams& p, cudaStream_t stream) {
  const int64_t units =
      (p.m + kExpandGroupColumns - 1) / kExpandGroupColumns * ((p.tokens + kTileRows - 1) / kTileRows);
  const int64_t blocks = (units + kExpandWarps - 1) / kExpandWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(expand_any_kernel<T>, {dim3(static_cast<unsigned>(blocks)), kExpandThreads}, stream, p);
}

template <class T, Start kStart>
cudaError_t launch_expand_ranks(const ExpandParams& p, cudaStream_t stream) {
  const int steps = expand_steps(p.r);
  if (steps == 1) return launch_expand_tiles<ExpandTraits<T, 1, kStart>>(p, stream);
  if (steps == 2) return launch_expand_tiles<ExpandTraits<T, 2, kStart>>(p, stream);
  return launch_expand_tiles<ExpandTraits<T, 4, kStart>>(p, stream);
}

template <class T>
cudaError_t launch_expand_half(const ExpandParams& p, cudaStream_t stream) {
  if (!fits_pieces(p)) return launch_expand_any<T>(p, stream);
  if (p.add) return launch_expand_ranks<T, Start::kOutput>(p, stream);
  if (p.bias != nullptr) return launch_expand_ranks<T, Start::kBias>(p, stream);
  return launch_expand_ranks<T, Start::kNothing>(p, stream);
}

}  // namespace tfb::cuda
