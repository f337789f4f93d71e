// Attention of few rows to many columns: out = softmax(scale q k^T + mask) v, the heads that share keys side by side,
// so that keys and values are read once for all of them. Rows r = g * tokens + t of a key head are head g's of its
// group.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"
#include "tuning.h"

namespace tfb::cuda {

// Elements between neighbours along three axes of a tensor; those of a row are adjacent.
struct AttendStrides {
  int64_t batch, head, token;
};

struct AttendParams {
  void* out;
  const void *query, *key, *value;  // all of one type
  const void* mask;                 // of that type, added to the scores: (batch, rows, columns)
  AttendStrides out_strides, query_strides, key_strides, value_strides;
  int64_t mask_batch, mask_row;
  int64_t batch, key_heads, groups, tokens, columns, width;
  float scale;
  Format format;
};

// Whether the kernel serves the call: half precision, a width that it has, few rows, a device with clusters, and rows
// of keys and values that lie on 16 bytes.
bool attend_serves(const AttendParams& params);
cudaError_t launch_attend(const AttendParams& params, cudaStream_t stream);

}  // namespace tfb::cuda
