// shrink in half precision, the launch; shrink_bfloat16.cu and shrink_float16.cu instantiate it.
#pragma once

#include <utility>

#include "machine.h"
#include "shrink_kernel.cuh"

namespace tfb::cuda {

template <class Traits>
cudaError_t launch_tiles(const ShrinkParams& p, const ShrinkPlan& plan, cudaStream_t stream) {
  ShrinkLayout layout{};
  const int64_t group_tiles = (p.rows_per_group + kTileRows - 1) / kTileRows;
  const int64_t lead_tiles = (p.lead_rows + kTileRows - 1) / kTileRows;
  if (group_tiles * p.groups + lead_tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  layout.panels = static_cast<int32_t>(plan.panels);
  layout.clustered = plan.clustered;
  layout.panel_columns = static_cast<int32_t>(plan.panel_columns);
  layout.group_tiles = static_cast<int32_t>(group_tiles);
  layout.groups = static_cast<int32_t>(p.groups);
  layout.tiles = static_cast<int32_t>(group_tiles * p.groups);
  layout.lead_tiles = static_cast<int32_t>(lead_tiles);
  layout.mean_aligned = means_aligned(p, p.mean_format == Format::kFloat32 ? 16 : 8);
  layout.z_aligned = results_aligned(p, 4);
  for (int k = 0; k < 2; ++k) layout.item_step[k] = p.maps[k].skip * p.x_stride;
  layout.round_tiles = plan.round_tiles;
  LaunchShape shape{dim3(1), Traits::kThreads};
  shape.shared = static_cast<size_t>(plan.shared);
  shape.cluster = layout.clustered ? layout.panels : 1;
  int resident = 0;
  cudaError_t status = resident_clusters(shrink_kernel<Traits>, shape, resident);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  const int32_t room = layout.clustered ? resident : (resident + layout.panels - 1) / layout.panels;
  layout.lead_ranges = ranges_of_lead(room, layout.tiles, p.groups, layout.lead_tiles);
  const int32_t left = room > layout.lead_ranges ? room - layout.lead_ranges : 1;
  const Ranges ranges = split_ranges(left, layout.tiles, p.groups);
  layout.ranges = ranges.all;
  layout.group_ranges = ranges.of_group;
  shape.grid = dim3(static_cast<unsigned>((layout.ranges + layout.lead_ranges) * layout.panels));
  status = launch(shrink_kernel<Traits>, shape, stream, p, layout);
  if (status != cudaSuccess || layout.clustered) return status;
  const int64_t pairs = rows_in_all(p) * (Traits::kRanks / 2);
  const int64_t blocks = (pairs + Traits::kThreads - 1) / Traits::kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(reduce_kernel<Traits>, {dim3(static_cast<unsigned>(blocks)), Traits::kThreads}, stream, p, layout);
}

// One launch function for each of kShrinkKernels.
template <class T, size_t... k>
cudaError_t launch_planned(const ShrinkParams& p, const ShrinkPlan& plan, cudaStream_t stream,
                           std::index_sequence<k...>) {
  using Launch = cudaError_t (*)(const ShrinkParams&, const ShrinkPlan&, cudaStream_t);
  constexpr Launch kLaunches[] = {launch_tiles<ShrinkTraits<T, kShrinkKernels[k].tiles, kShrinkKernels[k].warps,
                                                            kShrinkKernels[k].mode, kShrinkKernels[k].feed>>...};
  return kLaunches[plan.kernel](p, plan, stream);
}

template <class T>
cudaError_t launch_shrink_half(const ShrinkParams& params, cudaStream_t stream) {
  Machine machine;
  cudaError_t status = current_machine(machine);
  const Feed feed = feed_of(params);
  ShrinkParams pass = params;
  for (int first = 0; first < params.tile_count && status == cudaSuccess; first += pass.tile_count) {
    pass.tile_count = params.tile_count - first;
    const ShrinkPlan plan = plan_shrink(params.mode, params.n, pass.tile_count, feed, machine);
    if (plan.kernel < 0) return cudaErrorLaunchOutOfResources;
    const int32_t most = kShrinkKernels[plan.kernel].tiles;
    if (pass.tile_count > most) pass.tile_count = most;
    for (int k = 0; k < pass.tile_count; ++k) pass.tiles[k] = params.tiles[first + k];
    status = launch_planned<T>(pass, plan, stream, std::make_index_sequence<kShrinkKernelCount>{});
  }
  return status;
}

}  // namespace tfb::cuda
