// Half precision. A block owns up to 64 rows of one group and up to 64 ranks; its eight warps take the columns in turns
// of 32 and add up through shared memory in a fixed order.
//
// x is read once, from global memory into the fragments of the product: within 32 columns the order of k is permuted so
// that lane (i = lane / 4, c = lane % 4) owns columns 8c .. 8c + 7, one 16-byte load for two products. The same lane
// makes the weight of rank i at those columns, two Philox calls, and uses it for every 16-row tile that it holds.
#include "shrink.h"

#include "elements.cuh"
#include "sample.cuh"
#include "tuning.h"

namespace tfb::cuda {

namespace {

template <class T, int kRankTiles_, int kTokenTiles_>
struct ShrinkTraits {
  using Element = T;
  static constexpr int kRankTiles = kRankTiles_;    // of 8 ranks
  static constexpr int kTokenTiles = kTokenTiles_;  // of 16 rows
  static constexpr int kRank = 8 * kRankTiles;
  static constexpr int kTokens = 16 * kTokenTiles;
  static constexpr int kThreads = kShrinkWarps * kWarpLanes;
  static_assert(kRank <= kShrinkMaxRank);
  static_assert(kRankTiles * kTokenTiles <= 16, "accumulators would not leave room for the noise");
  static_assert(kShrinkWarps * 16 * kRank * sizeof(float) <= 48 * 1024,
                "partial sums of one tile fit static shared memory");
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    shrink_kernel(const ShrinkParams p, bool x_aligned, bool mean_aligned) {
  using T = typename Traits::Element;
  constexpr int kRankTiles = Traits::kRankTiles;
  constexpr int kTokenTiles = Traits::kTokenTiles;
  __shared__ float partial[kShrinkWarps][16][Traits::kRank];

  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const int64_t tiles = (p.rows_per_group + Traits::kTokens - 1) / Traits::kTokens;
  const int64_t group = blockIdx.x / tiles;
  const int64_t tile_row = (blockIdx.x - group * tiles) * Traits::kTokens;
  const int64_t rows = p.rows_per_group - tile_row;  // of this block; may exceed its tile
  const int64_t row0 = group * p.rows_per_group + tile_row;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.y) * Traits::kRank;
  const Sample sample(p, group);
  const Weights<T> mean{p.mean, p.mean_format == Format::kFloat32, mean_aligned};
  const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;

  float sum[kTokenTiles][kRankTiles][4] = {};
  const int64_t chunks = (p.n + 31) / 32;
  for (int64_t chunk = warp; chunk < chunks; chunk += kShrinkWarps) {
    const int64_t column = chunk * 32 + 8 * c;
    const int64_t columns = p.n - column;
    uint4 rows_of_x[kTokenTiles][2];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * t + 8 * half + i;
        rows_of_x[t][half] = load_eight(x + row * p.x_stride + column, row < rows ? columns : 0, x_aligned);
      }
    }
#pragma unroll
    for (int q = 0; q < kRankTiles; ++q) {
      const int64_t rank = rank0 + 8 * q + i;
      float weight[8];
      mean.load(rank * p.n + column, rank < p.r ? columns : 0, weight);
      if (sample.scale != 0.0f) {
        sample.perturb(weight, rank, column);
        sample.perturb(weight + 4, rank, column + 4);
      }
      uint32_t b[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) b[k] = Pack<T>::pack(weight[2 * k], weight[2 * k + 1]);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint4 upper = rows_of_x[t][0];
        const uint4 lower = rows_of_x[t][1];
        multiply_16x8x16<T>(sum[t][q], upper.x, lower.x, upper.y, lower.y, b[0], b[1]);
        multiply_16x8x16<T>(sum[t][q], upper.z, lower.z, upper.w, lower.w, b[2], b[3]);
      }
    }
  }

  T* z = static_cast<T*>(p.z) + row0 * p.r + rank0;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
    if (t > 0) __syncthreads();
#pragma unroll
    for (int q = 0; q < kRankTiles; ++q) {
      *reinterpret_cast<float2*>(&partial[warp][i][8 * q + 2 * c]) = make_float2(sum[t][q][0], sum[t][q][1]);
      *reinterpret_cast<float2*>(&partial[warp][i + 8][8 * q + 2 * c]) = make_float2(sum[t][q][2], sum[t][q][3]);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 16 * Traits::kRank; e += Traits::kThreads) {
      const int row = e / Traits::kRank;
      const int rank = e % Traits::kRank;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kShrinkWarps; ++w) total += partial[w][row][rank];
      if (16 * t + row < rows && rank0 + rank < p.r) z[(16 * t + row) * p.r + rank] = Pack<T>::from_float(total);
    }
  }
}

template <class Traits>
cudaError_t launch(const ShrinkParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.rows_per_group + Traits::kTokens - 1) / Traits::kTokens;
  const int64_t passes = (p.r + Traits::kRank - 1) / Traits::kRank;
  const int64_t blocks = tiles * p.groups;
  if (blocks > INT32_MAX || passes > kMaxGridY) return cudaErrorInvalidConfiguration;
  const int64_t mean_bytes = p.mean_format == Format::kFloat32 ? 4 : 2;
  const bool x_aligned = is_aligned(p.x, 16) && p.x_stride % 8 == 0;
  const bool mean_aligned = is_aligned(p.mean, 16) && p.n * mean_bytes % 16 == 0;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(passes));
  shrink_kernel<Traits><<<grid, Traits::kThreads, 0, stream>>>(p, x_aligned, mean_aligned);
  return cudaGetLastError();
}

// The smallest tile that holds the group's rows in one piece: a larger one would only multiply zeros, a smaller one
// would make the same noise again.
template <class T, int kRankTiles>
cudaError_t launch_rank(const ShrinkParams& p, cudaStream_t stream) {
  if (p.rows_per_group <= 16) return launch<ShrinkTraits<T, kRankTiles, 1>>(p, stream);
  if constexpr (kRankTiles <= 4) {
    if (p.rows_per_group > 32) return launch<ShrinkTraits<T, kRankTiles, 4>>(p, stream);
  }
  return launch<ShrinkTraits<T, kRankTiles, 2>>(p, stream);
}

template <class T>
cudaError_t launch_type(const ShrinkParams& p, cudaStream_t stream) {
  if (p.r <= 8) return launch_rank<T, 1>(p, stream);
  if (p.r <= 16) return launch_rank<T, 2>(p, stream);
  if (p.r <= 32) return launch_rank<T, 4>(p, stream);
  return launch_rank<T, 8>(p, stream);
}

}  // namespace

cudaError_t launch_shrink(const ShrinkParams& params, cudaStream_t stream) {
  if (params.format == Format::kFloat32) return launch_shrink_float(params, stream);
  if (params.format == Format::kBFloat16) return launch_type<__nv_bfloat16>(params, stream);
  return launch_type<__half>(params, stream);
}

}  // namespace tfb::cuda
