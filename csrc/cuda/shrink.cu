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

cudaError_t shrink_partial_floats(const ShrinkParams& p, int64_t& floats) {
  Machine machine;
  const cudaError_t status = current_machine(machine);
  const int panels = shrink_panels(p.n);
  const bool needed = p.format != Format::kFloat32 && !machine.clusters && panels > 1;
  // The widest row of sums of any pass.
  floats = needed ? panels * p.groups * p.rows_per_group * (kTileRanks * kMaxPassTiles + 2) : 0;
  return status;
}

cudaError_t launch_shrink(const ShrinkParams& params, cudaStream_t stream) {
  if (params.format == Format::kFloat32) return launch_shrink_float(params, stream);
  if (params.format == Format::kBFloat16) return launch_shrink_bfloat16(params, stream);
  return launch_shrink_float16(params, stream);
}

}  // namespace tfb::cuda
