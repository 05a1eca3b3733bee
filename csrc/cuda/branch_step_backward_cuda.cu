// branch_step_backward on a GPU: one launch; a thread keeps four elements of one input row while its children pass by.
#include "device.cuh"

namespace sage {
namespace device {
namespace {

constexpr int kWidth = 4;
using V = Vec<kWidth>;

// The machine of `update_backward`. All inputs are those of the child at hand; the totals stay.
template <class M, class S, bool kAligned>
struct BackwardVector {
  using Value = V;
  const BranchStepBackward& args;
  int64_t at;
  int count;
  V inputs[kFromHistory + 3], cond, uncond;  // totals
  int64_t child;
  float p, q, clip;

  __device__ __forceinline__ BackwardVector(const BranchStepBackward& a, int64_t element)
      : args(a), at(element), count(static_cast<int>(a.elements - element < kWidth ? a.elements - element : kWidth)), inputs{},
        cond{}, uncond{} {}

  __device__ __forceinline__ void visit(int64_t row, const Row& k) {
    child = row;
    p = k.p, q = k.q, clip = k.clip;
  }

  template <class T>
  __device__ __forceinline__ V dense(const void* data, int64_t row) const {
    return load<kAligned, T, kWidth>(static_cast<const T*>(data) + row * args.elements, at, count);
  }
  template <class T>
  __device__ __forceinline__ V read(const RowsIn& rows) const {
    return load<kAligned, T, kWidth>(row_of<T>(rows, child), at, count);
  }

  __device__ __forceinline__ const void* arriving(Gradient place) const {
    return place == kAtNext ? args.g_sample : place == kAtDenoised ? args.g_denoised : args.g_corrected;
  }
  __device__ __forceinline__ bool has(Gradient place) const {
    return (place == kAtModelInput ? args.g_model_input : arriving(place)) != nullptr;
  }
  __device__ __forceinline__ V grad(Gradient place) const {
    if (place != kAtModelInput) return dense<S>(arriving(place), child);
    V both = dense<M>(args.g_model_input, child);
    if (args.copies > 1) plus(both, dense<M>(args.g_model_input, args.rows_out + child));
    return both;
  }
  __device__ __forceinline__ VecSum<kWidth> sum(Gradient) const { return {}; }
  __device__ __forceinline__ V passed(V value) const {
    VecSum<kWidth> stored;
    if (p != 0.0f) stored.term(p, read<S>(args.sample));
    if (q != 0.0f) {
      const V y = read<M>(args.model_output);
      stored.term(q, args.guidance == nullptr ? y : guide(y, read<M>(args.uncond), args.guidance[child]));
    }
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      if (stored.total.v[i] > clip || stored.total.v[i] < -clip) value.v[i] = 0.0f;
    }
    return value;
  }

  __device__ __forceinline__ void* target(int input) const {
    return input == kFromSample ? args.d_sample : input == kFromLast ? args.d_last : args.d_m[input - kFromHistory];
  }
  __device__ __forceinline__ bool wants(int input) const { return target(input) != nullptr; }
  __device__ __forceinline__ bool wants_output() const { return args.d_model_output != nullptr || args.d_uncond != nullptr; }
  __device__ __forceinline__ void collect(int input, const V& value) { plus(inputs[input], value); }
  __device__ __forceinline__ void collect_output(const V& value) {
    if (args.guidance == nullptr) return plus(cond, value);
    const float g = args.guidance[child];
    V guided, rest;
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      guided.v[i] = mul(g, value.v[i]);
      rest.v[i] = sub(value.v[i], guided.v[i]);
    }
    plus(cond, guided);
    plus(uncond, rest);
  }
  static __device__ __forceinline__ void plus(V& total, const V& value) {
#pragma unroll
    for (int i = 0; i < kWidth; i++) total.v[i] = add(total.v[i], value.v[i]);
  }

  // All totals NaN: the children are not what they should be.
  __device__ __forceinline__ void spoil() {
    const V nan = load<kAligned, M, kWidth>(nullptr, at, count);
    for (V& total : inputs) total = nan;
    cond = uncond = nan;
  }

  __device__ __forceinline__ void put(int64_t row) const {
#pragma unroll
    for (int i = 0; i < kFromHistory + 3; i++) write<S>(inputs[i], target(i), row);
    write<M>(cond, args.d_model_output, row);
    write<M>(uncond, args.d_uncond, row);
  }
  template <class T>
  __device__ __forceinline__ void write(const V& value, void* to, int64_t row) const {
    if (to != nullptr) store<kAligned, T, kWidth>(value, static_cast<T*>(to) + row * args.elements, at, count);
  }
};

template <class M, class S, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ BranchStepBackward args) {
  const int64_t row = blockIdx.x;
  for (int64_t at = first_element(kWidth); at < args.elements; at += next_element(kWidth)) {
    BackwardVector<M, S, kAligned> vector(args, at);
    const Segment segment(args.indptr, row, args.rows_out);
    bool bad = segment.cut;
    for (int64_t j = segment.first; j < segment.last; j++) {
      const int32_t child = args.children[j];
      if (child < 0 || child >= args.rows_out) {
        bad = true;
        continue;
      }
      const Row k = table_row(args.table, args.table_rows, args.step[child]);
      vector.visit(child, k);
      update_backward(k, vector);
    }
    if (bad) vector.spoil();
    vector.put(row);
  }
}

bool all_aligned(const BranchStepBackward& args) {
  const int64_t model = size_of(args.model), state = size_of(args.state), d = args.elements;
  bool whole = aligned<kWidth>(args.sample, state) && aligned<kWidth>(args.model_output, model) && aligned<kWidth>(args.uncond, model);
  for (const void* t : {args.g_sample, args.g_denoised, args.g_corrected, (const void*)args.d_sample, (const void*)args.d_last,
                        (const void*)args.d_m[0], (const void*)args.d_m[1], (const void*)args.d_m[2]}) {
    whole = whole && aligned<kWidth>(t, d, state);
  }
  for (const void* t : {args.g_model_input, (const void*)args.d_model_output, (const void*)args.d_uncond}) {
    whole = whole && aligned<kWidth>(t, d, model);
  }
  return whole;
}

template <class M, class S>
void start(const BranchStepBackward& args, cudaStream_t stream) {
  const dim3 grid = grid_of(args.rows, args.elements, kWidth);
  if (all_aligned(args)) backward_kernel<M, S, true><<<grid, kThreads, 0, stream>>>(args);
  else backward_kernel<M, S, false><<<grid, kThreads, 0, stream>>>(args);
}

}  // namespace
}  // namespace device

int branch_step_backward_cuda(const BranchStepBackward& args, void* stream) {
  if (args.rows == 0 || args.elements == 0) return cudaSuccess;
  device::with_types(args.model, args.state, [&](auto m, auto s) {
    device::start<decltype(m), decltype(s)>(args, static_cast<cudaStream_t>(stream));
    return 0;
  });
  return cudaGetLastError();
}

}  // namespace sage
