// The blocks of a cluster split the columns of one key head (flash decoding: Dao, Haziza, Massa and Sizov, 2023). Each
// runs the online softmax over its own, 64 columns at a time, a warp for 16 rows; the parts meet in distributed shared
// memory.
#include "attend.h"

#include <cmath>

#include "elements.cuh"
#include "machine.h"

namespace tfb::cuda {

namespace {

constexpr int kThreads = kAttendWarps * kWarpLanes;
constexpr int kTile = kAttendWarps * kTileRows;  // rows of a block
constexpr int kKeys = kAttendKeys;
constexpr float kLog2e = 1.4426950408889634f;

template <class T, int kWidth_>
struct AttendTraits {
  using Element = T;
  static constexpr int kWidth = kWidth_;
  static constexpr int kPitch = kWidth + 8;  // elements: rows that are read together lie in different banks
  static constexpr int kStageBytes = 2 * kKeys * kPitch * 2;  // of keys and values
  static constexpr int kSumPitch = kWidth + 8;                // floats
  static constexpr int kSumBytes = kTile * (kSumPitch + 2) * 4;
  static constexpr int kSharedBytes = 2 * kStageBytes > kSumBytes ? 2 * kStageBytes : kSumBytes;
};

// Asks for keys and values of 64 columns from `first` on; those from `end` on are zero.
template <class Traits>
__device__ __forceinline__ void request(const AttendParams& p, const typename Traits::Element* keys,
                                        const typename Traits::Element* values, typename Traits::Element* stage,
                                        int64_t first, int64_t end) {
  constexpr int kChunks = Traits::kWidth / 8;
  for (int e = threadIdx.x; e < kKeys * kChunks; e += kThreads) {
    const int row = e / kChunks;
    const int place = e % kChunks * 8;
    auto* const key = stage + row * Traits::kPitch + place;
    auto* const value = key + kKeys * Traits::kPitch;
    if (first + row < end) {
      copy_async(key, keys + (first + row) * p.key_strides.token + place);
      copy_async(value, values + (first + row) * p.value_strides.token + place);
    } else {
      *reinterpret_cast<uint4*>(key) = *reinterpret_cast<uint4*>(value) = make_uint4(0, 0, 0, 0);
    }
  }
  commit_copies();
}

template <class Traits>
__global__ void __launch_bounds__(kThreads)
    attend_kernel(const __grid_constant__ AttendParams p, const int splits, const int64_t split_columns) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return;  // for clusters, never launched: leave the rest out of the binary
#else
  using T = typename Traits::Element;
  constexpr int kSteps = Traits::kWidth / 16;
  constexpr int kScores = kKeys / 8;
  constexpr int kOutputs = Traits::kWidth / 8;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int i = lane / 4;
  const int c = lane % 4;
  const auto split = static_cast<int>(blockIdx.x);
  const int64_t key_head = blockIdx.y % p.key_heads;
  const int64_t batch = blockIdx.y / p.key_heads % p.batch;
  const int64_t tile = blockIdx.y / p.key_heads / p.batch;
  const int64_t rows = p.groups * p.tokens;
  const int64_t first = split * split_columns;
  const int64_t end = first + split_columns < p.columns ? first + split_columns : p.columns;
  T* const stages = reinterpret_cast<T*>(dynamic_shared());
  const T* const keys = static_cast<const T*>(p.key) + batch * p.key_strides.batch + key_head * p.key_strides.head;
  const T* const values =
      static_cast<const T*>(p.value) + batch * p.value_strides.batch + key_head * p.value_strides.head;

