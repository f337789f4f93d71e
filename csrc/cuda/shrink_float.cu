// float32. tf32 would lose 13 bits of x, so the products are plain FMAs: a lane owns four columns, eight rows of x and
// eight ranks; a warp adds its lanes by a fixed butterfly, a block its warps through shared memory in order.
#include "elements.cuh"
#include "sample.cuh"
#include "shrink.h"
#include "tuning.h"

namespace tfb::cuda {

namespace {

constexpr int kTokens = kShrinkFloatTokens;
constexpr int kRank = kShrinkFloatRank;
constexpr int kThreads = kShrinkWarps * kWarpLanes;
constexpr int kSums = kTokens * kRank;
constexpr int kChunkColumns = 4 * kWarpLanes;
static_assert(kSums == 2 * kWarpLanes, "the butterfly leaves two sums in each lane");

// Adds each of 64 values over the warp. Every step hands half of a lane's values to its partner, so 62 exchanges do
// what 320 would; lane L ends with values 2L and 2L + 1 in places 0 and 1.
template <int kHalf = kSums / 2>
__device__ __forceinline__ void add_lanes(float (&value)[kSums], int lane) {
  constexpr int kOffset = kHalf / 2;
  const bool keeps_upper = lane & kOffset;
#pragma unroll
  for (int v = 0; v < kHalf; ++v) {
    const float kept = keeps_upper ? value[v + kHalf] : value[v];
    const float given = keeps_upper ? value[v] : value[v + kHalf];
    value[v] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kOffset);
  }
  if constexpr (kOffset > 1) add_lanes<kHalf / 2>(value, lane);
}

__global__ void __launch_bounds__(kThreads)
    shrink_float_kernel(const ShrinkParams p, bool x_aligned, bool mean_aligned) {
  __shared__ float partial[kShrinkWarps][kSums];
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t tiles = (p.rows_per_group + kTokens - 1) / kTokens;
  const int64_t group = blockIdx.x / tiles;
  const int64_t tile_row = (blockIdx.x - group * tiles) * kTokens;
  const int64_t rows = p.rows_per_group - tile_row;
  const int64_t row0 = group * p.rows_per_group + tile_row;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * kRank;
  const Sample sample(p, group);
  const float* x = static_cast<const float*>(p.x) + row0 * p.x_stride;
  const float* mean = static_cast<const float*>(p.mean);

  float sum[kSums] = {};  // [token][rank]
  const int64_t chunks = (p.n + kChunkColumns - 1) / kChunkColumns;
  for (int64_t chunk = warp; chunk < chunks; chunk += kShrinkWarps) {
    const int64_t column = chunk * kChunkColumns + 4 * lane;
    const int64_t columns = p.n - column;
    float rows_of_x[kTokens][4];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      load_floats<4>(x + t * p.x_stride + column, t < rows ? columns : 0, x_aligned, rows_of_x[t]);
    }
#pragma unroll
    for (int q = 0; q < kRank; ++q) {
      const int64_t rank = rank0 + q;
      float weight[4];
      load_floats<4>(mean + rank * p.n + column, rank < p.r ? columns : 0, mean_aligned, weight);
      if (sample.scale != 0.0f) sample.perturb(weight, rank, column);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[t * kRank + q] = fmaf(rows_of_x[t][k], weight[k], sum[t * kRank + q]);
      }
    }
  }

  add_lanes(sum, lane);
  partial[warp][2 * lane] = sum[0];
  partial[warp][2 * lane + 1] = sum[1];
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int row = threadIdx.x / kRank;
    const int rank = threadIdx.x % kRank;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kShrinkWarps; ++w) total += partial[w][threadIdx.x];
    if (row < rows && rank0 + rank < p.r) static_cast<float*>(p.z)[(row0 + row) * p.r + rank0 + rank] = total;
  }
}

}  // namespace

cudaError_t launch_shrink_float(const ShrinkParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows_per_group + kTokens - 1) / kTokens * p.groups;
  const int64_t passes = (p.r + kRank - 1) / kRank;
  if (blocks > INT32_MAX || passes > kMaxGridY) return cudaErrorInvalidConfiguration;
  const bool x_aligned = is_aligned(p.x, 16) && p.x_stride % 4 == 0;
  const bool mean_aligned = is_aligned(p.mean, 16) && p.n % 4 == 0;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(passes));
  shrink_float_kernel<<<grid, kThreads, 0, stream>>>(p, x_aligned, mean_aligned);
  return cudaGetLastError();
}

}  // namespace tfb::cuda
