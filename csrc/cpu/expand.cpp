// expand on the CPU: y += scaling z U^T, cut into (block of rows) x (block of columns); each element is written once.
// What writes instead of adding starts from the bias.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "../attend.h"
#include "../check.h"
#include "aten.h"

namespace tfb::cpu {

namespace {

// Rows that share one transposed block of the basis.
constexpr int64_t kExpandRows = 128;

}  // namespace

void add_update(at::Tensor& y, const at::Tensor& z, const at::Tensor& basis, double scaling) {
  const int64_t tokens = y.size(0);
  const int64_t m = y.size(1);
  if (tokens == 0 || m == 0) return;

  ExpandParams params{};
  params.y = y.mutable_data_ptr();
  params.y_stride = y.stride(0);
  params.z = z.const_data_ptr();
  params.z_stride = z.stride(0);
  params.format = format_of(y);
  params.basis = basis.const_data_ptr();
  params.basis_format = format_of(basis);
  params.r = z.size(1);
  params.scaling = static_cast<float>(scaling);
  const int64_t row_blocks = (tokens + kExpandRows - 1) / kExpandRows;
  const int64_t column_blocks = (m + kExpandColumns - 1) / kExpandColumns;
  at::parallel_for(0, row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(expand_scratch(params.r));
    ExpandParams own = params;
    own.scratch = scratch.data();
    for (int64_t unit = begin; unit < end; ++unit) {
      own.token0 = unit / column_blocks * kExpandRows;
      own.token1 = std::min(tokens, own.token0 + kExpandRows);
      own.column0 = unit % column_blocks * kExpandColumns;
      own.column1 = std::min(m, own.column0 + kExpandColumns);
      kernels().expand(own);
    }
  });
}

void expand_(at::Tensor& y, const at::Tensor& z, const at::Tensor& basis, double scaling) {
  check_expand(y, z, basis);
  add_update(y, z, basis, scaling);
}

at::Tensor write_update(const at::Tensor& z, const at::Tensor& basis, double scaling,
                        const std::optional<at::Tensor>& bias) {
  at::Tensor y = at::zeros({z.size(0), basis.size(0)}, z.options());
  if (bias) y.add_(*bias);
  add_update(y, z, basis, scaling);
  return y;
}

at::Tensor expand(const at::Tensor& z, const at::Tensor& basis, double scaling, const std::optional<at::Tensor>& bias) {
  check_expand_new(z, basis, bias);
  return write_update(z, basis, scaling, bias);
}

std::vector<at::Tensor> update_group(const at::Tensor& given, at::TensorList means, at::TensorList bases,
                                     const c10::List<std::optional<at::Tensor>>& biases, at::ArrayRef<double> scalings,
                                     const at::Tensor& sigma, const at::Tensor& samples, const at::Tensor& seed,
                                     at::IntArrayRef layers, std::string_view mode, bool antithetic, int64_t lead,
                                     int64_t each, at::TensorList weights) {
  const at::Tensor x = rows_of(given);
  check_update(x, means, bases, biases, scalings.size(), sigma, samples, seed, layers, mode, lead, each, weights);
  const std::vector<at::Tensor> z = shrink_group(x, means, sigma, samples, seed, layers, mode, antithetic, lead, each);
  std::vector<at::Tensor> out;
  for (size_t l = 0; l < means.size(); ++l) {
    out.push_back(write_update(z[l], bases[l], scalings[l], biases.get(l)));
    if (!weights.empty()) out[l].addmm_(x, weights[l].t());
  }
  shape_as(given, out);
  return out;
}

void attend_(at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
             const at::Tensor& mask, double scale) {
  check_attend(out, query, key, value, mask);
  if (out.numel() > 0 && mask.size(2) > 0) attend_by_torch(out, query, key, value, mask, scale);
}

TORCH_LIBRARY_IMPL(tfb_ext, CPU, m) {
  m.impl("attend_", &attend_);
  m.impl("expand_", &expand_);
  m.impl("expand", &expand);
  m.impl("update_group", &update_group);
}

}  // namespace tfb::cpu
