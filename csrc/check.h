// The argument checks that every backend makes before it touches memory, and the operators' fakes in its place. Each
// names the operator, the argument, what it got and what it wants. Wrong values raise ValueError, wrong types
// TypeError.
//
// Sizes may be symbolic (torch.compile with dynamic shapes): what is required of them becomes a guard or, where they
// depend on data, an assertion of the compiled program.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "types.h"

namespace tfb {

// Messages are put together as strings. c10's own way streams each part, and a stream's number formatting crashes where
// this module and libtorch were linked with different C++ runtimes.
inline std::string text(const char* value) { return value; }
inline std::string text(std::string_view value) { return std::string(value); }
inline std::string text(int64_t value) { return std::to_string(value); }
inline std::string text(at::ScalarType value) { return c10::toString(value); }
inline std::string text(const at::Device& value) { return value.str(); }
inline std::string text(const c10::SymInt& value) {
  const std::optional<int64_t> known = value.maybe_as_int();
  return known ? std::to_string(*known) : value.toSymNode()->str();
}
inline std::string text(c10::SymIntArrayRef values) {
  std::string out = "[";
  for (const c10::SymInt& value : values) out += (out.size() > 1 ? ", " : "") + text(value);
  return out + "]";
}

template <class... Parts>
std::string sentence(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

inline bool holds(bool condition) { return condition; }
inline bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

#define TFB_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(::tfb::holds(condition), ::tfb::sentence(__VA_ARGS__))
#define TFB_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::tfb::sentence(__VA_ARGS__))

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline Format format_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return Format::kFloat32;
  return tensor.scalar_type() == at::kBFloat16 ? Format::kBFloat16 : Format::kFloat16;
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& lead,
                         const char* lead_name) {
  TFB_CHECK_VALUE(tensor.device() == lead.device(), op, ": ", name, " is on ", tensor.device(), ", but ", lead_name,
                  " is on ", lead.device(), "; put both on one device");
}

// A vector of one number per sample (or a single one), read as it lies.
inline void check_vector(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                         const c10::SymInt& length, const char* meaning) {
  TFB_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " has type ", tensor.scalar_type(), ", expected ", type);
  TFB_CHECK_VALUE(tensor.dim() == 1 && holds(tensor.sym_size(0).sym_eq(length)), op, ": ", name, " has shape ",
                  tensor.sym_sizes(), ", expected [", length, "] (", meaning, ")");
  TFB_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got stride ", tensor.sym_strides());
}

inline void check_layer(const char* op, int64_t layer) {
  TFB_CHECK_VALUE(layer >= 0 && layer <= std::numeric_limits<uint32_t>::max(), op, ": layer is ", layer,
                  ", expected an unsigned 32-bit value (the CRC-32 of the module's name)");
}

// Philox counts columns in blocks of four with one 32-bit word and rows with another.
inline void check_noise_size(const char* op, const c10::SymInt& r, const c10::SymInt& n) {
  TFB_CHECK_VALUE(r.sym_ge(1).sym_and(r.sym_le(std::numeric_limits<int32_t>::max())), op, ": r is ", r,
                  ", expected 1 to 2**31 - 1");
  TFB_CHECK_VALUE(n.sym_ge(1).sym_and(n.sym_le(int64_t{1} << 34)), op, ": n is ", n, ", expected 1 to 2**34");
}

// A matrix whose rows may be strided, while the elements of a row are adjacent.
inline void check_rows(const char* op, const char* name, const at::Tensor& tensor) {
  TFB_CHECK_TYPE(is_supported(tensor.scalar_type()), op, ": ", name, " has type ", tensor.scalar_type(),
                 ", expected float32, bfloat16 or float16");
  TFB_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " has shape ", tensor.sym_sizes(),
                  ", expected two dimensions (tokens, features); reshape it to (-1, features)");
  TFB_CHECK_VALUE(tensor.sym_size(1).sym_le(1).sym_or(tensor.sym_stride(1).sym_eq(1)), op, ": ", name, " has strides ",
                  tensor.sym_strides(), ", expected adjacent elements in a row (last stride 1); call .contiguous()");
}

inline void check_weight(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& lead,
                         const char* lead_name) {
  check_device(op, name, tensor, lead, lead_name);
  TFB_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == lead.scalar_type(), op, ": ", name,
                 " has type ", tensor.scalar_type(), ", expected Float or ", lead_name, "'s type ", lead.scalar_type());
  TFB_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " has shape ", tensor.sym_sizes(), ", expected two dimensions");
  TFB_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.sym_strides());
}

