// shrink on the CPU: z_t = (M + sigma_k E_k) x_t. The work is cut into (run of rows that share E) x (slice of columns).
// The cut depends on the shapes and the samples, never on the number of threads, and slices are summed in order, so a
// row's result is the same for any thread count and beside any other rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "../check.h"
#include "../philox.h"
#include "aten.h"

namespace tfb::cpu {

namespace {

// Rows of a run: enough to make the noise cheap beside the products, few enough to share a large group among threads.
constexpr int64_t kRunRows = 512;

struct Run {
  int64_t first_segment, segments, rows;
};

struct Plan {
  std::vector<Segment> segments;
  std::vector<Run> runs;
};

// Groups of more than kRunRows rows are cut; neighbours with the same noise (antithetic pairs, one sample under many
// sigmas) are joined, so that their E is made once.
Plan plan_runs(const at::Tensor& sigma, const at::Tensor& samples, int64_t rows_per_group, bool antithetic) {
  const float* sigmas = sigma.const_data_ptr<float>();
  const int32_t* indices = samples.const_data_ptr<int32_t>();
  Plan plan;
  for (int64_t group = 0; group < samples.size(0); ++group) {
    const auto index = static_cast<uint32_t>(indices[group]);
    for (int64_t done = 0; done < rows_per_group; done += kRunRows) {
      const Segment segment{group * rows_per_group + done, std::min(kRunRows, rows_per_group - done),
                            noise_sample(index, antithetic), sigmas[group] * noise_sign(index, antithetic)};
      const bool joins = !plan.runs.empty() && plan.segments.back().sample == segment.sample &&
                         plan.runs.back().rows + segment.rows <= kRunRows;
      if (!joins) plan.runs.push_back({static_cast<int64_t>(plan.segments.size()), 0, 0});
      plan.segments.push_back(segment);
      plan.runs.back().segments += 1;
      plan.runs.back().rows += segment.rows;
    }
  }
  return plan;
}

}  // namespace

at::Tensor shrink(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& sigma, const at::Tensor& samples,
                  const at::Tensor& seed, int64_t layer, std::string_view mode, bool antithetic) {
  check_shrink(x, mean, sigma, samples, seed, layer, mode);
  const int64_t tokens = x.size(0);
  const int64_t r = mean.size(0);
  const int64_t n = mean.size(1);
  at::Tensor z = at::empty({tokens, r}, x.options());
  if (tokens == 0) return z;

  const int64_t slices = (n + kSliceColumns - 1) / kSliceColumns;
  const int64_t pitch = panel_count(r) * kPanelRows;
  const at::Tensor partials = at::empty({slices, tokens, pitch}, x.options().dtype(at::kFloat));
  const Plan plan = plan_runs(sigma, samples, tokens / samples.size(0), antithetic);

  ShrinkParams params{};
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.format = format_of(x);
  params.r = r;
  params.key = noise_key(*seed.const_data_ptr<int64_t>(), layer);
  float* partial_data = partials.mutable_data_ptr<float>();
  const PanelParams weights{mean.const_data_ptr(), format_of(mean), nullptr, r, n, 0, 0};
  const auto runs = static_cast<int64_t>(plan.runs.size());
  // Slice by slice, so that a thread lays a slice of the mean out once and uses it for every run.
  at::parallel_for(0, slices * runs, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(shrink_scratch(r) + panel_scratch(r));
    ShrinkParams own = params;
    PanelParams panels = weights;
    panels.panels = scratch.data();
    own.panels = panels.panels;
    own.scratch = panels.panels + panel_scratch(r);
    int64_t filled = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Run& run = plan.runs[unit % runs];
      const int64_t slice = unit / runs;
      own.segments = plan.segments.data() + run.first_segment;
      own.segment_count = run.segments;
      own.column0 = panels.column0 = slice * kSliceColumns;
      own.column1 = panels.column1 = std::min(n, own.column0 + kSliceColumns);
      own.partial = partial_data + slice * tokens * pitch;
      if (slice != filled) kernels().panels(panels);
      filled = slice;
      kernels().shrink(own);
    }
  });

  const ReduceParams reduce{partial_data, slices, tokens, r, z.mutable_data_ptr(), format_of(z), 0, 0};
  at::parallel_for(0, tokens, 256, [&](int64_t begin, int64_t end) {
    ReduceParams own = reduce;
    own.token0 = begin;
    own.token1 = end;
    kernels().reduce(own);
  });
  return z;
}

TORCH_LIBRARY_IMPL(tfb_ext, CPU, m) { m.impl("shrink", &shrink); }

}  // namespace tfb::cpu
