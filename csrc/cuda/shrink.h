// shrink on CUDA: for layers that share x, z[t] = (M + sigma[k] E[samples[k]]) x[t], k being the group of row t
// (rows.h), or the other modes' forms of it (types.h). sigma, samples and seed are read by the kernel, so that one
// captured graph serves all of their values.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../rows.h"
#include "../types.h"
#include "tuning.h"

namespace tfb::cuda {

// Up to eight ranks of one layer: the unit in which layers are put side by side.
struct RankTile {
  const void* mean;  // their first row of the layer's mean (r, n)
  void* z;           // their first column of the layer's z (T, r)
  int64_t z_stride;  // elements between rows of z
  uint32_t layer;
  int32_t row;   // the first rank
  int32_t rows;  // ranks that exist, 1 to 8
};

struct ShrinkParams {
  const void* x;     // (T, n), of which this call serves the rows of its groups
  int64_t x_stride;  // elements between rows
  int64_t n;
  int64_t groups, rows_per_group;  // both at least 1
  int64_t lead_rows;               // of the mean: one more group behind these, where leads_along() says so; else 0
  RowMap maps[2];                  // of the groups in x and in z, and of that last one
  const float* sigma;              // null: no noise, and samples and seed are not read
  const int32_t* samples;
  const int64_t* seed;
  bool antithetic;
  Mode mode;
  Format format;       // of x and z
  Format mean_format;  // of all means
  float* partial;      // shrink_partial_floats() floats, or null where that is 0
  int32_t tile_count;
  RankTile tiles[kMaxRankTiles];
};

// Room for sums of panels in global memory, which the current device needs, and whether its shared memory suffices.
cudaError_t shrink_partial_floats(const ShrinkParams& params, int64_t& floats, bool& fits);

// One file each.
cudaError_t launch_shrink_bfloat16(const ShrinkParams& params, cudaStream_t stream);
cudaError_t launch_shrink_float16(const ShrinkParams& params, cudaStream_t stream);
cudaError_t launch_shrink_float(const ShrinkParams& params, cudaStream_t stream);

// In flipout mode all tiles are of one layer, since each layer has its own signs.
inline cudaError_t launch_shrink(const ShrinkParams& params, cudaStream_t stream) {
  if (params.format == Format::kFloat32) return launch_shrink_float(params, stream);
  if (params.format == Format::kBFloat16) return launch_shrink_bfloat16(params, stream);
  return launch_shrink_float16(params, stream);
}

// Whether a launch serves the mean's rows beside the samples'.
inline bool leads_along(Mode mode, Format format) { return mode == Mode::kWeight && format != Format::kFloat32; }

// By whether the rows of x start and end on 16 bytes.
Feed feed_of(const ShrinkParams& params);
// Whether all means (and all z) can be read (written) in pieces of `bytes`.
bool means_aligned(const ShrinkParams& params, int64_t bytes);
bool results_aligned(const ShrinkParams& params, int64_t bytes);

}  // namespace tfb::cuda
