// group_mean on a GPU: means and the union of the masks in one launch; blocks beyond a row's elements take its mask.
#include "device.cuh"

namespace sage {
namespace device {
namespace {

#include "../group_math.h"

__device__ __forceinline__ double nan64() { return __longlong_as_double(0x7FF8000000000000ll); }

template <class T, int N>
__device__ __forceinline__ void mean_of(const GroupMean& args, int64_t row, int64_t at) {
  const Segment group(args.indptr, row, args.member_count);
  double total[N];
#pragma unroll
  for (int i = 0; i < N; i++) total[i] = nan64();
  for (int64_t k = group.first; k < group.last; k++) {
    const int64_t member = args.members[k];
    const bool there = member >= 0 && member < args.in.rows;
    Raw<T, N> value;
    if (there) value = load_whole<T, N>(static_cast<const T*>(args.in.data) + member * args.in.stride + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const double v = there ? as_double(value.v[i]) : nan64();
      total[i] = k == group.first ? v : __dadd_rn(total[i], v);
    }
  }
  const double count = group.cut ? nan64() : static_cast<double>(group.last - group.first);
  Raw<T, N> out;
#pragma unroll
  for (int i = 0; i < N; i++) round_to(__ddiv_rn(total[i], count), out.v[i]);
  store_whole<T, N>(out, static_cast<T*>(args.out) + row * args.elements + at);
}

template <class T>
__device__ __forceinline__ void union_of(const GroupMean& args, int64_t row, int64_t at) {
  T best{};
  bool any = false;
  const Segment group(args.indptr, row, args.member_count);
  for (int64_t k = group.first; k < group.last; k++) {
    const int64_t member = args.members[k];
    const bool there = member >= 0 && member < args.mask.rows;
    const T value = there ? static_cast<const T*>(args.mask.data)[member * args.mask.stride + at] : T{};
    if (!any || !keeps(best, value)) best = value;
    any = true;
  }
  static_cast<T*>(args.united)[row * args.mask_elements + at] = best;
}

__device__ __forceinline__ void union_at(const GroupMean& args, int64_t row, int64_t at) {
  switch (args.mask_type) {
    case DType::kFloat32: return union_of<float>(args, row, at);
    case DType::kBFloat16: return union_of<__nv_bfloat16>(args, row, at);
    case DType::kFloat16: return union_of<__half>(args, row, at);
    case DType::kInt32: return union_of<int32_t>(args, row, at);
    case DType::kInt64: return union_of<int64_t>(args, row, at);
    default: return union_of<uint8_t>(args, row, at);
  }
}

// Places of a row: its elements in vectors of N, then its mask, one element each.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) group_mean_kernel(const __grid_constant__ GroupMean args) {
  const int64_t row = blockIdx.x, vectors = args.elements / N, places = vectors + args.mask_elements;
  for (int64_t place = first_element(1); place < places; place += next_element(1)) {
    if (place < vectors) mean_of<T, N>(args, row, place * N);
    else union_at(args, row, place - vectors);
  }
}

template <class T>
void start(const GroupMean& args, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const int64_t bytes = sizeof(T), d = args.elements;
  if (d % N == 0 && aligned<N>(args.in, bytes) && aligned<N>(args.out, d, bytes)) {
    group_mean_kernel<T, N><<<grid_of(args.rows, d / N + args.mask_elements, 1), kThreads, 0, stream>>>(args);
  } else {
    group_mean_kernel<T, 1><<<grid_of(args.rows, d + args.mask_elements, 1), kThreads, 0, stream>>>(args);
  }
}

}  // namespace
}  // namespace device

int group_mean_cuda(const GroupMean& args, void* stream) {
  if (args.rows == 0 || args.elements + args.mask_elements == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.type) {
    case DType::kFloat64: device::start<double>(args, on); break;
    case DType::kFloat32: device::start<float>(args, on); break;
    case DType::kBFloat16: device::start<__nv_bfloat16>(args, on); break;
    default: device::start<__half>(args, on); break;
  }
  return cudaGetLastError();
}

}  // namespace sage
