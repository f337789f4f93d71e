// The CUDA kernels on a CPU: what csrc/cuda/device.cuh offers them, with a thread as a fiber. Slow, exact about who
// waits for whom, and without a GPU. A thread runs until it has to wait; warps compute collectively when their last
// lane arrives; an asynchronous copy leaves NaN in its target until its thread waits for it, so that a read too early
// is seen.
//
// Static shared memory is one static object: blocks that live at the same time (clusters, cooperative launches) run one
// after the other up to their common barrier, so it may not be live across that.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

struct Place {
  dim3 thread, block, grid;
  int lane;
  uint32_t cluster_rank;
};

// The running thread's place, and its ways to wait.
const Place& place();
unsigned char* shared_memory(int64_t cluster_rank = -1);  // of its own block, or of one in its cluster
void block_barrier();
void warp_barrier();
// All blocks of the cluster, or of the cooperative grid; the barrier in its two halves.
void cohort_arrive();
void cohort_wait();

// Lays `operand` out for the whole warp; the last lane to come calls `compute` with all lanes' operands (null where a
// lane has left the kernel).
void collective(void* operand, const std::function<void(void* (&)[32])>& compute);

void copy_async(void* target, const void* source);
void commit_copies();
void wait_copies(int pending);

cudaError_t run(const std::function<void()>& kernel, dim3 grid, unsigned threads, size_t shared, int cluster,
                bool cooperative);

}  // namespace emulator

#define threadIdx (::emulator::place().thread)
#define blockIdx (::emulator::place().block)
#define gridDim (::emulator::place().grid)

inline void __syncthreads() { ::emulator::block_barrier(); }
inline void __syncwarp() { ::emulator::warp_barrier(); }
template <class T>
T __ldg(const T* source) {
  return *source;
}
template <class T>
T __ldcg(const T* source) {
  return *source;
}
inline float __logf(float x) { return std::log(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

namespace emulator {

template <class T>
T shuffle(T value, int source) {
  struct Operand {
    T value;
    int source;
    T result;
  } operand{value, source, value};
  collective(&operand, [](void*(&lanes)[32]) {
    for (void* lane : lanes) {
      auto* own = static_cast<Operand*>(lane);
      if (own != nullptr) own->result = static_cast<Operand*>(lanes[own->source])->value;
    }
  });
  return operand.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return ::emulator::shuffle(value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::emulator::shuffle(value, ::emulator::place().lane ^ mask);
}

namespace tfb::cuda {

inline unsigned char* dynamic_shared() { return ::emulator::shared_memory(); }
inline void copy_async(void* shared, const void* global) { ::emulator::copy_async(shared, global); }
inline void commit_copies() { ::emulator::commit_copies(); }
template <int kPending>
void wait_copies() {
  ::emulator::wait_copies(kPending);
}

template <class T>
float element(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return static_cast<float>(value);
}

template <class T>
void multiply_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Operand {
    float* d;
    uint32_t a[4], b[2];
  } operand{d, {a0, a1, a2, a3}, {b0, b1}};
  ::emulator::collective(&operand, [](void*(&lanes)[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<Operand*>(lanes[lane]);
      const int i = lane / 4;
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * (lane % 4) + half;
        a[i][k] = element<T>(own->a[0], half), a[i + 8][k] = element<T>(own->a[1], half);
        a[i][k + 8] = element<T>(own->a[2], half), a[i + 8][k + 8] = element<T>(own->a[3], half);
        b[k][i] = element<T>(own->b[0], half), b[k + 8][i] = element<T>(own->b[1], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = static_cast<Operand*>(lanes[lane])->d;
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + 8 * (e / 2);
        const int column = 2 * (lane % 4) + e % 2;
        for (int k = 0; k < 16; ++k) out[e] += a[row][k] * b[k][column];
      }
    }
  });
}

inline void load_transposed(uint32_t (&b)[4], const void* row) {
  const int lane = ::emulator::place().lane;
  for (int m = 0; m < 4; ++m) {
    const void* const rows[2] = {::emulator::shuffle(row, 8 * m + 2 * (lane % 4)),
                                 ::emulator::shuffle(row, 8 * m + 2 * (lane % 4) + 1)};
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) pair[k] = static_cast<const uint16_t*>(rows[k])[lane / 4];
    b[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

inline void cluster_arrive() { ::emulator::cohort_arrive(); }
inline void cluster_arrive_reads() { ::emulator::cohort_arrive(); }
inline void cluster_wait() { ::emulator::cohort_wait(); }
inline float2 load_peer(const float* local, uint32_t rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(local) - ::emulator::shared_memory();
  float2 out;
  std::memcpy(&out, ::emulator::shared_memory(rank) + offset, sizeof(out));
  return out;
}
inline void grid_barrier() {
  ::emulator::cohort_arrive();
  ::emulator::cohort_wait();
}

// Keeps a parameter out of template deduction.
template <class T>
struct Exactly {
  using Type = T;
};

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
};

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
                   typename Exactly<Parameters>::Type... arguments) {
  return ::emulator::run([&] { kernel(arguments...); }, shape.grid, shape.threads, shape.shared, shape.cluster,
                         shape.cooperative);
}

template <class... Parameters>
cudaError_t ask_resident(void (*)(Parameters...), const LaunchShape&, int, int& clusters) {
  clusters = 3;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t resident_clusters(void (*kernel)(Parameters...), const LaunchShape& shape, int& clusters) {
  return ask_resident(kernel, shape, 0, clusters);
}

}  // namespace tfb::cuda
