// Half precision: bound by reading and writing y. A warp owns 32 columns; the product's columns are permuted so that
// lane (i = lane / 4, c = lane % 4) ends with the eight neighbours 8c .. 8c + 7 of rows i and i + 8, one 16-byte access
// each. k is permuted too: within 16 ranks, lane c reads ranks 4c .. 4c + 3 of z and of the basis in one piece.
#include "expand.h"

#include "elements.cuh"
#include "tuning.h"

namespace tfb::cuda {

namespace {

constexpr int kWarpColumns = 32;
constexpr int kBlockColumns = kWarpColumns * kExpandWarps;
constexpr int kBlockTokens = 16 * kExpandTokenTiles;

// Four neighbouring ranks of one row of z as two registers.
template <class T>
__device__ __forceinline__ uint2 load_four(const T* source, int64_t count, bool aligned) {
  if (aligned && count >= 4) return __ldg(reinterpret_cast<const uint2*>(source));
  if (count <= 0) return make_uint2(0, 0);
  return make_uint2(load_pair(source, count), load_pair(source + 2, count - 2));
}

// y[0 .. 8) += scaling * (the lane's sums of one row).
template <class T>
__device__ __forceinline__ void add_eight(T* y, const float (&sum)[4][4], int half, float scaling, int64_t columns,
                                          bool aligned) {
  if (aligned && columns >= 8) {
    uint4 bits = *reinterpret_cast<const uint4*>(y);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(&bits);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 old = Pack<T>::unpack(pairs[j]);
      pairs[j] = Pack<T>::pack(fmaf(scaling, sum[j][2 * half], old.x), fmaf(scaling, sum[j][2 * half + 1], old.y));
    }
    *reinterpret_cast<uint4*>(y) = bits;
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k < columns) {
      y[k] = Pack<T>::from_float(fmaf(scaling, sum[k / 2][2 * half + k % 2], Pack<T>::to_float(y[k])));
    }
  }
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

// 16 * kSteps ranks at a time. kOnePass: those are all, and the basis stays in registers over the block's token tiles.
template <class T, int kSteps, bool kOnePass>
__global__ void __launch_bounds__(kExpandWarps* kWarpLanes, kExpandMinBlocks)
    expand_kernel(const ExpandParams p, bool y_aligned, bool z_aligned, bool basis_aligned) {
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kBlockColumns + threadIdx.x / kWarpLanes * kWarpColumns;
  if (column0 >= p.m) return;
  const int64_t column = column0 + 8 * c;
  const Weights<T> basis{p.basis, p.basis_format == Format::kFloat32, basis_aligned};
  uint32_t b[kSteps][4][2];
  if constexpr (kOnePass) load_basis<T, kSteps>(b, p, basis, column0, 0, i, c);

#pragma unroll 1
  for (int tile = 0; tile < kExpandTokenTiles; ++tile) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kBlockTokens + 16 * tile;
    if (token >= p.tokens) return;
    const bool has_upper = token + i < p.tokens;
    const bool has_lower = token + i + 8 < p.tokens;
    const T* z = static_cast<const T*>(p.z) + (token + i) * p.z_stride + 4 * c;
    float sum[4][4] = {};
    for (int64_t rank0 = 0; rank0 < p.r; rank0 += 16 * kSteps) {
      if constexpr (!kOnePass) load_basis<T, kSteps>(b, p, basis, column0, rank0, i, c);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t first = rank0 + 16 * step;
        const int64_t count = p.r - first - 4 * c;
        const uint2 upper = load_four(z + first, has_upper ? count : 0, z_aligned);
        const uint2 lower = load_four(z + 8 * p.z_stride + first, has_lower ? count : 0, z_aligned);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sum[j], upper.x, lower.x, upper.y, lower.y, b[step][j][0], b[step][j][1]);
        }
      }
      if constexpr (kOnePass) break;
    }
    T* y = static_cast<T*>(p.y) + (token + i) * p.y_stride + column;
    if (has_upper) add_eight(y, sum, 0, p.scaling, p.m - column, y_aligned);
    if (has_lower) add_eight(y + 8 * p.y_stride, sum, 1, p.scaling, p.m - column, y_aligned);
  }
}

template <class T, int kSteps, bool kOnePass>
cudaError_t launch(const ExpandParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t columns = (p.m + kBlockColumns - 1) / kBlockColumns;
  if (blocks > INT32_MAX || columns > kMaxGridY) return cudaErrorInvalidConfiguration;
  const bool y_aligned = is_aligned(p.y, 16) && p.y_stride % 8 == 0;
  const bool z_aligned = is_aligned(p.z, 8) && p.z_stride % 4 == 0;
  const bool basis_aligned = is_aligned(p.basis, 16) && p.r % 4 == 0;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
  expand_kernel<T, kSteps, kOnePass>
      <<<grid, kExpandWarps * kWarpLanes, 0, stream>>>(p, y_aligned, z_aligned, basis_aligned);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_type(const ExpandParams& p, cudaStream_t stream) {
  if (p.r <= 16) return launch<T, 1, true>(p, stream);
  if (p.r <= 32) return launch<T, 2, true>(p, stream);
  if (p.r <= 64) return launch<T, 4, true>(p, stream);
  return launch<T, 4, false>(p, stream);
}

}  // namespace

cudaError_t launch_expand(const ExpandParams& params, cudaStream_t stream) {
  if (params.format == Format::kFloat32) return launch_expand_float(params, stream);
  if (params.format == Format::kBFloat16) return launch_type<__nv_bfloat16>(params, stream);
  return launch_type<__half>(params, stream);
}

}  // namespace tfb::cuda
