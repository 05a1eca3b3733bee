// What the argument checks hand to a kernel: plain pointers and sizes, no torch. Included by the host and by every kernel.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

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

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kUInt8, kInt32, kInt64 };

inline int64_t size_of(DType type) {
  switch (type) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kUInt8: return 1;
    default: return 2;
  }
}

// Rows of one input. Output row r reads row index[r], or row r without an index.
struct RowsIn {
  const void* data = nullptr;      // null: not given
  int64_t stride = 0;              // between rows [elements]
  int64_t rows = 0;                // a device reads NaN for a row outside [0, rows)
  const int32_t* index = nullptr;  // [R_out]
};

struct BranchStep {
  RowsIn sample, last, m[3];    // state dtype
  RowsIn model_output, uncond;  // model dtype
  RowsIn noise;                 // float32
  const Row* table;             // [table_rows]
  int64_t table_rows;
  const int32_t* step;      // [R_out]
  const float* guidance;    // [R_out], null without uncond
  const int64_t* seed;      // [R_out], null without seeded noise
  const int32_t* call;      // [R_out]
  void* next;               // [R_out, elements], state dtype, dense
  void *denoised, *corrected;  // the same, or null
  void* model_input;        // [copies * R_out, elements], model dtype, dense
  int32_t copies;           // 0, 1 or 2
  int64_t rows, elements;   // R_out, D
  DType state, model;
};

// Gradients of input rows; the output rows that read input row i are children[indptr[i]] ... children[indptr[i + 1] - 1].
struct BranchStepBackward {
  const void *g_sample, *g_denoised, *g_corrected;  // [rows_out, elements], state dtype, dense, or null
  const void* g_model_input;                        // [copies * rows_out, elements], model dtype, dense, or null
  int32_t copies;
  RowsIn sample, model_output, uncond;  // through `parent`, for the clamp
  const Row* table;
  int64_t table_rows;
  const int32_t* step;              // [rows_out]
  const float* guidance;            // [rows_out], null without uncond
  const int32_t *indptr, *children;  // [rows + 1], [rows_out]
  void *d_sample, *d_last, *d_m[3];  // [rows, elements], state dtype, dense, or null
  void *d_model_output, *d_uncond;   // the same, model dtype
  int64_t rows, rows_out, elements;
  DType state, model;
};

struct Normals {
  const int64_t* seed;  // [rows]
  const int32_t* call;  // [rows]
  uint32_t tag;
  float* out;  // [rows, elements]
  int64_t rows, elements;
};

// The members of group i are members[indptr[i]] ... members[indptr[i + 1] - 1].
struct GroupMean {
  RowsIn in;    // [B, elements]
  RowsIn mask;  // [B, mask_elements], or not given
  const int32_t *indptr, *members;  // [rows + 1], [member_count]
  int64_t member_count;
  void* out;    // [rows, elements], dense
  void* united;  // [rows, mask_elements], dense, or null
  int64_t rows, elements, mask_elements;
  DType type, mask_type;
};

// Elements [begin, end) of one row; begin is a multiple of kChunk.
constexpr int64_t kChunk = 4096;
void branch_step_cpu(const BranchStep& args, int64_t row, int64_t begin, int64_t end);
void branch_step_backward_cpu(const BranchStepBackward& args, int64_t row, int64_t begin, int64_t end);
void normals_cpu(const Normals& args, int64_t row, int64_t begin, int64_t end);
void group_mean_cpu(const GroupMean& args, int64_t row, int64_t begin, int64_t end);  // of the means
void group_union_cpu(const GroupMean& args, int64_t row);                             // the whole mask

// 0 baseline, 1 AVX2, 2 AVX-512. `force` selects one, 3 the best one, -1 leaves the choice; returns the choice, or -1 if
// this processor (or this build) cannot run the one asked for.
int cpu_isa(int force);

// One launch on a stream (a cudaStream_t) of the current device. Returns a cudaError_t, 0 for success; cuda_error names it.
int branch_step_cuda(const BranchStep& args, void* stream);
int branch_step_backward_cuda(const BranchStepBackward& args, void* stream);
int normals_cuda(const Normals& args, void* stream);
int group_mean_cuda(const GroupMean& args, void* stream);
const char* cuda_error(int code);

}  // namespace sage
