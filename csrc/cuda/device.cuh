// What all CUDA kernels share: vectors of elements in registers, rows in memory, the shape of a launch. No torch here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace sage {
namespace device {
namespace {

#include "../solver_math.h"

constexpr int kThreads = 256;

// The grid has rows along x, so that blocks which run together share a place in their rows: the children of one parent then find
// its elements in the second cache. Places go along y, whose limit is smaller; a block takes several where they do not suffice.
inline dim3 grid_of(int64_t rows, int64_t elements, int per_thread) {
  const int64_t blocks = (elements + static_cast<int64_t>(kThreads) * per_thread - 1) / (static_cast<int64_t>(kThreads) * per_thread);
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
}

__device__ __forceinline__ int64_t first_element(int per_thread) {
  return (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * per_thread;
}
__device__ __forceinline__ int64_t next_element(int per_thread) {
  return static_cast<int64_t>(gridDim.y) * kThreads * per_thread;
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, __half& out) { out = __float2half_rn(v); }

// N elements as they lie in memory.
template <class T, int N>
struct Raw {
  T v[N];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};

// Whole vectors, in accesses of up to 16 bytes. Written out, because the compiler may split the access to a struct into its elements.
template <class T, int N>
__device__ __forceinline__ Raw<T, N> load_whole(const T* from) {
  constexpr int kBytes = sizeof(T) * N < 16 ? sizeof(T) * N : 16, kWords = sizeof(T) * N / kBytes;
  using Word = typename WordOf<kBytes>::Type;
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i++) words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  Raw<T, N> raw;
  memcpy(&raw, words, sizeof(raw));
  return raw;
}

__device__ __forceinline__ void store_word(uint4* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_word(uint2* to, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
template <class Word>
__device__ __forceinline__ void store_word(Word* to, Word v) {
  *to = v;
}

template <class T, int N>
__device__ __forceinline__ void store_whole(const Raw<T, N>& raw, T* to) {
  constexpr int kBytes = sizeof(T) * N < 16 ? sizeof(T) * N : 16, kWords = sizeof(T) * N / kBytes;
  using Word = typename WordOf<kBytes>::Type;
  Word words[kWords];
  memcpy(words, &raw, sizeof(words));
#pragma unroll
  for (int i = 0; i < kWords; i++) store_word(reinterpret_cast<Word*>(to) + i, words[i]);
}

// N floats, one element each.
template <int N>
struct Vec {
  float v[N];
};

// `count` elements from `from` on; NaN where there is no row. kAligned: a whole vector, in accesses of up to 16 bytes.
template <bool kAligned, class T, int N>
__device__ __forceinline__ Vec<N> load(const T* from, int64_t at, int count) {
  Vec<N> to;
  if (from == nullptr) {
#pragma unroll
    for (int i = 0; i < N; i++) to.v[i] = bits_as<float>(0x7FC00000u);
    return to;
  }
  Raw<T, N> raw;
  if constexpr (kAligned) {
    raw = load_whole<T, N>(from + at);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) raw.v[i] = from[at + (i < count ? i : 0)];
  }
#pragma unroll
  for (int i = 0; i < N; i++) to.v[i] = widen(raw.v[i]);
  return to;
}

template <bool kAligned, class T, int N>
__device__ __forceinline__ void store(const Vec<N>& value, T* to, int64_t at, int count) {
  Raw<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; i++) narrow(value.v[i], raw.v[i]);
  if constexpr (kAligned) {
    store_whole<T, N>(raw, to + at);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (i < count) to[at + i] = raw.v[i];
    }
  }
}

// A sum in registers.
template <int N>
struct VecSum {
  Vec<N> total;

  __device__ __forceinline__ VecSum() : total{} {}
  __device__ __forceinline__ void term(float k, const Vec<N>& value) {
#pragma unroll
    for (int i = 0; i < N; i++) total.v[i] = add(total.v[i], mul(k, value.v[i]));
  }
  __device__ __forceinline__ Vec<N> value() const { return total; }
};

// Classifier-free guidance.
template <int N>
__device__ __forceinline__ Vec<N> guide(const Vec<N>& cond, const Vec<N>& uncond, float guidance) {
  Vec<N> y;
#pragma unroll
  for (int i = 0; i < N; i++) y.v[i] = add(mul(guidance, sub(cond.v[i], uncond.v[i])), uncond.v[i]);
  return y;
}

// The row that output row r reads, or null: not given, or an index out of range.
template <class T>
__device__ __forceinline__ const T* row_of(const RowsIn& rows, int64_t r) {
  if (rows.data == nullptr) return nullptr;
  const int64_t row = rows.index ? rows.index[r] : r;
  if (row < 0 || row >= rows.rows) return nullptr;
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// Places indptr[row] ... indptr[row + 1] - 1 of a list, cut to the `count` there are.
struct Segment {
  int64_t first, last;
  bool cut;

  __device__ __forceinline__ Segment(const int32_t* indptr, int64_t row, int64_t count)
      : first(indptr[row]), last(indptr[row + 1]), cut(first < 0 || last > count) {
    if (first < 0) first = 0;
    if (last > count) last = count;
  }
};

// A row of the table; NaN throughout if the step is out of range.
__device__ __forceinline__ Row table_row(const Row* table, int64_t rows, int32_t step) {
  union {
    float4 quarter[4];
    Row row;
  } k;
  if (step < 0 || step >= rows) {
    const float nan = bits_as<float>(0x7FC00000u);
    for (float4& q : k.quarter) q = make_float4(nan, nan, nan, nan);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) k.quarter[i] = __ldg(reinterpret_cast<const float4*>(table + step) + i);
  }
  return k.row;
}

// The normals of elements at .. at + N - 1 in the row of a seed; at is a multiple of 4.
template <int N>
__device__ __forceinline__ Vec<N> draw(uint64_t seed, uint32_t call, uint32_t tag, int64_t at) {
  static_assert(N % 4 == 0, "four normals come from one counter");
  Vec<N> out;
#pragma unroll
  for (int quad = 0; quad < N / 4; quad++) {
    const uint64_t j = static_cast<uint64_t>(at / 4) + quad;
    const Words<uint32_t> w = words_of(seed, static_cast<uint32_t>(j), static_cast<uint32_t>(j >> 32), call, tag);
    box_muller(w.w[0], w.w[1], out.v[4 * quad], out.v[4 * quad + 1]);
    box_muller(w.w[2], w.w[3], out.v[4 * quad + 2], out.v[4 * quad + 3]);
  }
  return out;
}

// Whether vectors of N elements can be read and written whole.
template <int N>
bool aligned(const void* data, int64_t stride, int64_t bytes) {
  const int64_t vector = bytes * N < 16 ? bytes * N : 16;
  return reinterpret_cast<uintptr_t>(data) % vector == 0 && stride % N == 0;
}
template <int N>
bool aligned(const RowsIn& rows, int64_t bytes) {
  return rows.data == nullptr || aligned<N>(rows.data, rows.stride, bytes);
}

// Calls run(M{}, S{}) with the model's and the state's types.
template <class Run>
int with_types(DType model, DType state, const Run& run) {
  const bool wide = state == DType::kFloat32;
  if (model == DType::kFloat32) return run(float{}, float{});
  if (model == DType::kBFloat16) return wide ? run(__nv_bfloat16{}, float{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
  return wide ? run(__half{}, float{}) : run(__half{}, __half{});
}

}  // namespace
}  // namespace device
}  // namespace sage
