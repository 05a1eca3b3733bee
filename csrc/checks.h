// Argument checks whose messages name the op and the argument, what was wanted, what came and what to do.
// The public Python functions repeat a refusal with a typed exception; whoever calls torch.ops directly sees these.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sage {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
  text << (t.is_cpu() ? ") on cpu" : ") on another device");
  return text.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// SAGE_WANT(condition, op, name, wanted, tensor, remedy): wanted and remedy may be several parts in parentheses-free form.
#define SAGE_WANT(condition, op, name, wanted, tensor, remedy)                                                        \
  do {                                                                                                                \
    if (__builtin_expect(!(condition), 0)) {                                                                          \
      ::sage::refuse(op, ": ", name, " must be ", wanted, ", got ", ::sage::describe(tensor), "; ", remedy);           \
    }                                                                                                                 \
  } while (0)

// A dense vector [rows] on the CPU.
inline void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t rows) {
  const char* type = torch::headeronly::toString(dtype);
  SAGE_WANT(t.is_cpu() && t.scalar_type() == dtype, op, name, type, t, "convert it");
  SAGE_WANT(t.dim() == 1 && t.size(0) == rows, op, name, "one value per row: " + std::to_string(rows), t, "check its length");
  SAGE_WANT(rows < 2 || t.stride(0) == 1, op, name, "contiguous", t, "use contiguous()");
}

// Rows [any, *shape of like], each row dense, rows anywhere; returns the row stride [elements].
inline int64_t check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like) {
  const char* type = torch::headeronly::toString(dtype);
  SAGE_WANT(t.is_cpu() && t.scalar_type() == dtype, op, name, type, t, "convert it");
  const auto sizes = t.sizes(), strides = t.strides(), wanted = like.sizes();
  bool same = sizes.size() == wanted.size(), dense = true;
  int64_t expected = 1;
  for (size_t i = sizes.size(); same && i-- > 1;) {
    same = sizes[i] == wanted[i];
    dense = dense && (sizes[i] == 1 || strides[i] == expected);
    expected *= sizes[i];
  }
  SAGE_WANT(same, op, name, "rows of sample's shape " + describe(like), t, "check its shape");
  SAGE_WANT(dense || t.numel() == 0, op, name, "dense within each row", t, "use contiguous()");
  return strides[0];
}

inline void check_count(const char* op, const char* name, const Tensor& t, int64_t rows) {
  SAGE_WANT(t.size(0) == rows, op, name, std::to_string(rows) + " rows", t, "check its first size");
}

// 0 <= index < bound for every row.
inline void check_range(const char* op, const char* name, const int32_t* index, int64_t rows, int64_t bound) {
  for (int64_t r = 0; r < rows; r++) {
    if (__builtin_expect(index[r] < 0 || index[r] >= bound, 0)) {
      refuse(op, ": ", name, " must be in [0, ", bound, "), got ", index[r], " at row ", r, "; check the plan's indices");
    }
  }
}

}  // namespace sage