inline void check_noise(int64_t r, int64_t n, int64_t layer, int64_t sample) {
  check_noise_size("noise", r, n);
  check_layer("noise", layer);
  TFB_CHECK_VALUE(sample >= 0 && sample <= std::numeric_limits<int32_t>::max(), "noise: sample is ", sample,
                  ", expected 0 to 2**31 - 1");
}

inline Mode parse_mode(const char* op, std::string_view mode) {
  if (mode == "weight") return Mode::kWeight;
  if (mode == "flipout") return Mode::kFlipout;
  if (mode == "token") return Mode::kToken;
  TORCH_CHECK_VALUE(false, sentence(op, ": mode is \"", mode, "\", expected \"weight\", \"flipout\" or \"token\""));
}

// Rows are counted in equal groups, or in items of `lead` rows of the mean and `each` rows of every group.
inline void check_row_counts(const char* op, const c10::SymInt& rows, const c10::SymInt& groups,
                             const c10::SymInt& lead, const c10::SymInt& each) {
  // Rows of a group are counted by one word of the generator.
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  for (const auto& [name, count] : {std::pair{"lead", &lead}, {"each", &each}}) {
    TFB_CHECK_VALUE(count->sym_ge(0).sym_and(count->sym_le(kMost)), op, ": ", name, " got ", *count,
                    ", expected 0 to 2**32 - 1. Fix: pass a number of rows in an item");
  }
  if (each.sym_eq(0).guard_bool(__FILE__, __LINE__)) {
    TFB_CHECK_VALUE(lead.sym_eq(0), op, ": lead got ", lead,
                    " where each is 0, expected 0. Fix: pass as each the rows of a sample in an item");
    const bool none = groups.maybe_as_int() == 0;
    TFB_CHECK_VALUE(none ? rows.sym_eq(0) : (rows % groups).sym_eq(0), op, ": x has ", rows,
                    " rows, expected a multiple of the ", groups, " entries of samples (equal groups of rows)");
    TFB_CHECK_VALUE(none ? rows.sym_eq(0) : (rows / groups).sym_le(kMost), op, ": x has ", rows, " rows for ", groups,
                    " samples, expected fewer than 2**32 a sample");
    return;
  }
  const c10::SymInt pitch = lead + groups * each;
  const bool none = pitch.maybe_as_int() == 0;
  TFB_CHECK_VALUE(none ? rows.sym_eq(0) : (rows % pitch).sym_eq(0), op, ": x got ", rows,
                  " rows, expected a multiple of an item's ", pitch, " (lead ", lead, " and each ", each, " for ",
                  groups, " entries of samples). Fix: pass whole items");
  for (const c10::SymInt* count : {&lead, &each}) {
    const c10::SymInt most = std::numeric_limits<int32_t>::max();  // what item_of (rows.h) counts
    TFB_CHECK_VALUE(none ? rows.sym_eq(0) : (rows / pitch * *count).sym_le(most), op, ": x got ", rows,
                    " rows, expected fewer than 2**31 of the mean and of each sample. Fix: pass fewer items");
  }
}

// What the groups of rows draw from.
inline void check_samples(const char* op, const at::Tensor& x, const at::Tensor& sigma, const at::Tensor& samples,
                          const at::Tensor& seed, const c10::SymInt& lead, const c10::SymInt& each) {
  TFB_CHECK_VALUE(samples.dim() == 1, op, ": samples has shape ", samples.sym_sizes(),
                  ", expected one dimension (one sample index per group of rows)");
  const c10::SymInt groups = samples.sym_size(0);
  check_vector(op, "samples", samples, at::kInt, groups, "one sample index per group of rows");
  check_vector(op, "sigma", sigma, at::kFloat, groups, "one sigma per entry of samples");
  check_vector(op, "seed", seed, at::kLong, 1, "the one seed");
  check_device(op, "sigma", sigma, x, "x");
  check_device(op, "samples", samples, x, "x");
  check_device(op, "seed", seed, x, "x");
  check_row_counts(op, x.sym_size(0), groups, lead, each);
}

inline void check_mean(const char* op, const at::Tensor& x, const at::Tensor& mean, int64_t layer) {
  check_weight(op, "mean", mean, x, "x");
  check_noise_size(op, mean.sym_size(0), mean.sym_size(1));
  TFB_CHECK_VALUE(mean.sym_size(1).sym_eq(x.sym_size(1)), op, ": x has ", x.sym_size(1),
                  " columns, but mean has shape ", mean.sym_sizes(), "; expected mean (r, ", x.sym_size(1), ")");
  check_layer(op, layer);
}

