// expand_ on the CPU: y += scaling z U^T, cut into (block of rows) x (block of columns); each element is written once.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../check.h"
#include "aten.h"

namespace tfb::cpu {

namespace {

// Rows that share one transposed block of the basis.
constexpr int64_t kExpandRows = 128;

}  // namespace

void expand_(at::Tensor& y, const at::Tensor& z, const at::Tensor& basis, double scaling) {
  check_expand(y, z, basis);
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

TORCH_LIBRARY_IMPL(tfb_ext, CPU, m) { m.impl("expand_", &expand_); }

}  // namespace tfb::cpu
