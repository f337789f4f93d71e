// The Python module tfb_ext._C, which loads the operators and exports small things.
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorOptions.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attend.h"
#include "check.h"
#include "cpu/kernels.h"
#include "noise.h"
#include "schemas.h"

#ifdef TFB_EXT_WITH_CUDA
#include "cuda/machine.h"
#include "cuda/noise.h"
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

// What is computed with tensors that require grad requires it too; its backward pass raises that there is no
// derivative.
TORCH_LIBRARY_IMPL(tfb_ext, Autograd, m) {
  for (const char* name : {"shrink_group", "expand"}) m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

// Whether a derivative is asked for; one in forward mode is refused.
bool asks(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(0).defined(),
                              sentence("Trying to use forward AD with tfb_ext::", op, " that does not support it."));
  return tensor.requires_grad();
}

// torch's fallbacks see a change of an argument only where it is returned, so expand_, which returns nothing, has its
// own.
void next_expand(c10::DispatchKeySet keys, at::Tensor& y, const at::Tensor& z, const at::Tensor& basis,
                 double scaling) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tfb_ext::expand_", "")
                             .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, double)>();
  op.redispatch(keys, y, z, basis, scaling);
}

struct ExpandWithoutDerivative : torch::autograd::Function<ExpandWithoutDerivative> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::Tensor y, const at::Tensor& z,
                            const at::Tensor& basis, double scaling, c10::DispatchKeySet keys) {
    const at::AutoDispatchBelowAutograd guard;
    next_expand(keys, y, z, basis, scaling);
    context->mark_dirty({y});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK(false, "derivative for tfb_ext::expand_ is not implemented");
  }
};

void expand_with_history(c10::DispatchKeySet keys, at::Tensor& y, const at::Tensor& z, const at::Tensor& basis,
                         double scaling) {
  bool asked = false;
  for (const at::Tensor* tensor : {static_cast<const at::Tensor*>(&y), &z, &basis}) asked |= asks("expand_", *tensor);
  const c10::DispatchKeySet below = keys & c10::after_autograd_keyset;
  if (asked && at::GradMode::is_enabled()) {
    torch::autograd::check_inplace(y, true);
    ExpandWithoutDerivative::apply(y, z, basis, scaling, below);
  } else {
    const at::AutoDispatchBelowAutograd guard;
    next_expand(below, y, z, basis, scaling);
  }
}

// torch's fallback does not look into lists of optional tensors, as the biases of update_group are.
using Biases = c10::List<std::optional<at::Tensor>>;

struct UpdateWithoutDerivative : torch::autograd::Function<UpdateWithoutDerivative> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, at::TensorList,
                                                const std::function<torch::autograd::variable_list()>& update) {
    return update();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK(false, "derivative for tfb_ext::update_group is not implemented");
  }
};

const auto& update_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tfb_ext::update_group", "")
                             .typed<std::vector<at::Tensor>(
                                 const at::Tensor&, at::TensorList, at::TensorList, const Biases&, at::ArrayRef<double>,
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                                 std::string_view, bool, c10::SymInt, c10::SymInt, at::TensorList)>();
  return op;
}

std::vector<at::Tensor> update_with_history(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList means,
                                            at::TensorList bases, const Biases& biases, at::ArrayRef<double> scalings,
                                            const at::Tensor& sigma, const at::Tensor& samples, const at::Tensor& seed,
                                            at::IntArrayRef layers, std::string_view mode, bool antithetic,
                                            c10::SymInt lead, c10::SymInt each, at::TensorList weights) {
  std::vector<at::Tensor> asking;
  const auto ask = [&asking](const at::Tensor& tensor) {
    if (asks("update_group", tensor)) asking.push_back(tensor);
  };
  ask(x), ask(sigma);
  for (const at::Tensor& mean : means) ask(mean);
  for (const at::Tensor& weight : weights) ask(weight);
  for (const at::Tensor& basis : bases) ask(basis);
  for (size_t l = 0; l < biases.size(); ++l) {
    if (const std::optional<at::Tensor> bias = biases.get(l)) ask(*bias);
  }
  const auto update = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return update_operator().redispatch(keys & c10::after_autograd_keyset, x, means, bases, biases, scalings, sigma,
                                        samples, seed, layers, mode, antithetic, lead, each, weights);
  };
  if (asking.empty() || !at::GradMode::is_enabled()) return update();
  return UpdateWithoutDerivative::apply(at::TensorList(asking),
                                        std::function<torch::autograd::variable_list()>(update));
}

// Counts the change of y, so that a backward pass that has saved it notices.
void expand_and_count(c10::DispatchKeySet keys, at::Tensor& y, const at::Tensor& z, const at::Tensor& basis,
                      double scaling) {
  TFB_CHECK_VALUE(!y.is_inference() || c10::InferenceMode::is_enabled(),
                  "expand_: y got an inference tensor, expected a normal one outside torch.inference_mode(). "
                  "Fix: pass y.clone()");
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    next_expand(keys & c10::after_ADInplaceOrView_keyset, y, z, basis, scaling);
  }
  y.unsafeGetTensorImpl()->bump_version();
}

const auto& attend_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tfb_ext::attend_", "")
                             .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, double)>();
  return op;
}

void attend_without_history(c10::DispatchKeySet keys, at::Tensor& out, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const at::Tensor& mask, double scale) {
  bool asked = false;
  for (const at::Tensor* tensor : {static_cast<const at::Tensor*>(&out), &query, &key, &value, &mask}) {
    asked |= asks("attend_", *tensor);
  }
  TORCH_CHECK(!asked || !at::GradMode::is_enabled(), "derivative for tfb_ext::attend_ is not implemented");
  const at::AutoDispatchBelowAutograd guard;
  attend_operator().redispatch(keys & c10::after_autograd_keyset, out, query, key, value, mask, scale);
}

