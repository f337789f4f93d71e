// float32: a thread owns four neighbouring columns of eight rows at a time; eight ranks of the basis stay in registers.
#include "elements.cuh"
#include "expand.h"
#include "tuning.h"

namespace tfb::cuda {

namespace {

constexpr int kTokens = kExpandFloatTokens;
constexpr int kRank = kExpandFloatRank;
constexpr int kBlockTokens = kTokens * kExpandFloatTiles;
constexpr int kBlockColumns = 4 * kExpandFloatThreads;

__global__ void __launch_bounds__(kExpandFloatThreads)
    expand_float_kernel(const __grid_constant__ ExpandParams p, bool y_aligned) {
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kBlockColumns + 4 * threadIdx.x;
  const int64_t columns = p.m - column;
  if (columns <= 0) return;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  const float* basis = static_cast<const float*>(p.basis);
  const bool one_pass = p.r <= kRank;

  float bias[4] = {};
  if (!p.add && p.bias != nullptr) {
#pragma unroll
    for (int k = 0; k < 4; ++k) bias[k] = k < columns ? __ldg(static_cast<const float*>(p.bias) + column + k) : 0.0f;
  }
  float direction[kRank][4];
  for (int tile = 0; tile < kExpandFloatTiles; ++tile) {
    const int64_t token = token0 + kTokens * tile;
    if (token >= p.tokens) return;
    float sum[kTokens][4] = {};
    for (int64_t rank0 = 0; rank0 < p.r; rank0 += kRank) {
      if (tile == 0 || !one_pass) {
#pragma unroll
        for (int q = 0; q < kRank; ++q) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            direction[q][k] = k < columns && rank0 + q < p.r ? __ldg(basis + (column + k) * p.r + rank0 + q) : 0.0f;
          }
        }
      }
      const float* z = static_cast<const float*>(p.z) + token * p.z_stride + rank0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (token + t >= p.tokens) break;
#pragma unroll
        for (int q = 0; q < kRank; ++q) {
          // Every thread of the block reads the same number; past the rank the basis is zero, but z must not be read.
          const float coefficient = rank0 + q < p.r ? __ldg(z + t * p.z_stride + q) : 0.0f;
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[t][k] = fmaf(coefficient, direction[q][k], sum[t][k]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token + t >= p.tokens) break;
      float* y = static_cast<float*>(p.y) + (token + t) * p.y_stride + column;
      if (y_aligned && columns >= 4) {
        float4 four = make_float4(bias[0], bias[1], bias[2], bias[3]);
        if (p.add) four = *reinterpret_cast<const float4*>(y);
        four.x = fmaf(p.scaling, sum[t][0], four.x);
        four.y = fmaf(p.scaling, sum[t][1], four.y);
        four.z = fmaf(p.scaling, sum[t][2], four.z);
        four.w = fmaf(p.scaling, sum[t][3], four.w);
        *reinterpret_cast<float4*>(y) = four;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k < columns) y[k] = fmaf(p.scaling, sum[t][k], p.add ? y[k] : bias[k]);
        }
      }
    }
  }
}

cudaError_t launch_one(const ExpandParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t columns = (p.m + kBlockColumns - 1) / kBlockColumns;
  if (blocks > INT32_MAX || columns > kMaxGridY) return cudaErrorInvalidConfiguration;
  const bool y_aligned = is_aligned(p.y, 16) && p.y_stride % 4 == 0;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(columns)), kExpandFloatThreads};
  return launch(expand_float_kernel, shape, stream, p, y_aligned);
}

}  // namespace

cudaError_t launch_expand_float(const ExpandParams* params, int count, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (int k = 0; k < count && status == cudaSuccess; ++k) status = launch_one(params[k], stream);
  return status;
}

}  // namespace tfb::cuda
