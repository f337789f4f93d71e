// torch.ops.tfb_emulated.*: the CUDA operators, checks and launches included, on CPU tensors.
#include "../../csrc/cuda/machine.h"
#include "../../csrc/cuda/ops.cpp"
#include "../../csrc/schemas.h"

TORCH_LIBRARY(tfb_emulated, m) { tfb::define_operators(m); }
TORCH_LIBRARY_IMPL(tfb_emulated, CPU, m) { tfb::cuda::implement(m); }

#define TFB_EMULATED extern "C" __attribute__((visibility("default")))

TFB_EMULATED void tfb_emulated_limit_machine(int shared_bytes, int cluster_blocks) {
  tfb::cuda::limit_machine({shared_bytes, cluster_blocks});
}

// The item of a row, as the kernels find it.
TFB_EMULATED int64_t tfb_emulated_item(int64_t each, int64_t items, int64_t number) {
  return tfb::item_of(tfb::RowMap(0, each, each, items), number);
}

// plan_shrink for a machine that need not exist: tiles, warps, panels, panel columns, clustered, round tiles, bytes.
TFB_EMULATED void tfb_emulated_plan(int mode, int64_t n, int64_t tiles, bool aligned, int shared_bytes,
                                    int cluster_blocks, int64_t* out) {
  const tfb::cuda::Machine machine{1, shared_bytes, cluster_blocks};
  const auto feed = aligned ? tfb::cuda::Feed::kAsync : tfb::cuda::Feed::kPlain;
  const auto plan = tfb::cuda::plan_shrink(static_cast<tfb::Mode>(mode), n, tiles, feed, machine);
  const bool found = plan.kernel >= 0;
  const int64_t values[] = {found ? tfb::cuda::kShrinkKernels[plan.kernel].tiles : 0,
                            found ? tfb::cuda::kShrinkKernels[plan.kernel].warps : 0,
                            plan.panels,
                            plan.panel_columns,
                            plan.clustered,
                            plan.round_tiles,
                            plan.shared};
  for (int k = 0; k < 7; ++k) out[k] = values[k];
}
