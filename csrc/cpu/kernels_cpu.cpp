// The CPU kernels, once per instruction set, and the choice between them when the first call is made. No torch here.
#include "../kernels.h"

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define SAGE_X86_COPIES 1
#endif

namespace sage {

#ifdef SAGE_X86_COPIES
#define SAGE_LANES 2
#define SAGE_VECTOR __m128i
#define SAGE_MULTIPLY_EVEN _mm_mul_epu32
#endif
namespace baseline {
#include "all_rows.h"
}  // namespace baseline

#ifdef SAGE_X86_COPIES
#define SAGE_F16C 1
#pragma GCC push_options
#pragma GCC target("avx2,bmi2,f16c")
#define SAGE_BYTES 32
#define SAGE_LANES 4
#define SAGE_VECTOR __m256i
#define SAGE_MULTIPLY_EVEN _mm256_mul_epu32
namespace avx2 {
#include "all_rows.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi2,f16c,prefer-vector-width=512")
#define SAGE_BYTES 64
#define SAGE_LANES 8
#define SAGE_VECTOR __m512i
#define SAGE_MULTIPLY_EVEN _mm512_mul_epu32
namespace avx512 {
#include "all_rows.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

struct Kernels {
  void (*branch_step)(const BranchStep&, int64_t, int64_t, int64_t);
  void (*branch_step_backward)(const BranchStepBackward&, int64_t, int64_t, int64_t);
  void (*normals)(const Normals&, int64_t, int64_t, int64_t);
  void (*group_mean)(const GroupMean&, int64_t, int64_t, int64_t);
  void (*group_union)(const GroupMean&, int64_t);
};

#define SAGE_KERNELS(isa) {isa::branch_step, isa::branch_step_backward, isa::normals, isa::group_mean, isa::group_union}
constexpr Kernels kKernels[] = {
    SAGE_KERNELS(baseline),
#ifdef SAGE_X86_COPIES
    SAGE_KERNELS(avx2),
    SAGE_KERNELS(avx512),
#endif
};

bool runs_here(int isa) {
#ifdef SAGE_X86_COPIES
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (isa == 1) return avx2;
  if (isa == 2) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == 0;
}

int best() { return runs_here(2) ? 2 : runs_here(1) ? 1 : 0; }

std::atomic<int>& chosen() {
  static std::atomic<int> isa{best()};
  return isa;
}

const Kernels& kernels() { return kKernels[chosen().load(std::memory_order_relaxed)]; }

}  // namespace

int cpu_isa(int force) {
  if (force == 3) force = best();
  if (force >= 0) {
    if (!runs_here(force)) return -1;
    chosen().store(force);
  }
  return chosen().load();
}

void branch_step_cpu(const BranchStep& args, int64_t row, int64_t begin, int64_t end) {
  kernels().branch_step(args, row, begin, end);
}

void branch_step_backward_cpu(const BranchStepBackward& args, int64_t row, int64_t begin, int64_t end) {
  kernels().branch_step_backward(args, row, begin, end);
}

void group_mean_cpu(const GroupMean& args, int64_t row, int64_t begin, int64_t end) {
  kernels().group_mean(args, row, begin, end);
}

void group_union_cpu(const GroupMean& args, int64_t row) { kernels().group_union(args, row); }

void normals_cpu(const Normals& args, int64_t row, int64_t begin, int64_t end) {
  kernels().normals(args, row, begin, end);
}

}  // namespace sage
