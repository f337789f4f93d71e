// torch.ops.tfb_emulated.*: the CUDA operators, checks and launches included, on CPU tensors.
#include "../../csrc/cuda/machine.h"
#include "../../csrc/cuda/ops.cpp"
#include "../../csrc/schemas.h"

TORCH_LIBRARY(tfb_emulated, m) { tfb::define_operators(m); }
TORCH_LIBRARY_IMPL(tfb_emulated, CPU, m) { tfb::cuda::implement(m); }

extern "C" __attribute__((visibility("default"))) void tfb_emulated_force_portable(bool portable) {
  tfb::cuda::force_portable(portable);
}
