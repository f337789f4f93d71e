// What one group of rows draws: the key, the counter's fixed words, sigma, and the three kinds of draws.
#pragma once

#include <cstdint>

#include "../noise.h"
#include "device.cuh"
#include "shrink.h"

namespace tfb::cuda {

struct Sample {
  uint32_t key0, key1, index;
  float scale;  // sigma with the antithetic sign

  __device__ __forceinline__ Sample(const ShrinkParams& p, int64_t group) {
    if (p.sigma == nullptr || group >= p.groups) {  // the mean's rows
      key0 = key1 = index = 0;
      scale = 0.0f;
      return;
    }
    const auto seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(p.seed)));
    const auto sample = static_cast<uint32_t>(__ldg(p.samples + group));
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
    index = noise_sample(sample, p.antithetic);
    scale = __ldg(p.sigma + group) * noise_sign(sample, p.antithetic);
  }

  // E[row][column .. column + 4); column is a multiple of four.
  __device__ __forceinline__ void draw(uint32_t layer, uint32_t row, int64_t column, float (&normal)[4]) const {
    normals4(static_cast<uint32_t>(column / 4), row, index, layer, key0, key1, normal);
  }
  // 128 input signs of one token, columns 128 block ..
  __device__ __forceinline__ PhiloxWords input_signs(uint32_t layer, uint32_t token, uint32_t block) const {
    return philox({{block, token, index, layer}}, key0, key1 ^ kInputSignKey);
  }
  __device__ __forceinline__ float rank_sign(uint32_t layer, uint32_t token, uint32_t rank) const {
    return sign_of(philox({{rank / kSignsPerCounter, token, index, layer}}, key0, key1 ^ kRankSignKey), rank);
  }
  __device__ __forceinline__ float token_normal(uint32_t layer, uint32_t token, uint32_t rank) const {
    float normal[4];
    normals4(rank / 4, token, index, layer, key0, key1 ^ kTokenKey, normal);
    const uint32_t place = rank % 4;
    return place < 2 ? (place == 0 ? normal[0] : normal[1]) : (place == 2 ? normal[2] : normal[3]);
  }

  // z of one token and rank from what the columns' sum has given: M x, and E (s o x) or |x|^2 where the mode needs it.
  template <Mode kMode>
  __device__ __forceinline__ float finish(float mean, float other, uint32_t layer, uint32_t token,
                                          uint32_t rank) const {
    if constexpr (kMode == Mode::kFlipout) {
      return scale == 0.0f ? mean : fmaf(scale * rank_sign(layer, token, rank), other, mean);
    } else if constexpr (kMode == Mode::kToken) {
      return scale == 0.0f ? mean : fmaf(scale * sqrtf(other), token_normal(layer, token, rank), mean);
    } else {
      return mean;
    }
  }
};

}  // namespace tfb::cuda