  // This lane's rows i and i + 8 of the warp's, and their queries; rows that are none read row 0.
  int64_t own[2];
  uint32_t query[kSteps][2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = tile * kTile + warp * kTileRows + i + 8 * half;
    own[half] = row < rows ? row : 0;
    const int64_t head = key_head * p.groups + own[half] / p.tokens;
    const T* const from = static_cast<const T*>(p.query) + batch * p.query_strides.batch + head * p.query_strides.head +
                          own[half] % p.tokens * p.query_strides.token;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      query[step][half][0] = *reinterpret_cast<const uint32_t*>(from + 16 * step + 2 * c);
      query[step][half][1] = *reinterpret_cast<const uint32_t*>(from + 16 * step + 8 + 2 * c);
    }
  }
  const T* const mask = static_cast<const T*>(p.mask) + batch * p.mask_batch;

  float output[kOutputs][4];
  float most[2], total[2];  // of the rows' scores, and of their exponentials
#pragma unroll
  for (int n = 0; n < kOutputs; ++n) output[n][0] = output[n][1] = output[n][2] = output[n][3] = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) most[half] = -INFINITY, total[half] = 0.0f;

  constexpr int kStage = Traits::kStageBytes / 2;  // elements
  if (first < end) request<Traits>(p, keys, values, stages, first, end);
  for (int64_t column = first, turn = 0; column < end; column += kKeys, ++turn) {
    T* const stage = stages + turn % 2 * kStage;
    if (column + kKeys < end) {
      request<Traits>(p, keys, values, stages + (turn + 1) % 2 * kStage, column + kKeys, end);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    float score[kScores][4];
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
      const T* const key = stage + (8 * n + i) * Traits::kPitch + 2 * c;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply_16x8x16<T>(score[n], query[step][0][0], query[step][1][0], query[step][0][1], query[step][1][1],
                            *reinterpret_cast<const uint32_t*>(key + 16 * step),
                            *reinterpret_cast<const uint32_t*>(key + 16 * step + 8));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = most[half];
      const T* const added = mask + own[half] * p.mask_row + column + 2 * c;
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& one = score[n][2 * half + k];
          const bool exists = column + 8 * n + 2 * c + k < end;
          one = exists ? fmaf(one, p.scale * kLog2e, Pack<T>::to_float(added[8 * n + k]) * kLog2e) : -INFINITY;
          now = fmaxf(now, one);
        }
      }
      now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 1));
      now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 2));
      const float base = now == -INFINITY ? 0.0f : now;  // nothing is seen so far
      const float kept = exp2f(most[half] - base);
      most[half] = now;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& one = score[n][2 * half + k];
          one = exp2f(one - base);
          sum += one;
        }
      }
      total[half] = fmaf(total[half], kept, sum);
#pragma unroll
      for (int n = 0; n < kOutputs; ++n) output[n][2 * half] *= kept, output[n][2 * half + 1] *= kept;
    }
    // The scores' layout is that of a product's left side.
    const T* const value = stage + (kKeys + lane % 16) * Traits::kPitch + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const float(&low)[4] = score[2 * step];
      const float(&high)[4] = score[2 * step + 1];
      const uint32_t a0 = Pack<T>::pack(low[0], low[1]), a1 = Pack<T>::pack(low[2], low[3]);
      const uint32_t a2 = Pack<T>::pack(high[0], high[1]), a3 = Pack<T>::pack(high[2], high[3]);
