#include "shrink.h"

#include "machine.h"

namespace tfb::cuda {

namespace {

int64_t element_bytes(Format format) { return format == Format::kFloat32 ? 4 : 2; }

bool aligned(const void* pointer, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride_bytes % bytes == 0;
}

}  // namespace

bool means_aligned(const ShrinkParams& p, int64_t bytes) {
  for (int k = 0; k < p.tile_count; ++k) {
    if (!aligned(p.tiles[k].mean, p.n * element_bytes(p.mean_format), bytes)) return false;
  }
  return true;
}

bool results_aligned(const ShrinkParams& p, int64_t bytes) {
  for (int k = 0; k < p.tile_count; ++k) {
    if (!aligned(p.tiles[k].z, p.tiles[k].z_stride * element_bytes(p.format), bytes)) return false;
  }
  return true;
}

Feed feed_of(const ShrinkParams& p) {
  const int64_t bytes = element_bytes(p.format);
  return aligned(p.x, p.x_stride * bytes, 16) && p.n * bytes % 16 == 0 ? Feed::kAsync : Feed::kPlain;
}

cudaError_t shrink_partial_floats(const ShrinkParams& p, int64_t& floats, bool& fits) {
  floats = 0;
  fits = true;
  if (p.format == Format::kFloat32) return cudaSuccess;
  Machine machine;
  const cudaError_t status = current_machine(machine);
  if (status != cudaSuccess) return status;
  // Asked for as many tiles as there can be, the plan has the widest rows of sums of any pass.
  const ShrinkPlan plan = plan_shrink(p.mode, p.n, kMaxRankTiles, feed_of(p), machine);
  fits = plan.kernel >= 0;
  if (!fits || plan.clustered) return status;
  floats =
      plan.panels * (p.groups * p.rows_per_group + p.lead_rows) * sum_pitch(p.mode, kShrinkKernels[plan.kernel].tiles);
  return status;
}

}  // namespace tfb::cuda
