// What the CPU operators share on torch's side.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace tfb::cpu {

inline NoiseKey noise_key(int64_t seed, int64_t layer) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(layer)};
}

// Of shrink.cpp; the layers of a group one after the other.
std::vector<at::Tensor> shrink_group(const at::Tensor& x, at::TensorList means, const at::Tensor& sigma,
                                     const at::Tensor& samples, const at::Tensor& seed, at::IntArrayRef layers,
                                     std::string_view mode, bool antithetic, int64_t lead, int64_t each);

// Scratch of one thread, aligned to a cache line and to the widest register.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

}  // namespace tfb::cpu