inline void check_length(const char* op, const char* name, int64_t length, int64_t layers) {
  TFB_CHECK_VALUE(length == layers, op, ": ", name, " has ", length, " entries, expected one for each of the ", layers,
                  " means");
}

// Layers that share x.
inline Mode check_group(const char* op, const at::Tensor& x, at::TensorList means, const at::Tensor& sigma,
                        const at::Tensor& samples, const at::Tensor& seed, at::IntArrayRef layers,
                        std::string_view mode, const c10::SymInt& lead, const c10::SymInt& each) {
  check_rows(op, "x", x);
  TFB_CHECK_VALUE(!means.empty(), op, ": means is empty, expected one mean a layer");
  check_length(op, "layers", static_cast<int64_t>(layers.size()), static_cast<int64_t>(means.size()));
  for (size_t l = 0; l < means.size(); ++l) {
    check_mean(op, x, means[l], layers[l]);
    TFB_CHECK_TYPE(means[l].scalar_type() == means[0].scalar_type(), op, ": means have types ", means[0].scalar_type(),
                   " and ", means[l].scalar_type(), ", expected one type for all");
  }
  check_samples(op, x, sigma, samples, seed, lead, each);
  return parse_mode(op, mode);
}

// `like` has the type and the device that the bias must have.
inline void check_bias(const char* op, const at::Tensor& bias, const at::Tensor& like, const char* like_name,
                       const c10::SymInt& m) {
  check_device(op, "bias", bias, like, like_name);
  check_vector(op, "bias", bias, like.scalar_type(), m, "one number an output feature");
}

inline void check_expand_new(const at::Tensor& z, const at::Tensor& basis, const std::optional<at::Tensor>& bias) {
  check_rows("expand", "z", z);
  check_weight("expand", "basis", basis, z, "z");
  TFB_CHECK_VALUE(basis.sym_size(1).sym_eq(z.sym_size(1)).sym_and(z.sym_size(1).sym_ge(1)), "expand: basis has shape ",
                  basis.sym_sizes(), ", expected ", z.sym_size(1), " columns, those of z, and at least one");
  if (bias) check_bias("expand", *bias, z, "z", basis.sym_size(0));
}

// x (..., n) as rows, which update_group takes in any number of dimensions, and its results (T, m) in x's.
inline at::Tensor rows_of(const at::Tensor& x) {
  return x.dim() <= 2 ? x : x.reshape_symint({-1, x.sym_size(x.dim() - 1)});
}
inline void shape_as(const at::Tensor& x, std::vector<at::Tensor>& out) {
  if (x.dim() <= 2) return;
  std::vector<int64_t> sizes = x.sizes().vec();
  for (const at::Tensor& y : out) {
    sizes.back() = y.size(1);
    y.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
}

inline Mode check_update(const at::Tensor& x, at::TensorList means, at::TensorList bases,
                         const c10::List<std::optional<at::Tensor>>& biases, size_t scalings, const at::Tensor& sigma,
                         const at::Tensor& samples, const at::Tensor& seed, at::IntArrayRef layers,
                         std::string_view mode, const c10::SymInt& lead, const c10::SymInt& each,
                         at::TensorList weights) {
  const char* op = "update_group";
  const Mode parsed = check_group(op, x, means, sigma, samples, seed, layers, mode, lead, each);
  const auto count = static_cast<int64_t>(means.size());
  check_length(op, "bases", static_cast<int64_t>(bases.size()), count);
  check_length(op, "biases", static_cast<int64_t>(biases.size()), count);
  check_length(op, "scalings", static_cast<int64_t>(scalings), count);
  for (size_t l = 0; l < bases.size(); ++l) {
    check_weight(op, "basis", bases[l], x, "x");
    TFB_CHECK_VALUE(bases[l].sym_size(1).sym_eq(means[l].sym_size(0)), op, ": basis has shape ", bases[l].sym_sizes(),
                    ", expected ", means[l].sym_size(0), " columns, the rows of its mean");
    TFB_CHECK_TYPE(bases[l].scalar_type() == bases[0].scalar_type(), op, ": bases have types ", bases[0].scalar_type(),
                   " and ", bases[l].scalar_type(), ", expected one type for all");
    const std::optional<at::Tensor> bias = biases.get(l);
    if (bias) check_bias(op, *bias, x, "x", bases[l].sym_size(0));
  }
  if (weights.empty()) return parsed;
  check_length(op, "weights", static_cast<int64_t>(weights.size()), count);
  for (size_t l = 0; l < weights.size(); ++l) {
    const at::Tensor& weight = weights[l];
    check_device(op, "weight", weight, x, "x");
    TFB_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": weight has type ", weight.scalar_type(),
                   ", expected x's type ", x.scalar_type());
    TFB_CHECK_VALUE(weight.dim() == 2 && holds(weight.sym_size(0).sym_eq(bases[l].sym_size(0))) &&
                        holds(weight.sym_size(1).sym_eq(x.sym_size(1))),
                    op, ": weight has shape ", weight.sym_sizes(), ", expected [", bases[l].sym_size(0), ", ",
                    x.sym_size(1), "] (rows of its basis, columns of x)");
  }
  return parsed;
}

