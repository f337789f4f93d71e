// noise on the CPU: E itself, for export, reference and tests.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../check.h"
#include "../noise.h"
#include "aten.h"

namespace tfb::cpu {

at::Tensor noise(int64_t r, int64_t n, int64_t seed, int64_t layer, int64_t sample, at::Device device,
                 bool antithetic) {
  check_noise(r, n, layer, sample);
  at::Tensor out = at::empty({r, n}, at::TensorOptions().dtype(at::kFloat).device(device));
  NoiseParams params{};
  params.out = out.mutable_data_ptr<float>();
  params.n = n;
  params.key = noise_key(seed, layer);
  params.sample = noise_sample(static_cast<uint32_t>(sample), antithetic);
  params.sign = noise_sign(static_cast<uint32_t>(sample), antithetic);
  at::parallel_for(0, panel_count(r), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      NoiseParams own = params;
      own.row0 = panel * kPanelRows;
      own.out = params.out + own.row0 * n;
      own.rows = static_cast<int>(std::min<int64_t>(kPanelRows, r - own.row0));
      kernels().noise(own);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(tfb_ext, CPU, m) { m.impl("noise", &noise); }

}  // namespace tfb::cpu
