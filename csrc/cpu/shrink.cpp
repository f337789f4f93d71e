// shrink on the CPU: z_t = (M + sigma_k E_k) x_t. The work is cut into (run of rows that share E) x (slice of columns).
// The cut depends on the shapes and the samples, never on the number of threads, and slices are summed in order, so a
// row's result is the same for any thread count and beside any other rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "../check.h"
#include "../noise.h"
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
// sigmas) are joined, so that their E is made once. Rows of the mean, which have none, are runs of their own behind.
Plan plan_runs(const CallRows& rows, const at::Tensor& sigma, const at::Tensor& samples, bool antithetic) {
  const float* sigmas = sigma.const_data_ptr<float>();
  const int32_t* indices = samples.const_data_ptr<int32_t>();
  Plan plan;
  for (int64_t group = 0; group < rows.groups; ++group) {
    const auto index = static_cast<uint32_t>(indices[group]);
    for (int64_t done = 0; done < rows.group_rows; done += kRunRows) {
      const Segment segment{&rows.samples,
                            group,
                            done,
                            std::min(kRunRows, rows.group_rows - done),
                            group * rows.group_rows + done,
                            noise_sample(index, antithetic),
                            sigmas[group] * noise_sign(index, antithetic)};
      const bool joins = !plan.runs.empty() && plan.segments.back().sample == segment.sample &&
                         plan.runs.back().rows + segment.rows <= kRunRows;
      if (!joins) plan.runs.push_back({static_cast<int64_t>(plan.segments.size()), 0, 0});
      plan.segments.push_back(segment);
      plan.runs.back().segments += 1;
      plan.runs.back().rows += segment.rows;
    }
  }
  for (int64_t done = 0; done < rows.lead_rows; done += kRunRows) {
    const int64_t count = std::min(kRunRows, rows.lead_rows - done);
    plan.runs.push_back({static_cast<int64_t>(plan.segments.size()), 1, count});
    plan.segments.push_back({&rows.lead, 0, done, count, rows.sample_rows() + done, 0, 0.0f});
  }
  return plan;
}

// One layer's product with a group of rows.
struct Problem {
  const at::Tensor& x;
  const at::Tensor& mean;
  const at::Tensor& sigma;
  const at::Tensor& samples;
  NoiseKey key;
  bool antithetic;
  CallRows rows;

  int64_t tokens() const { return x.size(0); }
  int64_t pitch() const { return panel_count(mean.size(0)) * kPanelRows; }
  int64_t slices() const { return (x.size(1) + kSliceColumns - 1) / kSliceColumns; }
};

// (slices, T, pitch) float32: each slice's share of (M + scale E) x, of M x, or of E (s o x).
enum class Part { kSum, kMean, kFlipped };

at::Tensor multiply(const Problem& problem, Part part) {
  const int64_t tokens = problem.tokens();
  const int64_t r = problem.mean.size(0);
  const int64_t n = problem.mean.size(1);
  const int64_t slices = problem.slices();
  const int64_t pitch = problem.pitch();
  const at::Tensor partials = at::empty({slices, tokens, pitch}, problem.x.options().dtype(at::kFloat));
  CallRows rows = problem.rows;
  if (part == Part::kFlipped) rows.lead_rows = 0;
  Plan plan = plan_runs(rows, problem.sigma, problem.samples, problem.antithetic);
  if (part != Part::kSum) {
    for (Segment& segment : plan.segments) segment.scale = part == Part::kMean ? 0.0f : 1.0f;
  }

  ShrinkParams params{};
  params.x = problem.x.const_data_ptr();
  params.x_stride = problem.x.stride(0);
  params.format = format_of(problem.x);
  params.r = r;
  params.key = problem.key;
  params.signs = part == Part::kFlipped;
  float* partial_data = partials.mutable_data_ptr<float>();
  const PanelParams weights{problem.mean.const_data_ptr(), format_of(problem.mean), nullptr, r, n, 0, 0};
  const auto runs = static_cast<int64_t>(plan.runs.size());
  // Slice by slice, so that a thread lays a slice of the mean out once and uses it for every run.
  at::parallel_for(0, slices * runs, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(shrink_scratch(r) + panel_scratch(r));
    ShrinkParams own = params;
    PanelParams panels = weights;
    panels.panels = scratch.data();
    own.panels = panels.panels;
    own.scratch = panels.panels + panel_scratch(r);
    if (part == Part::kFlipped) std::fill_n(panels.panels, panel_scratch(r), 0.0f);
    int64_t filled = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Run& run = plan.runs[unit % runs];
      const int64_t slice = unit / runs;
      own.segments = plan.segments.data() + run.first_segment;
      own.segment_count = run.segments;
      own.column0 = panels.column0 = slice * kSliceColumns;
      own.column1 = panels.column1 = std::min(n, own.column0 + kSliceColumns);
      own.partial = partial_data + slice * tokens * pitch;
      if (slice != filled && part != Part::kFlipped) kernels().panels(panels);
      filled = slice;
      kernels().shrink(own);
    }
  });
  return partials;
}

