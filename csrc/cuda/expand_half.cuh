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

// How many of a device's `resident` blocks a call gets that has so many of all `units`: its share, at least one.
inline int64_t expand_blocks(int64_t units, int64_t all, int64_t resident) {
  const int64_t wanted = (units + kExpandWarps - 1) / kExpandWarps;
  const int64_t share = resident * units / all;
  return share < 1 ? 1 : wanted < share ? wanted : share;
}

template <class Traits>
cudaError_t launch_expand_tiles(const ExpandParams* params, int count, cudaStream_t stream) {
  LaunchShape shape{dim3(1), kExpandThreads};
  shape.shared = Traits::kSharedBytes;
  int resident = 0;
  const cudaError_t status = resident_clusters(expand_kernel<Traits>, shape, resident);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  ExpandGroup<ExpandParams, Traits::kCalls> calls{};
  ExpandGroup<ExpandLayout, Traits::kCalls> layouts{};
  int64_t units[kMaxLayers];
  int64_t all = 0, most = 0;
  for (int k = 0; k < count; ++k) {
    const ExpandParams& p = calls.of[k] = params[k];
    const int64_t column_groups = (p.m + Traits::kColumns - 1) / Traits::kColumns;
    if (column_groups > INT32_MAX) return cudaErrorInvalidConfiguration;
    layouts.of[k].column_groups = column_groups;
    all += units[k] = column_groups * ((p.tokens + kTileRows - 1) / kTileRows);
  }
  for (int k = 0; k < count; ++k) {
    ExpandLayout& layout = layouts.of[k];
    const int64_t blocks = expand_blocks(units[k], all, resident);
    const int64_t stripes = blocks * kExpandWarps / layout.column_groups;
    layout.stripes = stripes < 1 ? 1 : stripes;
    layout.blocks = static_cast<int32_t>(blocks);
    most = blocks > most ? blocks : most;
  }
  shape.grid = dim3(static_cast<unsigned>(most), static_cast<unsigned>(count));
  return launch(expand_kernel<Traits>, shape, stream, calls, layouts);
}

template <class T>
cudaError_t launch_expand_any(const ExpandParams& p, cudaStream_t stream) {
  const int64_t units =
      (p.m + kExpandGroupColumns - 1) / kExpandGroupColumns * ((p.tokens + kTileRows - 1) / kTileRows);
  const int64_t blocks = (units + kExpandWarps - 1) / kExpandWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(expand_any_kernel<T>, {dim3(static_cast<unsigned>(blocks)), kExpandThreads}, stream, p);
}

// What chooses the kernel of a call; 0 steps: any alignment and rank.
struct ExpandKind {
  int steps;
  Start start;

  explicit ExpandKind(const ExpandParams& p)
      : steps(fits_pieces(p) ? expand_steps(p.r) : 0),
        start(p.add               ? Start::kOutput
              : p.bias != nullptr ? Start::kBias
                                  : Start::kNothing) {}
  bool operator==(const ExpandKind& other) const { return steps == other.steps && start == other.start; }
};

template <class T, Start kStart>
cudaError_t launch_expand_ranks(const ExpandParams* params, int count, int steps, cudaStream_t stream) {
  if (steps == 1) return launch_expand_tiles<ExpandTraits<T, 1, kStart>>(params, count, stream);
  if (steps == 2) return launch_expand_tiles<ExpandTraits<T, 2, kStart>>(params, count, stream);
  return launch_expand_tiles<ExpandTraits<T, 4, kStart>>(params, count, stream);
}

template <class T>
cudaError_t launch_expand_half(const ExpandParams* params, int count, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (int first = 0, next = 1; first < count && status == cudaSuccess; first = next, ++next) {
    const ExpandKind kind(params[first]);
    if (kind.steps == 0) {
      status = launch_expand_any<T>(params[first], stream);
      continue;
    }
    const int most = kind.start == Start::kOutput ? 1 : kMaxLayers;
    while (next < count && next - first < most && ExpandKind(params[next]) == kind) ++next;
    const ExpandParams* const own = params + first;
    const int alike = next - first;
    if (kind.start == Start::kOutput) status = launch_expand_ranks<T, Start::kOutput>(own, alike, kind.steps, stream);
    else if (kind.start == Start::kBias) status = launch_expand_ranks<T, Start::kBias>(own, alike, kind.steps, stream);
    else status = launch_expand_ranks<T, Start::kNothing>(own, alike, kind.steps, stream);
  }
  return status;
}

}  // namespace tfb::cuda
