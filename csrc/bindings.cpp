// The Python module tfb_ext._C, which loads the operators and exports small, tensor-free things.
#include <c10/core/DispatchKeySet.h>
#include <c10/core/TensorOptions.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <cstdint>

#include "cpu/kernels.h"
#include "philox.h"
#include "schemas.h"

#ifdef TFB_EXT_WITH_CUDA
#include "cuda/known_answer.h"
#include "cuda/machine.h"
#endif

namespace tfb {

TORCH_LIBRARY(tfb_ext, m) { define_operators(m); }

// noise has no tensor argument to dispatch on; its device argument chooses the backend.
at::Tensor noise_by_device(c10::DispatchKeySet, int64_t r, int64_t n, int64_t seed, int64_t layer, int64_t sample,
                           at::Device device, bool antithetic) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tfb_ext::noise", "")
                             .typed<at::Tensor(int64_t, int64_t, int64_t, int64_t, int64_t, at::Device, bool)>();
  const c10::DispatchKeySet keys(c10::computeDispatchKey(at::kFloat, at::kStrided, device));
  return op.redispatch(keys, r, n, seed, layer, sample, device, antithetic);
}

TORCH_LIBRARY_IMPL(tfb_ext, BackendSelect, m) { m.impl("noise", TORCH_FN(noise_by_device)); }

using Words4 = std::array<uint32_t, 4>;
using Words2 = std::array<uint32_t, 2>;

Words4 philox_words(const Words4& counter, const Words2& key) {
  const PhiloxWords out = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

#ifdef TFB_EXT_WITH_CUDA
bool cuda_clusters_in_use() {
  cuda::Machine machine;
  return cuda::current_machine(machine) == cudaSuccess && machine.cluster_blocks > 1;
}
#endif

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef TFB_EXT_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_arch_list"] = TFB_EXT_CUDA_ARCH_LIST;
  info["compiler"] = __VERSION__;
  info["cpu_capability"] = cpu::kernels().name;
  info["torch_version"] = TORCH_VERSION;
  return info;
}

}  // namespace tfb

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads torch.ops.tfb_ext.*; known-answer access to Philox and facts about this build.";
  m.def("philox", &tfb::philox_words, pybind11::arg("counter"), pybind11::arg("key"),
        "Philox4x32-10 on the host: four counter words and two key words to four output words.");
#ifdef TFB_EXT_WITH_CUDA
  m.def("philox_cuda", &tfb::cuda::philox_on_device, pybind11::arg("counter"), pybind11::arg("key"),
        "Philox4x32-10 on the current CUDA device; waits for the result.");
  m.def(
      "limit_machine",
      [](int shared_bytes, int cluster_blocks) { tfb::cuda::limit_machine({shared_bytes, cluster_blocks}); },
      pybind11::arg("shared_bytes") = tfb::cuda::kNoLimits.shared_bytes,
      pybind11::arg("cluster_blocks") = tfb::cuda::kNoLimits.cluster_blocks,
      "The most shared memory of a block and the largest cluster that the CUDA kernels use; no argument: no limit.");
  m.def("cuda_clusters_in_use", &tfb::cuda_clusters_in_use,
        "Whether the current device runs the kernels for clusters.");
#endif
  m.def("build_info", &tfb::build_info,
        "cuda (bool), cuda_arch_list, compiler, cpu_capability in use, torch_version at build.");
}
