// branch_step on a GPU: one launch; a block takes a stretch of one output row.
#include "device.cuh"

namespace sage {
namespace device {
namespace {

// The machine of `update` for one vector of one output row. Whatever the table row needs is loaded before anything is computed,
// so that the loads are in flight together.
template <class M, class S, int N, bool kAligned, bool kSeeded, bool kCorrector>
struct RowVector {
  using Value = Vec<N>;
  const BranchStep& args;
  int64_t row, at;
  int count;
  Vec<N> x, y, l, m1, m2, m3;

  __device__ __forceinline__ RowVector(const BranchStep& a, const Row& k, int64_t output_row, int64_t element)
      : args(a), row(output_row), at(element), count(static_cast<int>(a.elements - element < N ? a.elements - element : N)) {
    const Vec<N> cond = read<M>(args.model_output);
    x = read<S>(args.sample);
    if (k.u[3] != 0.0f || k.b[1] != 0.0f) m1 = read<S>(args.m[0]);
    if (k.u[4] != 0.0f || k.b[2] != 0.0f) m2 = read<S>(args.m[1]);
    if (kCorrector && k.u[5] != 0.0f) m3 = read<S>(args.m[2]);
    if (kCorrector && k.u[1] != 0.0f) l = read<S>(args.last);
    y = args.guidance == nullptr ? cond : guide(cond, read<M>(args.uncond), args.guidance[row]);
  }

  template <class T>
  __device__ __forceinline__ Value read(const RowsIn& rows) const {
    return load<kAligned, T, N>(row_of<T>(rows, row), at, count);
  }

  __device__ __forceinline__ const Value& sample() const { return x; }
  __device__ __forceinline__ const Value& output() const { return y; }
  __device__ __forceinline__ Value last() const { return kCorrector ? l : missing(); }
  __device__ __forceinline__ Value history(int i) const { return i == 0 ? m1 : i == 1 ? m2 : kCorrector ? m3 : missing(); }
  __device__ __forceinline__ Value noise() const {
    if (kSeeded && args.seed != nullptr) return draw<N>(args.seed[row], args.call[row], 0, at);
    return read<float>(args.noise);
  }
  __device__ __forceinline__ Value missing() const { return load<kAligned, S, N>(nullptr, at, count); }

  __device__ __forceinline__ VecSum<N> sum(Place) const { return {}; }
  __device__ __forceinline__ Value clamp(Value value, float bound) const {
#pragma unroll
    for (int i = 0; i < N; i++) {  // comparisons with NaN are false, so NaN passes
      const float v = value.v[i] > bound ? bound : value.v[i];
      value.v[i] = v < -bound ? -bound : v;
    }
    return value;
  }
  __device__ __forceinline__ void put(const Value& denoised, const Value& corrected, const Value& next, float s) const {
    const int64_t place = row * args.elements + at;
    write<S>(next, args.next, place);
    if (args.denoised != nullptr) write<S>(denoised, args.denoised, place);
    if (args.corrected != nullptr) write<S>(corrected, args.corrected, place);
    if (args.copies == 0) return;
    Value input;
#pragma unroll
    for (int i = 0; i < N; i++) input.v[i] = mul(s, next.v[i]);
    write<M>(input, args.model_input, place);
    if (args.copies > 1) write<M>(input, args.model_input, place + args.rows * args.elements);
  }
  template <class T>
  __device__ __forceinline__ void write(const Value& value, void* to, int64_t place) const {
    store<kAligned, T, N>(value, static_cast<T*>(to), place, count);
  }
};

// Without noise and corrector, three blocks share a multiprocessor's registers; with them, two, or values would spill.
template <class M, class S, int N, bool kAligned, bool kSeeded, bool kCorrector>
__global__ void __launch_bounds__(kThreads, kSeeded || kCorrector ? 2 : 3) branch_step_kernel(const __grid_constant__ BranchStep args) {
  const int64_t row = blockIdx.x;
  const Row k = table_row(args.table, args.table_rows, args.step[row]);
  for (int64_t at = first_element(N); at < args.elements; at += next_element(N)) {
    RowVector<M, S, N, kAligned, kSeeded, kCorrector> vector(args, k, row, at);
    update(k, vector);
  }
}

template <int N>
bool all_aligned(const BranchStep& args) {
  const int64_t model = size_of(args.model), state = size_of(args.state), d = args.elements;
  bool whole = d % N == 0 && aligned<N>(args.sample, state) && aligned<N>(args.last, state) &&
               aligned<N>(args.model_output, model) && aligned<N>(args.uncond, model) && aligned<N>(args.noise, 4) &&
               aligned<N>(args.next, d, state) && aligned<N>(args.denoised, d, state) &&
               aligned<N>(args.corrected, d, state) && aligned<N>(args.model_input, d, model);
  for (const RowsIn& m : args.m) whole = whole && aligned<N>(m, state);
  return whole;
}

template <class M, class S>
void start(const BranchStep& args, cudaStream_t stream) {
  constexpr int N = sizeof(M) == 4 ? 4 : 8;  // 16 bytes of the model's dtype
  const dim3 grid = grid_of(args.rows, args.elements, N);
  const bool seeded = args.seed != nullptr, corrector = args.last.data != nullptr || args.m[2].data != nullptr;
  if (!all_aligned<N>(args)) {
    branch_step_kernel<M, S, 4, false, true, true><<<grid_of(args.rows, args.elements, 4), kThreads, 0, stream>>>(args);
  } else if (seeded) {
    if (corrector) branch_step_kernel<M, S, N, true, true, true><<<grid, kThreads, 0, stream>>>(args);
    else branch_step_kernel<M, S, N, true, true, false><<<grid, kThreads, 0, stream>>>(args);
  } else {
    if (corrector) branch_step_kernel<M, S, N, true, false, true><<<grid, kThreads, 0, stream>>>(args);
    else branch_step_kernel<M, S, N, true, false, false><<<grid, kThreads, 0, stream>>>(args);
  }
}

}  // namespace
}  // namespace device

int branch_step_cuda(const BranchStep& args, void* stream) {
  if (args.rows == 0 || args.elements == 0) return cudaSuccess;
  device::with_types(args.model, args.state, [&](auto m, auto s) {
    device::start<decltype(m), decltype(s)>(args, static_cast<cudaStream_t>(stream));
    return 0;
  });
  return cudaGetLastError();
}

const char* cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace sage
