// group_mean: the mean of one group's rows, and the union of their masks.

#include "../group_math.h"

template <class T>
static void mean_of(const GroupMean& args, int64_t row, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(args.out) + row * args.elements;
  const int32_t first = args.indptr[row], last = args.indptr[row + 1];
  const double members = static_cast<double>(last - first);
  double total[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = static_cast<int>(end - at < kTile ? end - at : kTile);
    for (int32_t k = first; k < last; k++) {
      const T* const in = static_cast<const T*>(args.in.data) + args.members[k] * args.in.stride + at;
      if (k == first) {
        for (int i = 0; i < count; i++) total[i] = as_double(in[i]);
      } else {
        for (int i = 0; i < count; i++) total[i] += as_double(in[i]);
      }
    }
    for (int i = 0; i < count; i++) round_to(total[i] / members, out[at + i]);
  }
}

static void group_mean(const GroupMean& args, int64_t row, int64_t begin, int64_t end) {
  switch (args.type) {
    case DType::kFloat64: return mean_of<double>(args, row, begin, end);
    case DType::kFloat32: return mean_of<float>(args, row, begin, end);
    case DType::kBFloat16: return mean_of<BFloat16>(args, row, begin, end);
    default: return mean_of<Float16>(args, row, begin, end);
  }
}

template <class T>
static void union_of(const GroupMean& args, int64_t row) {
  T* const out = static_cast<T*>(args.united) + row * args.mask_elements;
  for (int32_t k = args.indptr[row]; k < args.indptr[row + 1]; k++) {
    const T* const in = static_cast<const T*>(args.mask.data) + args.members[k] * args.mask.stride;
    for (int64_t i = 0; i < args.mask_elements; i++) {
      if (k == args.indptr[row] || !keeps(out[i], in[i])) out[i] = in[i];
    }
  }
}

static void group_union(const GroupMean& args, int64_t row) {
  switch (args.mask_type) {
    case DType::kFloat32: return union_of<float>(args, row);
    case DType::kBFloat16: return union_of<BFloat16>(args, row);
    case DType::kFloat16: return union_of<Float16>(args, row);
    case DType::kInt32: return union_of<int32_t>(args, row);
    case DType::kInt64: return union_of<int64_t>(args, row);
    default: return union_of<uint8_t>(args, row);
  }
}
