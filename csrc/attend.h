// attend_'s checks, and its results by torch's own attention for what no kernel here serves.
#pragma once

#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "check.h"

namespace tfb {

inline void check_attend(const at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const at::Tensor& mask) {
  const char* op = "attend_";
  const auto check = [&](const char* name, const at::Tensor& tensor, const std::array<c10::SymInt, 4>& sizes) {
    check_device(op, name, tensor, query, "query");
    TFB_CHECK_TYPE(tensor.scalar_type() == query.scalar_type(), op, ": ", name, " has type ", tensor.scalar_type(),
                   ", expected query's type ", query.scalar_type());
    bool same = tensor.dim() == 4;
    for (int64_t k = 0; same && k < 4; ++k) same = holds(tensor.sym_size(k).sym_eq(sizes[static_cast<size_t>(k)]));
    TFB_CHECK_VALUE(same, op, ": ", name, " has shape ", tensor.sym_sizes(), ", expected ",
                    c10::SymIntArrayRef(sizes.data(), sizes.size()));
  };
  TFB_CHECK_TYPE(is_supported(query.scalar_type()), op, ": query has type ", query.scalar_type(),
                 ", expected float32, bfloat16 or float16");
  for (const auto& [name, tensor] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
    TFB_CHECK_VALUE(tensor->dim() == 4, op, ": ", name, " has shape ", tensor->sym_sizes(),
                    ", expected four dimensions (batch, heads, tokens, width)");
  }
  const c10::SymInt batch = query.sym_size(0), heads = query.sym_size(1), tokens = query.sym_size(2);
  const c10::SymInt shared = key.sym_size(1), columns = key.sym_size(2);
  TFB_CHECK_VALUE(shared.sym_ge(1).sym_and((heads % shared).sym_eq(0)), op, ": query has ", heads,
                  " heads, expected a multiple of key's ", shared);
  check("key", key, {batch, shared, columns, query.sym_size(3)});
  check("value", value, {batch, shared, columns, value.sym_size(3)});
  TFB_CHECK_VALUE(mask.dim() == 4, op, ": mask has shape ", mask.sym_sizes(),
                  ", expected four dimensions (batch, 1, rows, columns)");
  const c10::SymInt rows = mask.sym_size(2), groups = heads / shared;
  TFB_CHECK_VALUE((rows % groups).sym_eq(0).sym_and(rows.sym_le(groups * tokens)), op, ": mask has ", rows,
                  " rows, expected the ", groups, " heads of a key head for at most the ", tokens, " tokens of query");
  check("mask", mask, {batch, 1, rows, columns});
  check("out", out, {batch, tokens, heads, value.sym_size(3)});
  for (int64_t k = 0; k < 4; ++k) {
    TFB_CHECK_VALUE(out.sym_size(k).sym_le(1).sym_or(out.sym_stride(k).sym_ge(1)), op, ": out has strides ",
                    out.sym_strides(), " for shape ", out.sym_sizes(),
                    ", so its elements overlap, expected one place each");
  }
}

// The last Q tokens of out (B, N, H, D') = softmax(scale q k^T + mask) v for those of q (B, H, N, D), k (B, K, C, D),
// v (B, K, C, D') and a mask (B, 1, H / K * Q, C): the heads that share keys stand side by side, so no key is copied.
inline void attend_by_torch(const at::Tensor& whole, const at::Tensor& queries, const at::Tensor& key,
                            const at::Tensor& value, const at::Tensor& mask, double scale) {
  const int64_t rows = mask.size(2);
  const int64_t tokens = rows / (queries.size(1) / key.size(1));
  const at::Tensor query = queries.narrow(2, queries.size(2) - tokens, tokens);
  const at::Tensor out = whole.narrow(1, whole.size(1) - tokens, tokens);
  const at::Tensor together = query.reshape({query.size(0), key.size(1), rows, query.size(3)});
  const at::Tensor found = at::scaled_dot_product_attention(together, key, value, mask, 0.0, false, scale);
  out.copy_(found.reshape({query.size(0), query.size(1), query.size(2), value.size(3)}).transpose(1, 2));
}

}  // namespace tfb
