// The argument checks that every backend makes before it touches memory. Each names the operator, the argument, what it
// got and what it wants. Wrong values raise ValueError, wrong types TypeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace tfb {

// Messages are put together as strings. c10's own way streams each part, and a stream's number formatting crashes where
// this module and libtorch were linked with different C++ runtimes.
inline std::string text(const char* value) { return value; }
inline std::string text(std::string_view value) { return std::string(value); }
inline std::string text(int64_t value) { return std::to_string(value); }
inline std::string text(at::ScalarType value) { return c10::toString(value); }
inline std::string text(const at::Device& value) { return value.str(); }
inline std::string text(at::IntArrayRef values) {
  std::string out = "[";
  for (const int64_t value : values) out += (out.size() > 1 ? ", " : "") + std::to_string(value);
  return out + "]";
}

template <class... Parts>
std::string sentence(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

#define TFB_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::tfb::sentence(__VA_ARGS__))
#define TFB_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::tfb::sentence(__VA_ARGS__))

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& lead,
                         const char* lead_name) {
  TFB_CHECK_VALUE(tensor.device() == lead.device(), op, ": ", name, " is on ", tensor.device(), ", but ", lead_name,
                  " is on ", lead.device(), "; put both on one device");
}

// A vector of one number per sample (or a single one), read as it lies.
inline void check_vector(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                         int64_t length, const char* meaning) {
  TFB_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " has type ", tensor.scalar_type(), ", expected ", type);
  TFB_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == length, op, ": ", name, " has shape ", tensor.sizes(),
                  ", expected [", length, "] (", meaning, ")");
  TFB_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got stride ", tensor.strides());
}

inline void check_layer(const char* op, int64_t layer) {
  TFB_CHECK_VALUE(layer >= 0 && layer <= std::numeric_limits<uint32_t>::max(), op, ": layer is ", layer,
                  ", expected an unsigned 32-bit value (the CRC-32 of the module's name)");
}

// Philox counts columns in blocks of four with one 32-bit word and rows with another.
inline void check_noise_size(const char* op, int64_t r, int64_t n) {
  TFB_CHECK_VALUE(r >= 1 && r <= std::numeric_limits<int32_t>::max(), op, ": r is ", r, ", expected 1 to 2**31 - 1");
  TFB_CHECK_VALUE(n >= 1 && n <= (int64_t{1} << 34), op, ": n is ", n, ", expected 1 to 2**34");
}

// A matrix whose rows may be strided, while the elements of a row are adjacent.
inline void check_rows(const char* op, const char* name, const at::Tensor& tensor) {
  TFB_CHECK_TYPE(is_supported(tensor.scalar_type()), op, ": ", name, " has type ", tensor.scalar_type(),
                 ", expected float32, bfloat16 or float16");
  TFB_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " has shape ", tensor.sizes(),
                  ", expected two dimensions (tokens, features); reshape it to (-1, features)");
  TFB_CHECK_VALUE(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, ": ", name, " has strides ", tensor.strides(),
                  ", expected adjacent elements in a row (last stride 1); call .contiguous()");
}

inline void check_weight(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& lead,
                         const char* lead_name) {
  check_device(op, name, tensor, lead, lead_name);
  TFB_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == lead.scalar_type(), op, ": ", name,
                 " has type ", tensor.scalar_type(), ", expected Float or ", lead_name, "'s type ", lead.scalar_type());
  TFB_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " has shape ", tensor.sizes(), ", expected two dimensions");
  TFB_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

inline void check_noise(int64_t r, int64_t n, int64_t layer, int64_t sample) {
  check_noise_size("noise", r, n);
  check_layer("noise", layer);
  TFB_CHECK_VALUE(sample >= 0 && sample <= std::numeric_limits<int32_t>::max(), "noise: sample is ", sample,
                  ", expected 0 to 2**31 - 1");
}

inline void check_shrink(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& sigma,
                         const at::Tensor& samples, const at::Tensor& seed, int64_t layer, std::string_view mode) {
  check_rows("shrink", "x", x);
  check_weight("shrink", "mean", mean, x, "x");
  check_noise_size("shrink", mean.size(0), mean.size(1));
  TFB_CHECK_VALUE(mean.size(1) == x.size(1), "shrink: x has ", x.size(1), " columns, but mean has shape ", mean.sizes(),
                  "; expected mean (r, ", x.size(1), ")");
  TFB_CHECK_VALUE(samples.dim() == 1, "shrink: samples has shape ", samples.sizes(),
                  ", expected one dimension (one sample index per group of rows)");
  const int64_t groups = samples.size(0);
  check_vector("shrink", "samples", samples, at::kInt, groups, "one sample index per group of rows");
  check_vector("shrink", "sigma", sigma, at::kFloat, groups, "one sigma per entry of samples");
  check_vector("shrink", "seed", seed, at::kLong, 1, "the one seed");
  check_device("shrink", "sigma", sigma, x, "x");
  check_device("shrink", "samples", samples, x, "x");
  check_device("shrink", "seed", seed, x, "x");
  TFB_CHECK_VALUE(groups > 0 ? x.size(0) % groups == 0 : x.size(0) == 0, "shrink: x has ", x.size(0),
                  " rows, expected a multiple of the ", groups, " entries of samples (equal groups of rows)");
  check_layer("shrink", layer);
  TFB_CHECK_VALUE(mode == "weight", "shrink: mode is \"", mode, "\", expected \"weight\"");
}

inline void check_expand(const at::Tensor& y, const at::Tensor& z, const at::Tensor& basis) {
  check_rows("expand_", "y", y);
  check_rows("expand_", "z", z);
  TFB_CHECK_TYPE(z.scalar_type() == y.scalar_type(), "expand_: z has type ", z.scalar_type(), ", expected y's type ",
                 y.scalar_type());
  check_device("expand_", "z", z, y, "y");
  check_weight("expand_", "basis", basis, y, "y");
  TFB_CHECK_VALUE(z.size(0) == y.size(0), "expand_: z has ", z.size(0), " rows, expected y's ", y.size(0));
  TFB_CHECK_VALUE(basis.size(0) == y.size(1) && basis.size(1) == z.size(1) && z.size(1) >= 1,
                  "expand_: basis has shape ", basis.sizes(), ", expected [", y.size(1), ", ", z.size(1),
                  "] (columns of y, columns of z) with at least one column");
  TFB_CHECK_VALUE(y.size(0) <= 1 || y.stride(0) >= y.size(1), "expand_: y has strides ", y.strides(), " for shape ",
                  y.sizes(), ", so its rows overlap and cannot be added to; expected a row stride of at least ",
                  y.size(1));
}

}  // namespace tfb
