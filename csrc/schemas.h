// The operators' schemas; tfb_ext/ops says what each computes.
#pragma once

#include <torch/library.h>

namespace tfb {

inline void define_operators(torch::Library& m) {
  m.def("noise(int r, int n, int seed, int layer, int sample, Device device, bool antithetic=False) -> Tensor");
  m.def(
      "shrink_group(Tensor x, Tensor[] means, Tensor sigma, Tensor samples, Tensor seed, int[] layers, "
      "str mode=\"weight\", bool antithetic=False, SymInt lead=0, SymInt each=0) -> Tensor[]");
  // No result: an alias of a mutated argument cannot be traced by torch.compile before torch 2.12.
  m.def("expand_(Tensor(a!) y, Tensor z, Tensor basis, float scaling) -> ()");
  m.def("expand(Tensor z, Tensor basis, float scaling, Tensor? bias=None) -> Tensor");
  m.def("attend_(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> ()");
  m.def(
      "update_group(Tensor x, Tensor[] means, Tensor[] bases, Tensor?[] biases, float[] scalings, Tensor sigma, "
      "Tensor samples, Tensor seed, int[] layers, str mode=\"weight\", bool antithetic=False, SymInt lead=0, "
      "SymInt each=0, *, Tensor[] weights) -> Tensor[]");
}

}  // namespace tfb
