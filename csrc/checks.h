// Argument checks whose messages name the op and the argument, what was wanted, what came and what to do.
// The public Python functions repeat a refusal with a typed exception; whoever calls torch.ops directly sees these.
// Nothing here waits for a device: values are looked at on the CPU only.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sage {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
  text << ") on " << (t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device");
  return text.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// SAGE_WANT(condition, op, name, wanted, tensor, remedy)
#define SAGE_WANT(condition, op, name, wanted, tensor, remedy)                                                \
  do {                                                                                                        \
    if (__builtin_expect(!(condition), 0)) {                                                                  \
      ::sage::refuse(op, ": ", name, " must be ", wanted, ", got ", ::sage::describe(tensor), "; ", remedy); \
    }                                                                                                         \
  } while (0)

// Checks of one call, for tensors on the device of `like`.
class Checks {
 public:
  Checks(const char* op, const Tensor& like) : op_(op), cpu_(like.is_cpu()), device_(cpu_ ? -1 : like.get_device_index()) {
    SAGE_WANT(cpu_ || like.is_cuda(), op, "every tensor", "on a CPU or CUDA device", like, "move it");
  }

  bool on_cpu() const { return cpu_; }
  int32_t device() const { return device_; }

  void type(const char* name, const Tensor& t, ScalarType dtype) const {
    SAGE_WANT(t.scalar_type() == dtype, op_, name, torch::headeronly::toString(dtype), t, "convert it");
    const bool here = cpu_ ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device_;
    SAGE_WANT(here, op_, name, cpu_ ? "on cpu" : "on cuda:" + std::to_string(device_), t, "move it");
  }

  // Dense, [count]; any count if it is negative.
  template <class T>
  const T* vector(const char* name, const Tensor& t, ScalarType dtype, int64_t count) const {
    type(name, t, dtype);
    SAGE_WANT(t.dim() == 1, op_, name, "one-dimensional", t, "use view(-1)");
    SAGE_WANT(count < 0 || t.size(0) == count, op_, name, "one value per row: " + std::to_string(count), t, "check its length");
    SAGE_WANT(t.size(0) < 2 || t.stride(0) == 1, op_, name, "contiguous", t, "use contiguous()");
    return static_cast<const T*>(t.data_ptr());
  }

  // 0 <= index < bound in every place.
  void range(const char* name, const int32_t* index, int64_t count, int64_t bound) const {
    for (int64_t r = 0; cpu_ && r < count; r++) {
      if (__builtin_expect(index[r] < 0 || index[r] >= bound, 0)) {
        refuse(op_, ": ", name, " must be in [0, ", bound, "), got ", index[r], " at row ", r, "; check the plan's indices");
      }
    }
  }

  const int32_t* index(const char* name, const Tensor& t, int64_t count, int64_t bound) const {
    const auto* values = vector<int32_t>(name, t, ScalarType::Int, count);
    range(name, values, t.size(0), bound);
    return values;
  }

  // Rows [any, *shape of like], each row dense, rows anywhere.
  RowsIn rows(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like, const int32_t* index) const {
    type(name, t, dtype);
    const auto sizes = t.sizes(), strides = t.strides(), wanted = like.sizes();
    bool same = sizes.size() == wanted.size(), dense = true;
    int64_t expected = 1;
    for (size_t i = sizes.size(); same && i-- > 1;) {
      same = sizes[i] == wanted[i];
      dense = dense && (sizes[i] == 1 || strides[i] == expected);
      expected *= sizes[i];
    }
    SAGE_WANT(same, op_, name, "rows like " + describe(like), t, "check its shape");
    SAGE_WANT(dense || t.numel() == 0, op_, name, "dense within each row", t, "use contiguous()");
    return RowsIn{t.data_ptr(), strides[0], sizes[0], index};
  }

  void count(const char* name, const Tensor& t, int64_t rows) const {
    SAGE_WANT(t.size(0) == rows, op_, name, std::to_string(rows) + " rows", t, "check its first size");
  }

  // A dense output [rows, *shape of like].
  void* output(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like, int64_t rows_out) const {
    rows(name, t, dtype, like, nullptr);
    count(name, t, rows_out);
    SAGE_WANT(t.is_contiguous(), op_, name, "contiguous", t, "use torch.empty");
    return t.data_ptr();
  }

  const char* op() const { return op_; }

 private:
  const char* op_;
  bool cpu_;
  int32_t device_;
};

inline int64_t elements_of(const Tensor& t) {
  int64_t elements = 1;
  const auto sizes = t.sizes();
  for (size_t i = 1; i < sizes.size(); i++) elements *= sizes[i];
  return elements;
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: SAGE_WANT(false, op, name, "float32, bfloat16 or float16", t, "convert it");
  }
  return DType::kFloat32;
}

// The state is float32 or has the model's dtype.
inline DType state_of(const char* op, const Tensor& sample, const Tensor& model_output) {
  const DType state = dtype_of(op, "sample", sample);
  SAGE_WANT(state == DType::kFloat32 || sample.scalar_type() == model_output.scalar_type(), op, "sample",
            "float32 or model_output's dtype", sample, "use sample.float()");
  return state;
}

// The coefficient table [rows, 16]; vector loads want it aligned.
inline const Row* table_of(const Checks& check, const Tensor& table) {
  check.type("table", table, ScalarType::Float);
  SAGE_WANT(table.dim() == 2 && table.size(1) == 16 && table.is_contiguous(), check.op(), "table",
            "contiguous float32 [rows, 16]", table, "use CoefficientTable.tensor(device)");
  SAGE_WANT(check.on_cpu() || reinterpret_cast<uintptr_t>(table.data_ptr()) % 16 == 0, check.op(), "table",
            "aligned to 16 bytes", table, "use clone()");
  return static_cast<const Row*>(table.data_ptr());
}

}  // namespace sage
