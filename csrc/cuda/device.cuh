// What the kernels ask of the machine beyond C++: asynchronous copies, tensor-core products, clusters, a barrier over
// the grid, and how a kernel is launched. tests/emulator has the same functions for a CPU.
#pragma once

#if defined(TFB_EMULATOR)

#include "emulator.h"

#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace tfb::cuda {

extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_shared_bytes; }

// Copies 16 bytes from global to shared memory behind the thread's back; of the source only `bytes` (0 to 16) are read,
// the rest is zero. Both addresses lie on 16 bytes. The neighbouring 64 bytes of the row are asked for along with it.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the thread's latest groups of copies are under way. A thread sees its own copies
// then.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// d += a b: a is 16 x 16 (four registers), b 16 x 8 (two), d 16 x 8 floats. With i = lane / 4, c = lane % 4: a0 holds
// row i, a1 row i + 8 at k = 2c, 2c + 1; a2, a3 the same rows at k + 8; b0, b1 column i at those k; d0, d1 row i and
// d2, d3 row i + 8 at columns 2c, 2c + 1.
template <class T>
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A cluster is a row of neighbouring blocks (compute capability 9.0 on) that can read each other's shared memory.
// Kernels compiled for less are launched with clusters of one block.
__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Waits for all threads of the cluster; what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}
// What `local` (in shared memory, on 8 bytes) is in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ float2 load_peer(const float* local, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t peer;
  float2 out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "r"(peer) : "memory");
  return out;
#else
  return *reinterpret_cast<const float2*>(local);
#endif
}

// Waits for all threads of a cooperative launch; what they wrote to global memory before is visible after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared = 0;         // bytes of dynamic shared memory
  int cluster = 1;           // blocks of a cluster, along x
  bool cooperative = false;  // for kernels with a grid_barrier()
};

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   std::type_identity_t<Parameters>... arguments) {
  // The default limit is 48 KiB; asking again costs less than remembering per kernel and device.
  if (shape.shared > 48 * 1024) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
    if (allowed != cudaSuccess) return allowed;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Blocks of a kernel that one multiprocessor holds at the same time.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), unsigned threads, size_t shared, int& blocks) {
  if (shared > 48 * 1024) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (allowed != cudaSuccess) return allowed;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared);
}

}  // namespace tfb::cuda

#endif
