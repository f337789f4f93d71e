// The CUDA operators on torch's side, and the only file here with torch headers: checks, device guard, current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "../attend.h"
#include "../check.h"
#include "../noise.h"
#include "attend.h"
#include "decode.h"
#include "expand.h"
#include "noise.h"
#include "shrink.h"

namespace tfb::cuda {

namespace {

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

// What the samples' rows draw from.
struct Draws {
  const at::Tensor& sigma;
  const at::Tensor& samples;
  const at::Tensor& seed;
  bool antithetic;
};

// Collects tiles of eight ranks over layers, and launches whenever the parameters are full.
class Shrinker {
 public:
  // For the rows of the mean.
  Shrinker(const at::Tensor& x, const CallRows& rows, Mode mode) : Shrinker(x, mean_mode(mode, x.size(1))) {
    params_.groups = 1;
    params_.rows_per_group = rows.lead_rows;
    params_.maps[0] = rows.lead;
  }
  // For the rows of the samples, and for those of the mean where `leads`.
  Shrinker(const at::Tensor& x, const CallRows& rows, Mode mode, const Draws& draws, bool leads = false)
      : Shrinker(x, mode) {
    if (leads) {
      params_.lead_rows = rows.lead_rows;
      params_.maps[1] = rows.lead;
      params_.maps[1].first -= rows.groups * rows.lead.each;  // its number among the groups
    }
    params_.groups = rows.groups;
    params_.rows_per_group = rows.group_rows;
    params_.maps[0] = rows.samples;
    params_.sigma = draws.sigma.const_data_ptr<float>();
    params_.samples = draws.samples.const_data_ptr<int32_t>();
    params_.seed = draws.seed.const_data_ptr<int64_t>();
    params_.antithetic = draws.antithetic;
  }

  const ShrinkParams& params() const { return params_; }

  // `z` (T, r) may be null where the caller does not launch.
  void add(const at::Tensor& mean, char* z, int64_t layer, cudaStream_t stream) {
    const int64_t r = mean.size(0);
    params_.mean_format = format_of(mean);
    const auto* rows = static_cast<const char*>(mean.const_data_ptr());
    const int64_t bytes = params_.format == Format::kFloat32 ? 4 : 2;
    for (int64_t row = 0; row < r; row += kTileRanks) {
      if (params_.tile_count == kMaxRankTiles) launch(stream);
      RankTile& tile = params_.tiles[params_.tile_count++];
      tile.mean = rows + row * params_.n * mean.element_size();
      tile.z = z == nullptr ? nullptr : z + row * bytes;
      tile.z_stride = r;
      tile.layer = static_cast<uint32_t>(layer);
      tile.row = static_cast<int32_t>(row);
      tile.rows = static_cast<int32_t>(r - row < kTileRanks ? r - row : kTileRanks);
    }
    // Signs are a layer's own.
    if (params_.mode == Mode::kFlipout && z != nullptr) launch(stream);
  }

  void run(const at::Tensor& x, at::TensorList means, const std::vector<char*>& z, at::IntArrayRef layers) {
    if (params_.groups * params_.rows_per_group == 0) return;
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    make_room(x.options().dtype(at::kFloat));
    for (size_t l = 0; l < means.size(); ++l) add(means[l], z[l], layers[l], stream);
    launch(stream);
  }

 private:
  Shrinker(const at::Tensor& x, Mode mode) {
    params_.x = x.const_data_ptr();
    params_.x_stride = x.stride(0);
    params_.n = x.size(1);
    params_.mode = mode;
    params_.format = format_of(x);
  }

  void make_room(const at::TensorOptions& options) {
    int64_t floats = 0;
    bool fits = true;
    C10_CUDA_CHECK(shrink_partial_floats(params_, floats, fits));
    TFB_CHECK_VALUE(fits, "shrink: this GPU gives a block too little shared memory, expected at least ",
                    kLeastSharedBytes, " bytes (compute capability 8.0 or newer). Fix: use float32 or the CPU");
    if (floats == 0) return;
    partial_ = at::empty({floats}, options);
    params_.partial = partial_.mutable_data_ptr<float>();
  }

  void launch(cudaStream_t stream) {
    if (params_.tile_count > 0) C10_CUDA_CHECK(launch_shrink(params_, stream));
    params_.tile_count = 0;
  }