#pragma unroll
      for (int n = 0; n < kOutputs; n += 2) {
        uint32_t b[4];
        load_transposed(b, value + 16 * step * Traits::kPitch + 8 * n);
        multiply_16x8x16<T>(output[n], a0, a1, a2, a3, b[0], b[1]);
        multiply_16x8x16<T>(output[n + 1], a0, a1, a2, a3, b[2], b[3]);
      }
    }
    __syncthreads();  // all warps have read the stage
  }

  // The parts of the cluster's blocks.
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  float* const marks = sums + kTile * Traits::kSumPitch;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kTileRows + i + 8 * half;
    float sum = total[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    if (c == 0) *reinterpret_cast<float2*>(marks + 2 * row) = make_float2(most[half], sum);
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) {
      *reinterpret_cast<float2*>(sums + row * Traits::kSumPitch + 8 * n + 2 * c) =
          make_float2(output[n][2 * half], output[n][2 * half + 1]);
    }
  }
  cluster_arrive();
  cluster_wait();
  constexpr int kPairs = Traits::kWidth / 2;
  const int64_t left = rows - tile * kTile;
  const int count = left < kTile ? static_cast<int>(left) : kTile;
  for (int e = split * kThreads + threadIdx.x; e < count * kPairs; e += splits * kThreads) {
    const int row = e / kPairs;
    const int place = 2 * (e % kPairs);
    float highest = -INFINITY;
    for (int member = 0; member < splits; ++member) highest = fmaxf(highest, load_peer(marks + 2 * row, member).x);
    const float base = highest == -INFINITY ? 0.0f : highest;
    float sum = 0.0f;
    float2 out = make_float2(0.0f, 0.0f);
    for (int member = 0; member < splits; ++member) {
      const float2 mark = load_peer(marks + 2 * row, member);
      const float2 part = load_peer(sums + row * Traits::kSumPitch + place, member);
      const float share = exp2f(mark.x - base);
      sum = fmaf(mark.y, share, sum);
      out.x = fmaf(part.x, share, out.x), out.y = fmaf(part.y, share, out.y);
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int64_t number = tile * kTile + row;
    const int64_t head = key_head * p.groups + number / p.tokens;
    T* const to = static_cast<T*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head +
                  number % p.tokens * p.out_strides.token + place;
    *reinterpret_cast<uint32_t*>(to) = Pack<T>::pack(out.x * inverse, out.y * inverse);
  }
  cluster_arrive_reads();
  cluster_wait();  // no block leaves while another reads its sums
#endif
}

template <class T, int kWidth>
cudaError_t launch_width(const AttendParams& p, cudaStream_t stream) {
  using Traits = AttendTraits<T, kWidth>;
  Machine machine;
  const cudaError_t status = current_machine(machine);
  if (status != cudaSuccess) return status;
  const int64_t tiles = (p.groups * p.tokens + kTile - 1) / kTile;
  const int splits = attend_splits(tiles * p.key_heads * p.batch, p.columns, machine);
  const int64_t each = (p.columns + splits - 1) / splits;
  LaunchShape shape{dim3(static_cast<unsigned>(splits), static_cast<unsigned>(tiles * p.key_heads * p.batch)),
                    kThreads};
  shape.shared = Traits::kSharedBytes;
  shape.cluster = splits;
  return launch(attend_kernel<Traits>, shape, stream, p, splits, (each + 7) / 8 * 8);
}

bool aligned(const void* pointer, const AttendStrides& strides, int64_t elements) {
  return is_aligned(pointer, 2 * elements) && strides.batch % elements == 0 && strides.head % elements == 0 &&
         strides.token % elements == 0;
}

}  // namespace

bool attend_serves(const AttendParams& p) {
  Machine machine;
  if (p.format == Format::kFloat32 || (p.width != 64 && p.width != 128)) return false;
  if (current_machine(machine) != cudaSuccess || machine.cluster_blocks == 1) return false;
  const int64_t rows = p.groups * p.tokens;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  return rows <= kAttendRows && tiles * p.key_heads * p.batch <= kMaxGridY && aligned(p.key, p.key_strides, 8) &&
         aligned(p.value, p.value_strides, 8) && aligned(p.query, p.query_strides, 2) &&
         aligned(p.out, p.out_strides, 2);
}

cudaError_t launch_attend(const AttendParams& p, cudaStream_t stream) {
  if (p.format == Format::kBFloat16) {
    return p.width == 64 ? launch_width<__nv_bfloat16, 64>(p, stream) : launch_width<__nv_bfloat16, 128>(p, stream);
  }
  return p.width == 64 ? launch_width<__half, 64>(p, stream) : launch_width<__half, 128>(p, stream);
}

}  // namespace tfb::cuda