// scale * r_t o (E (s_t o x_t)), (T, pitch) float32; 0 for rows of the mean.
at::Tensor flipout_addend(const Problem& problem) {
  const at::Tensor partials = multiply(problem, Part::kFlipped);
  const int64_t tokens = problem.tokens();
  const int64_t pitch = problem.pitch();
  const int64_t slices = problem.slices();
  const at::Tensor out = at::zeros({tokens, pitch}, partials.options());
  const float* from = partials.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int32_t* indices = problem.samples.const_data_ptr<int32_t>();
  const float* sigma = problem.sigma.const_data_ptr<float>();
  at::parallel_for(0, problem.rows.sample_rows(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t group = t / problem.rows.group_rows;
      const auto token = static_cast<uint32_t>(t % problem.rows.group_rows);
      const auto index = static_cast<uint32_t>(indices[group]);
      const float scale = sigma[group] * noise_sign(index, problem.antithetic);
      const uint32_t sample = noise_sample(index, problem.antithetic);
      PhiloxWords words{};
      for (int64_t i = 0; i < problem.mean.size(0); ++i) {
        const auto rank = static_cast<uint32_t>(i);
        if (rank % kSignsPerCounter == 0) {
          words = philox({{rank / kSignsPerCounter, token, sample, problem.key.layer}}, problem.key.key0,
                         problem.key.key1 ^ kRankSignKey);
        }
        float sum = 0.0f;
        for (int64_t slice = 0; slice < slices; ++slice) sum += from[(slice * tokens + t) * pitch + i];
        to[t * pitch + i] = scale * sign_of(words, rank) * sum;
      }
    }
  });
  return out;
}

// scale * |x_t| e_t, (T, pitch) float32; 0 for rows of the mean.
at::Tensor token_addend(const Problem& problem) {
  const int64_t tokens = problem.tokens();
  const int64_t pitch = problem.pitch();
  const int64_t rows = problem.rows.group_rows;
  const int64_t r = problem.mean.size(0);
  const int64_t blocks = panel_count(rows);  // of eight rows of a group
  const at::Tensor out = at::zeros({tokens, pitch}, problem.x.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  const int32_t* indices = problem.samples.const_data_ptr<int32_t>();
  const float* sigma = problem.sigma.const_data_ptr<float>();
  SquaresParams squares{};
  squares.x = problem.x.const_data_ptr();
  squares.x_stride = problem.x.stride(0);
  squares.n = problem.x.size(1);
  squares.format = format_of(problem.x);
  squares.map = problem.rows.samples;
  at::parallel_for(0, problem.samples.size(0) * blocks, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> normals(static_cast<size_t>(kPanelRows * r));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / blocks;
      const auto index = static_cast<uint32_t>(indices[group]);
      const float scale = sigma[group] * noise_sign(index, problem.antithetic);
      // The generator's rows are tokens here and its columns ranks.
      NoiseParams noise{};
      noise.n = r;
      noise.row0 = unit % blocks * kPanelRows;
      noise.rows = static_cast<int>(std::min<int64_t>(kPanelRows, rows - noise.row0));
      noise.out = normals.data();
      noise.key = problem.key;
      noise.key.key1 ^= kTokenKey;
      noise.sample = noise_sample(index, problem.antithetic);
      noise.sign = 1.0f;
      kernels().noise(noise);
      float sums[kPanelRows];
      SquaresParams own = squares;
      own.group = group;
      own.token0 = noise.row0;
      own.token1 = own.token0 + noise.rows;
      own.out = sums;
      kernels().squares(own);
      for (int row = 0; row < noise.rows; ++row) {
        const float length = scale * std::sqrt(sums[row]);
        float* const target = to + (group * rows + noise.row0 + row) * pitch;
        for (int64_t i = 0; i < r; ++i) target[i] = length * normals[row * r + i];
      }
    }
  });
  return out;
}

at::Tensor shrink_layer(const Problem& problem, Mode mode) {
  const int64_t tokens = problem.tokens();
  at::Tensor z = at::empty({tokens, problem.mean.size(0)}, problem.x.options());
  if (tokens == 0) return z;
  const at::Tensor partials = multiply(problem, mode == Mode::kWeight ? Part::kSum : Part::kMean);
  at::Tensor addend;
  if (mode == Mode::kFlipout) addend = flipout_addend(problem);
  if (mode == Mode::kToken) addend = token_addend(problem);
  const ReduceParams reduce{problem.rows,
                            partials.const_data_ptr<float>(),
                            addend.defined() ? addend.const_data_ptr<float>() : nullptr,
                            problem.slices(),
                            tokens,
                            problem.mean.size(0),
                            z.mutable_data_ptr(),
                            format_of(z),
                            0,
                            0};
  at::parallel_for(0, tokens, 256, [&](int64_t begin, int64_t end) {
    ReduceParams own = reduce;
    own.token0 = begin;
    own.token1 = end;
    kernels().reduce(own);
  });
  return z;
}

}  // namespace

std::vector<at::Tensor> shrink_group(const at::Tensor& x, at::TensorList means, const at::Tensor& sigma,
                                     const at::Tensor& samples, const at::Tensor& seed, at::IntArrayRef layers,
                                     std::string_view mode, bool antithetic, int64_t lead, int64_t each) {
  const Mode parsed = check_group("shrink_group", x, means, sigma, samples, seed, layers, mode, lead, each);
  const CallRows rows(x.size(0), samples.size(0), lead, each);
  std::vector<at::Tensor> out;
  for (size_t l = 0; l < means.size(); ++l) {
    const NoiseKey key = noise_key(*seed.const_data_ptr<int64_t>(), layers[l]);
    out.push_back(shrink_layer({x, means[l], sigma, samples, key, antithetic, rows}, parsed));
  }
  return out;
}

TORCH_LIBRARY_IMPL(tfb_ext, CPU, m) { m.impl("shrink_group", &shrink_group); }

}  // namespace tfb::cpu