  ShrinkParams params_{};
  at::Tensor partial_;
};

// Writes the z (T, r) of all layers.
void shrink_layers(const at::Tensor& x, at::TensorList means, const std::vector<char*>& z, const CallRows& rows,
                   Mode mode, const Draws& draws, at::IntArrayRef layers) {
  const bool leads = rows.sample_rows() > 0 && leads_along(mode, format_of(x));
  Shrinker(x, rows, mode, draws, leads).run(x, means, z, layers);
  if (!leads) Shrinker(x, rows, mode).run(x, means, z, layers);
}

std::vector<at::Tensor> shrink_group(const at::Tensor& x, at::TensorList means, const at::Tensor& sigma,
                                     const at::Tensor& samples, const at::Tensor& seed, at::IntArrayRef layers,
                                     std::string_view mode, bool antithetic, int64_t lead, int64_t each) {
  const Mode parsed = check_group("shrink_group", x, means, sigma, samples, seed, layers, mode, lead, each);
  std::vector<at::Tensor> out;
  std::vector<char*> z;
  for (const at::Tensor& mean : means) {
    out.push_back(at::empty({x.size(0), mean.size(0)}, x.options()));
    z.push_back(static_cast<char*>(out.back().mutable_data_ptr()));
  }
  if (x.size(0) == 0) return out;
  const c10::cuda::CUDAGuard guard(x.device());
  const CallRows rows(x.size(0), samples.size(0), lead, each);
  shrink_layers(x, means, z, rows, parsed, {sigma, samples, seed, antithetic}, layers);
  return out;
}

ExpandParams expand_call(at::Tensor& y, const void* z, int64_t z_stride, const at::Tensor& basis,
                         const at::Tensor* bias, double scaling) {
  ExpandParams call{};
  call.y = y.mutable_data_ptr();
  call.y_stride = y.stride(0);
  call.z = z;
  call.z_stride = z_stride;
  call.basis = basis.const_data_ptr();
  call.bias = bias == nullptr ? nullptr : bias->const_data_ptr();
  call.tokens = y.size(0);
  call.m = y.size(1);
  call.r = basis.size(1);
  call.scaling = static_cast<float>(scaling);
  call.format = format_of(y);
  return call;
}

// The products take the basis in y's type, to which they would round it anyway.
void expand_into(at::Tensor& y, const at::Tensor& z, const at::Tensor& given_basis, const at::Tensor* bias,
                 double scaling, bool add) {
  if (y.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor basis = given_basis.to(y.scalar_type());
  ExpandParams call = expand_call(y, z.const_data_ptr(), z.stride(0), basis, bias, scaling);
  call.add = add;
  C10_CUDA_CHECK(launch_expand(&call, 1, c10::cuda::getCurrentCUDAStream()));
}

void expand_(at::Tensor& y, const at::Tensor& z, const at::Tensor& basis, double scaling) {
  check_expand(y, z, basis);
  expand_into(y, z, basis, nullptr, scaling, true);
}

at::Tensor expand(const at::Tensor& z, const at::Tensor& basis, double scaling, const std::optional<at::Tensor>& bias) {
  check_expand_new(z, basis, bias);
  at::Tensor y = at::empty({z.size(0), basis.size(0)}, z.options());
  expand_into(y, z, basis, bias ? &*bias : nullptr, scaling, false);
  return y;
}

// The updates (T, m) in the shape of what was given, with the base layers' products of x added onto them.
std::vector<at::Tensor> finished(std::vector<at::Tensor> updates, const at::Tensor& x, at::TensorList weights,
                                 const at::Tensor& given) {
  for (size_t l = 0; l < weights.size(); ++l) updates[l].addmm_(x, weights[l].t());
  shape_as(given, updates);
  return updates;
}

std::vector<at::Tensor> update_group(const at::Tensor& given, at::TensorList means, at::TensorList bases,
                                     const c10::List<std::optional<at::Tensor>>& biases, at::ArrayRef<double> scalings,
                                     const at::Tensor& sigma, const at::Tensor& samples, const at::Tensor& seed,
                                     at::IntArrayRef layers, std::string_view mode_name, bool antithetic, int64_t lead,
                                     int64_t each, at::TensorList weights) {
  const at::Tensor x = rows_of(given);
  const Mode mode = check_update(x, means, bases, biases, scalings.size(), sigma, samples, seed, layers, mode_name,
                                 lead, each, weights);
  const CallRows rows(x.size(0), samples.size(0), lead, each);
  const Draws draws{sigma, samples, seed, antithetic};
  std::vector<at::Tensor> out;
  out.reserve(means.size());
  for (const at::Tensor& basis : bases) out.push_back(at::empty({x.size(0), basis.size(0)}, x.options()));
  if (x.size(0) == 0) {
    shape_as(given, out);
    return out;
  }
  int64_t tiles = 0;
  for (const at::Tensor& mean : means) tiles += (mean.size(0) + kTileRanks - 1) / kTileRanks;
  if (tiles <= kMaxRankTiles && means.size() <= kMaxLayers && rows.lead_rows == 0 &&
      decode_serves(format_of(x), rows.groups, rows.group_rows, tiles)) {
    DecodeParams params{};
    Shrinker shrinker(x, rows, mode, draws);
    for (size_t l = 0; l < means.size(); ++l) {
      DecodeLayer& layer = params.layers[l];
      const std::optional<at::Tensor> bias = biases.get(l);
      layer.y = out[l].mutable_data_ptr();
      layer.basis = bases[l].const_data_ptr();
      layer.bias = bias ? bias->const_data_ptr() : nullptr;
      layer.m = bases[l].size(0);
      layer.scaling = static_cast<float>(scalings[l]);
      layer.r = static_cast<int32_t>(means[l].size(0));
      layer.first_tile = shrinker.params().tile_count;
      shrinker.add(means[l], nullptr, layers[l], nullptr);
    }
    params.shrink = shrinker.params();
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor partial = at::empty({decode_partial_floats(params.shrink)}, x.options().dtype(at::kFloat));
    params.layer_count = static_cast<int32_t>(means.size());
    params.basis_format = format_of(bases[0]);
    params.partial = partial.mutable_data_ptr<float>();
    C10_CUDA_CHECK(launch_decode(params, c10::cuda::getCurrentCUDAStream()));
    return finished(std::move(out), x, weights, given);
  }
  // z of all layers lies in one piece of memory, each from a multiple of 16 bytes on.
  const auto bytes = static_cast<int64_t>(x.element_size());
  std::vector<int64_t> places{0};
  for (const at::Tensor& mean : means) {
    places.push_back(places.back() + (x.size(0) * mean.size(0) * bytes + 15) / 16 * 16);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor room = at::empty({places.back()}, x.options().dtype(at::kByte));
  std::vector<char*> z;
  std::vector<at::Tensor> rounded;  // bases, which live until the launch
  std::vector<ExpandParams> calls;
  for (size_t l = 0; l < means.size(); ++l) {
    z.push_back(static_cast<char*>(room.mutable_data_ptr()) + places[l]);
    rounded.push_back(bases[l].to(x.scalar_type()));
    if (out[l].numel() == 0) continue;
    const std::optional<at::Tensor> bias = biases.get(l);
    calls.push_back(expand_call(out[l], z[l], means[l].size(0), rounded[l], bias ? &*bias : nullptr, scalings[l]));
  }
  shrink_layers(x, means, z, rows, mode, draws, layers);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (!calls.empty()) C10_CUDA_CHECK(launch_expand(calls.data(), static_cast<int>(calls.size()), stream));
  return finished(std::move(out), x, weights, given);
}

void attend_(at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
             const at::Tensor& mask, double scale) {
  check_attend(out, query, key, value, mask);
  if (out.numel() == 0 || mask.size(2) == 0) return;
  const auto strides = [](const at::Tensor& tensor, int64_t head, int64_t token) {
    return AttendStrides{tensor.stride(0), tensor.stride(head), tensor.stride(token)};
  };
  AttendParams call{};
  call.groups = query.size(1) / key.size(1);
  call.tokens = mask.size(2) / call.groups;
  const int64_t others = query.size(2) - call.tokens;
  const auto bytes = static_cast<int64_t>(query.element_size());
  call.out = static_cast<char*>(out.mutable_data_ptr()) + others * out.stride(1) * bytes;
  call.query = static_cast<const char*>(query.const_data_ptr()) + others * query.stride(2) * bytes;
  call.key = key.const_data_ptr();
  call.value = value.const_data_ptr();
  call.mask = mask.const_data_ptr();
  call.out_strides = strides(out, 2, 1);
  call.query_strides = strides(query, 1, 2);
  call.key_strides = strides(key, 1, 2);
  call.value_strides = strides(value, 1, 2);
  call.mask_batch = mask.stride(0);
  call.mask_row = mask.stride(2);
  call.batch = query.size(0);
  call.key_heads = key.size(1);
  call.columns = key.size(2);
  call.width = query.size(3);
  call.scale = static_cast<float>(scale);
  call.format = format_of(query);
  const c10::cuda::CUDAGuard guard(query.device());
  bool adjacent = value.size(3) == call.width;
  for (const at::Tensor* tensor : {static_cast<const at::Tensor*>(&out), &query, &key, &value, &mask}) {
    adjacent = adjacent && tensor->stride(3) == 1;
  }
  if (adjacent && attend_serves(call)) {
    C10_CUDA_CHECK(launch_attend(call, c10::cuda::getCurrentCUDAStream()));
  } else {
    attend_by_torch(out, query, key, value, mask, scale);
  }
}

void implement(torch::Library& m) {
  m.impl("attend_", &attend_);
  m.impl("noise", &noise);
  m.impl("shrink_group", &shrink_group);
  m.impl("expand_", &expand_);
  m.impl("expand", &expand);
  m.impl("update_group", &update_group);
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

#ifndef TFB_EMULATOR  // which gives the operators another name
TORCH_LIBRARY_IMPL(tfb_ext, CUDA, m) { implement(m); }
#endif

}  // namespace tfb::cuda