// Rows of adjacent bytes, `pitch` bytes from one to the next.
struct ByteRows {
  int64_t start, rows, pitch, width;
};

// Whether a row of `b` has a byte of a row of `a`. The rows of `a` do not overlap each other.
inline bool share_bytes(const ByteRows& a, const ByteRows& b) {
  const auto end = [](const ByteRows& of) { return of.start + (of.rows - 1) * of.pitch + of.width; };
  if (end(a) <= b.start || end(b) <= a.start) return false;
  for (int64_t row = 0; row < b.rows; ++row) {
    const int64_t from = b.start + row * b.pitch - a.start;
    // The first row of `a` that ends behind `from`.
    const int64_t first = from < a.width ? 0 : a.rows == 1 ? 1 : (from - a.width) / a.pitch + 1;
    if (first < a.rows && first * a.pitch < from + b.width) return true;
  }
  return false;
}

// The rows' addresses or, of tensors without data, their places in a storage; nothing where there are none or they are
// not known yet (symbolic).
inline std::optional<ByteRows> byte_rows(const at::Tensor& tensor, bool with_data) {
  std::array<int64_t, 4> known{};  // offset, rows, stride, columns
  const c10::SymInt asked[] = {tensor.sym_storage_offset(), tensor.sym_size(0), tensor.sym_stride(0),
                               tensor.sym_size(1)};
  for (size_t k = 0; k < known.size(); ++k) {
    const std::optional<int64_t> value = asked[k].maybe_as_int();
    if (!value) return std::nullopt;
    known[k] = *value;
  }
  if (known[1] == 0 || known[3] == 0) return std::nullopt;
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t start = with_data ? reinterpret_cast<int64_t>(tensor.const_data_ptr()) : known[0] * bytes;
  return ByteRows{start, known[1], known[2] * bytes, known[3] * bytes};
}

// `tensor` is read while y is written.
inline void check_apart(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& y) {
  const auto has_data = [](const at::Tensor& of) {
    return !of.is_meta() && !of.key_set().has(at::DispatchKey::Python);
  };
  const bool with_data = has_data(tensor) && has_data(y);
  if (!with_data && !tensor.storage().is_alias_of(y.storage())) return;
  const std::optional<ByteRows> read = byte_rows(tensor, with_data);
  const std::optional<ByteRows> written = byte_rows(y, with_data);
  TFB_CHECK_VALUE(
      !read || !written || !share_bytes(*written, *read), op, ": ", name,
      " got memory that is y's too, expected memory of its own, since y changes while it is read. Fix: pass ", name,
      ".clone()");
}

inline void check_expand(const at::Tensor& y, const at::Tensor& z, const at::Tensor& basis) {
  check_rows("expand_", "y", y);
  check_rows("expand_", "z", z);
  TFB_CHECK_TYPE(z.scalar_type() == y.scalar_type(), "expand_: z has type ", z.scalar_type(), ", expected y's type ",
                 y.scalar_type());
  check_device("expand_", "z", z, y, "y");
  check_weight("expand_", "basis", basis, y, "y");
  TFB_CHECK_VALUE(z.sym_size(0).sym_eq(y.sym_size(0)), "expand_: z has ", z.sym_size(0), " rows, expected y's ",
                  y.sym_size(0));
  const c10::SymInt r = z.sym_size(1);
  TFB_CHECK_VALUE(basis.sym_size(0).sym_eq(y.sym_size(1)).sym_and(basis.sym_size(1).sym_eq(r)).sym_and(r.sym_ge(1)),
                  "expand_: basis has shape ", basis.sym_sizes(), ", expected [", y.sym_size(1), ", ", r,
                  "] (columns of y, columns of z) with at least one column");
  TFB_CHECK_VALUE(y.sym_size(0).sym_le(1).sym_or(y.sym_stride(0).sym_ge(y.sym_size(1))), "expand_: y has strides ",
                  y.sym_strides(), " for shape ", y.sym_sizes(),
                  ", so its rows overlap and cannot be added to; expected a row stride of at least ", y.sym_size(1));
  check_apart("expand_", "z", z, y);
  check_apart("expand_", "basis", basis, y);
}

}  // namespace tfb
