// What the kernels ask of the machine beyond C++: asynchronous copies, tensor-core products, clusters, and how a kernel
// is launched (grid_barrier.cuh: a barrier over the grid). tests/emulator has the same functions for a CPU.
#pragma once

#if defined(TFB_EMULATOR)

#include "emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "machine.h"

namespace tfb::cuda {

extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_shared_bytes; }

// Copies 16 bytes from global to shared memory behind the thread's back. Both addresses lie on 16 bytes.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
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

// Four 8 x 8 matrices of 16-bit elements from shared memory, transposed: lane 8 m + r names row r of matrix m (16
// bytes, on 16); b[m] holds its column i at rows 2c, 2c + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&b)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

// A cluster is a row of neighbouring blocks (compute capability 9.0 on) that can read each other's shared memory. Its
// barrier has two halves: what a thread wrote to shared memory before it arrives is seen by all threads of the cluster
// after they waited. Kernels compiled for less run in clusters of one block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same for a thread that has only read: there is nothing to be seen, and stores to global memory need not be waited
// for.
__device__ __forceinline__ void cluster_arrive_reads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
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

// Keeps a parameter out of template deduction.
template <class T>
struct Exactly {
  using Type = T;
};

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared = 0;         // bytes of dynamic shared memory
  int cluster = 1;           // blocks of a cluster, along x
  bool cooperative = false;  // for kernels with a grid_barrier()
};

constexpr size_t kDefaultShared = 48 * 1024;
constexpr int kPortableCluster = 8;

// Lets the kernel have more shared memory and larger clusters than without asking. Asking again costs less than
// remembering per kernel and device.
template <class... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), const LaunchShape& shape) {
  cudaError_t status = cudaSuccess;
  if (shape.shared > kDefaultShared) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
  }
  if (status == cudaSuccess && shape.cluster > kPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

struct LaunchConfig {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    unsigned count = 0;
    if (shape.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attributes[count].val.clusterDim.y = 1;
      attributes[count++].val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      attributes[count].id = cudaLaunchAttributeCooperative;
      attributes[count++].val.cooperative = 1;
    }
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   typename Exactly<Parameters>::Type... arguments) {
  const cudaError_t status = allow(kernel, shape);
  if (status != cudaSuccess) return status;
  const LaunchConfig launch(shape, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// Clusters (blocks, where a cluster is one) of a kernel that the device holds at the same time; 0 where it holds none.
// The shape's grid does not count.
template <class... Parameters>
cudaError_t ask_resident(void (*kernel)(Parameters...), const LaunchShape& shape, int multiprocessors, int& clusters) {
  cudaError_t status = allow(kernel, shape);
  if (status != cudaSuccess) return status;
  if (shape.cluster > 1) {
    LaunchShape one = shape;
    one.grid = dim3(static_cast<unsigned>(shape.cluster));
    const LaunchConfig launch(one, nullptr);
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  }
  status =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, static_cast<int>(shape.threads), shape.shared);
  clusters *= multiprocessors;
  return status;
}

// The same, asked once for every kernel, device and shape.
template <class... Parameters>
cudaError_t resident_clusters(void (*kernel)(Parameters...), const LaunchShape& shape, int& clusters) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const ResidencyKey key{reinterpret_cast<const void*>(kernel), device, shape.cluster, shape.shared};
  if (known_residency(key, clusters)) return cudaSuccess;
  Machine machine;
  status = current_machine(machine);
  if (status == cudaSuccess) status = ask_resident(kernel, shape, machine.multiprocessors, clusters);
  if (status == cudaSuccess) remember_residency(key, clusters);
  return status;
}

}  // namespace tfb::cuda

#endif
