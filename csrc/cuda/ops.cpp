// The CUDA operators on torch's side, and the only file here with torch headers: checks, device guard, current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "../check.h"
#include "../philox.h"
#include "expand.h"
#include "known_answer.h"
#include "noise.h"
#include "shrink.h"

namespace tfb::cuda {

namespace {

Format format_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return Format::kFloat32;
  return tensor.scalar_type() == at::kBFloat16 ? Format::kBFloat16 : Format::kFloat16;
}

at::Tensor noise(int64_t r, int64_t n, int64_t seed, int64_t layer, int64_t sample, at::Device device,
                 bool antithetic) {
  check_noise(r, n, layer, sample);
  at::Tensor out = at::empty({r, n}, at::TensorOptions().dtype(at::kFloat).device(device));
  const c10::cuda::CUDAGuard guard(out.device());
  const auto bits = static_cast<uint64_t>(seed);
  const auto index = static_cast<uint32_t>(sample);
  const NoiseParams params{out.mutable_data_ptr<float>(),
                           r,
                           n,
                           static_cast<uint32_t>(bits),
                           static_cast<uint32_t>(bits >> 32),
                           static_cast<uint32_t>(layer),
                           noise_sample(index, antithetic),
                           noise_sign(index, antithetic)};
  C10_CUDA_CHECK(launch_noise(params, c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor shrink(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& sigma, const at::Tensor& samples,
                  const at::Tensor& seed, int64_t layer, std::string_view mode, bool antithetic) {
  check_shrink(x, mean, sigma, samples, seed, layer, mode);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor z = at::empty({x.size(0), mean.size(0)}, x.options());
  if (x.size(0) == 0) return z;
  ShrinkParams params{};
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.mean = mean.const_data_ptr();
  params.sigma = sigma.const_data_ptr<float>();
  params.samples = samples.const_data_ptr<int32_t>();
  params.seed = seed.const_data_ptr<int64_t>();
  params.z = z.mutable_data_ptr();
  params.r = mean.size(0);
  params.n = mean.size(1);
  params.groups = samples.size(0);
  params.rows_per_group = x.size(0) / samples.size(0);
  params.layer = static_cast<uint32_t>(layer);
  params.antithetic = antithetic;
  params.format = format_of(x);
  params.mean_format = format_of(mean);
  C10_CUDA_CHECK(launch_shrink(params, c10::cuda::getCurrentCUDAStream()));
  return z;
}

void expand_(at::Tensor& y, const at::Tensor& z, const at::Tensor& basis, double scaling) {
  check_expand(y, z, basis);
  if (y.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(y.device());
  ExpandParams params{};
  params.y = y.mutable_data_ptr();
  params.y_stride = y.stride(0);
  params.z = z.const_data_ptr();
  params.z_stride = z.stride(0);
  params.basis = basis.const_data_ptr();
  params.tokens = y.size(0);
  params.m = y.size(1);
  params.r = z.size(1);
  params.scaling = static_cast<float>(scaling);
  params.format = format_of(y);
  params.basis_format = format_of(basis);
  C10_CUDA_CHECK(launch_expand(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

std::array<uint32_t, 4> philox_on_device(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const at::Tensor words = at::empty({4}, at::TensorOptions().dtype(at::kInt).device(at::kCUDA));
  PhiloxParams params{{counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]}, nullptr};
  params.out = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  C10_CUDA_CHECK(launch_philox(params, c10::cuda::getCurrentCUDAStream()));
  const at::Tensor copy = words.cpu();
  std::array<uint32_t, 4> out{};
  for (size_t k = 0; k < out.size(); ++k) out[k] = static_cast<uint32_t>(copy.const_data_ptr<int32_t>()[k]);
  return out;
}

TORCH_LIBRARY_IMPL(tfb_ext, CUDA, m) {
  m.impl("noise", &noise);
  m.impl("shrink", &shrink);
  m.impl("expand_", &expand_);
}

}  // namespace tfb::cuda
