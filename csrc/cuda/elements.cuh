// Elements of the three types: pairs in 32-bit registers, vector loads with a safe path for ragged edges.
#pragma once

#include <cstdint>

#include "../noise.h"
#include "../types.h"
#include "device.cuh"

namespace tfb::cuda {

__device__ __forceinline__ uint32_t as_bits(__half2 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
__device__ __forceinline__ uint32_t as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

// Pack<T>: two floats to and from one register of two elements, the first in the low half.
template <class T>
struct Pack;

template <>
struct Pack<__half> {
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return as_bits(__floats2half2_rn(a, b)); }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<__half2*>(&bits));
  }
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
};

template <>
struct Pack<float> {
  static __device__ __forceinline__ float to_float(float value) { return value; }
  static __device__ __forceinline__ float from_float(float value) { return value; }
};

template <>
struct Pack<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return as_bits(__floats2bfloat162_rn(a, b)); }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&bits));
  }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }
};

// Flips the signs of eight elements where the bits of `signs` are set, the lowest for the first.
__device__ __forceinline__ uint4 flip(uint4 x, uint32_t signs) {
  const auto mask = [signs](int pair) { return (signs >> 2 * pair & 1u) << 15 | (signs >> (2 * pair + 1) & 1u) << 31; };
  return make_uint4(x.x ^ mask(0), x.y ^ mask(1), x.z ^ mask(2), x.w ^ mask(3));
}

template <class T>
__device__ __forceinline__ float sum_of_squares(uint4 x, float sum) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = Pack<T>::unpack(pairs[k]);
    sum = fmaf(pair.y, pair.y, fmaf(pair.x, pair.x, sum));
  }
  return sum;
}

// Two neighbouring elements of which `count` (0, 1, 2) exist; the rest are zero.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* source, int64_t count) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(source);
  const uint32_t low = count > 0 ? bits[0] : 0;
  const uint32_t high = count > 1 ? bits[1] : 0;
  return low | high << 16;
}

// Eight neighbouring elements of which `count` exist (none where it is 0 or less). `aligned`: source is on 16 bytes.
template <class T>
__device__ __forceinline__ uint4 load_eight(const T* source, int64_t count, bool aligned) {
  if (aligned && count >= 8) return __ldg(reinterpret_cast<const uint4*>(source));
  if (count <= 0) return make_uint4(0, 0, 0, 0);
  return make_uint4(load_pair(source, count), load_pair(source + 2, count - 2), load_pair(source + 4, count - 4),
                    load_pair(source + 6, count - 6));
}

// kCount (4 or 8) neighbouring weights of either type as floats, of which `count` exist. `aligned`: source is on the
// boundary of kCount of its elements, 16 bytes at most.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* source, int64_t count, bool aligned, float (&out)[kCount]) {
  if (aligned && count >= kCount) {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(source + k));
      out[k] = four.x, out[k + 1] = four.y, out[k + 2] = four.z, out[k + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = k < count ? __ldg(source + k) : 0.0f;
}

template <class T, int kCount>
__device__ __forceinline__ void load_floats(const T* source, int64_t count, bool aligned, float (&out)[kCount]) {
  uint32_t bits[kCount / 2];
  if (aligned && count >= kCount) {
    if constexpr (kCount == 8) {
      const uint4 eight = __ldg(reinterpret_cast<const uint4*>(source));
      bits[0] = eight.x, bits[1] = eight.y, bits[2] = eight.z, bits[3] = eight.w;
    } else {
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(source));
      bits[0] = four.x, bits[1] = four.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 2) bits[k / 2] = load_pair(source + k, count - k);
  }
#pragma unroll
  for (int k = 0; k < kCount; k += 2) {
    const float2 pair = Pack<T>::unpack(bits[k / 2]);
    out[k] = pair.x, out[k + 1] = pair.y;
  }
}

// A weight tensor of float32 or of T, chosen once per launch.
template <class T>
struct Weights {
  const void* data;
  bool is_float;
  bool aligned;  // rows start on the boundary that load_floats asks for

  template <int kCount>
  __device__ __forceinline__ void load(int64_t offset, int64_t count, float (&out)[kCount]) const {
    if (is_float) load_floats<kCount>(static_cast<const float*>(data) + offset, count, aligned, out);
    else load_floats<T, kCount>(static_cast<const T*>(data) + offset, count, aligned, out);
  }
};

// Null is aligned.
TFB_HOST_DEVICE bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace tfb::cuda