void attend_and_count(c10::DispatchKeySet keys, at::Tensor& out, const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& mask, double scale) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    attend_operator().redispatch(keys & c10::after_ADInplaceOrView_keyset, out, query, key, value, mask, scale);
  }
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_IMPL(tfb_ext, Autograd, m) {
  m.impl("attend_", TORCH_FN(attend_without_history));
  m.impl("expand_", TORCH_FN(expand_with_history));
  m.impl("update_group", TORCH_FN(update_with_history));
}
TORCH_LIBRARY_IMPL(tfb_ext, ADInplaceOrView, m) {
  m.impl("attend_", TORCH_FN(attend_and_count));
  m.impl("expand_", TORCH_FN(expand_and_count));
}

// The checks of the kernels with the operators' own arguments, for the fakes in tfb_ext/ops.
using Tensors = std::vector<at::Tensor>;
using OptionalTensors = std::vector<std::optional<at::Tensor>>;

void check_group_call(const at::Tensor& x, const Tensors& means, const at::Tensor& sigma, const at::Tensor& samples,
                      const at::Tensor& seed, const std::vector<int64_t>& layers, const std::string& mode, bool,
                      const c10::SymInt& lead, const c10::SymInt& each) {
  check_group("shrink_group", x, means, sigma, samples, seed, layers, mode, lead, each);
}
void check_update_call(const at::Tensor& x, const Tensors& means, const Tensors& bases, const OptionalTensors& biases,
                       const std::vector<double>& scalings, const at::Tensor& sigma, const at::Tensor& samples,
                       const at::Tensor& seed, const std::vector<int64_t>& layers, const std::string& mode, bool,
                       const c10::SymInt& lead, const c10::SymInt& each, const Tensors& weights) {
  const c10::List<std::optional<at::Tensor>> list{c10::ArrayRef<std::optional<at::Tensor>>(biases)};
  check_update(rows_of(x), means, bases, list, scalings.size(), sigma, samples, seed, layers, mode, lead, each,
               weights);
}

// The two operators that every layer calls, by the dispatcher as ever but without the boxed lists of torch.ops: 128
// calls of a model's forward would spend more on those than on their checks.
Tensors update_group(const at::Tensor& x, const Tensors& means, const Tensors& bases, const OptionalTensors& biases,
                     const std::vector<double>& scalings, const at::Tensor& sigma, const at::Tensor& samples,
                     const at::Tensor& seed, const std::vector<int64_t>& layers, const std::string& mode,
                     bool antithetic, const c10::SymInt& lead, const c10::SymInt& each, const Tensors& weights) {
  const Biases list{c10::ArrayRef<std::optional<at::Tensor>>(biases)};
  return update_operator().call(x, means, bases, list, scalings, sigma, samples, seed, layers, mode, antithetic, lead,
                                each, weights);
}
void attend_(at::Tensor out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
             const at::Tensor& mask, double scale) {
  attend_operator().call(out, query, key, value, mask, scale);
}

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
  using pybind11::arg;
  m.doc() = "Loads torch.ops.tfb_ext.*; their checks, known-answer access to Philox and facts about this build.";
  m.def("check_attend_", torch::wrap_pybind_function(tfb::check_attend));
  m.def("check_noise", torch::wrap_pybind_function(tfb::check_noise));
  m.def("check_shrink_group", torch::wrap_pybind_function(tfb::check_group_call), arg("x"), arg("means"), arg("sigma"),
        arg("samples"), arg("seed"), arg("layers"), arg("mode") = "weight", arg("antithetic") = false, arg("lead") = 0,
        arg("each") = 0);
  m.def("check_expand_", torch::wrap_pybind_function(tfb::check_expand));
  m.def("check_expand", torch::wrap_pybind_function(tfb::check_expand_new));
  m.def("check_update_group", torch::wrap_pybind_function(tfb::check_update_call), arg("x"), arg("means"), arg("bases"),
        arg("biases"), arg("scalings"), arg("sigma"), arg("samples"), arg("seed"), arg("layers"),
        arg("mode") = "weight", arg("antithetic") = false, arg("lead") = 0, arg("each") = 0,
        arg("weights") = tfb::Tensors());
  m.def("update_group", torch::wrap_pybind_function_no_gil(tfb::update_group));
  m.def("attend_", torch::wrap_pybind_function_no_gil(tfb::attend_));
  m.def("philox", &tfb::philox_words, arg("counter"), arg("key"),
        "Philox4x32-10 on the host: four counter words and two key words to four output words.");
#ifdef TFB_EXT_WITH_CUDA
  m.def("philox_cuda", &tfb::cuda::philox_on_device, arg("counter"), arg("key"),
        "Philox4x32-10 on the current CUDA device; waits for the result.");
  m.def(
      "limit_machine",
      [](int shared_bytes, int cluster_blocks) { tfb::cuda::limit_machine({shared_bytes, cluster_blocks}); },
      arg("shared_bytes") = tfb::cuda::kNoLimits.shared_bytes,
      arg("cluster_blocks") = tfb::cuda::kNoLimits.cluster_blocks,
      "The most shared memory of a block and the largest cluster that the CUDA kernels use; no argument: no limit.");
  m.def("cuda_clusters_in_use", &tfb::cuda_clusters_in_use,
        "Whether the current device runs the kernels for clusters.");
#endif
  m.def("build_info", &tfb::build_info,
        "cuda (bool), cuda_arch_list, compiler, cpu_capability in use, torch_version at build.");
}
