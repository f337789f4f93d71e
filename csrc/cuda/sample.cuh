// What one group of rows draws from: the key, the counter's fixed words and the signed sigma.
#pragma once

#include <cstdint>

#include "../normal.h"
#include "shrink.h"

namespace tfb::cuda {

struct Sample {
  uint32_t key0, key1, sample, layer;
  float scale;

  __device__ __forceinline__ Sample(const ShrinkParams& p, int64_t group) {
    const auto seed = static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(p.seed)));
    const auto index = static_cast<uint32_t>(__ldg(p.samples + group));
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
    sample = noise_sample(index, p.antithetic);
    layer = p.layer;
    scale = __ldg(p.sigma + group) * noise_sign(index, p.antithetic);
  }

  // weight[0..4) += scale * E[row][column .. column + 4); column is a multiple of four.
  __device__ __forceinline__ void perturb(float* weight, int64_t row, int64_t column) const {
    float normal[4];
    normals4(static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), sample, layer, key0, key1, normal);
#pragma unroll
    for (int k = 0; k < 4; ++k) weight[k] = fmaf(scale, normal[k], weight[k]);
  }
};

}  // namespace tfb::cuda
