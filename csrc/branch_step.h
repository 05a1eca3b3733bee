// What the argument checks hand to a kernel: plain pointers and sizes, no torch. Included by the host and by every kernel.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAGE_INLINE __device__ __forceinline__
#else
#define SAGE_INLINE inline __attribute__((always_inline))
#endif

namespace sage {

// One row of the coefficient table: sage_kernels.coefficients.COLUMNS, in that order.
struct Row {
  float p, q;
  float u[6];
  float a, b[3];
  float e, c;
  float s, clip;
};
static_assert(sizeof(Row) == 64, "a table row is 16 floats");

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Rows of one input. Output row r reads row index[r], or row r without an index.
struct RowsIn {
  const void* data = nullptr;      // null: not given
  int64_t stride = 0;              // between rows [elements]
  const int32_t* index = nullptr;  // [R_out]
};

struct BranchStep {
  RowsIn sample, last, m[3];       // state dtype
  RowsIn model_output, uncond;     // model dtype
  RowsIn noise;                    // float32
  const Row* table;                // [table rows]
  const int32_t* step;             // [R_out]
  const float* guidance;           // [R_out], null without uncond
  const int64_t* seed;             // [R_out], null without seeded noise
  const int32_t* call;             // [R_out]
  void *next, *denoised;           // [R_out, elements], state dtype, dense
  void* corrected;                 // the same, or null
  void* model_input;               // [copies * R_out, elements], model dtype, dense
  int32_t copies;                  // 0, 1 or 2
  int64_t rows, elements;          // R_out, D
  DType state, model;
};

struct Normals {
  const int64_t* seed;  // [rows]
  const int32_t* call;  // [rows]
  uint32_t tag;
  float* out;  // [rows, elements]
  int64_t rows, elements;
};

// Elements [begin, end) of one output row; begin is a multiple of kChunk.
constexpr int64_t kChunk = 4096;
void branch_step_cpu(const BranchStep& args, int64_t row, int64_t begin, int64_t end);
void normals_cpu(const Normals& args, int64_t row, int64_t begin, int64_t end);

// 0 baseline, 1 AVX2, 2 AVX-512. `force` selects one, 3 the best one, -1 leaves the choice; returns the choice, or -1 if
// this processor (or this build) cannot run the one asked for.
int cpu_isa(int force);

}  // namespace sage
