// The op group_mean: argument checks, plain arguments, launch.
#include "launch.h"
#include "ops.h"

namespace sage {
namespace {

constexpr const char* kMean = "group_mean";

DType rows_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? DType::kFloat64 : dtype_of(kMean, "rows", rows);
}

DType mask_type(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: return dtype_of(kMean, "mask", mask);
  }
}

void check_values(const GroupMean& args) {
  bool ascending = args.indptr[0] == 0 && args.indptr[args.rows] == args.member_count;
  for (int64_t i = 0; i < args.rows; i++) ascending = ascending && args.indptr[i] < args.indptr[i + 1];
  if (!ascending) refuse(kMean, ": indptr must ascend from 0 to the number of members, without empty groups; check the groups");
}

}  // namespace

void group_mean(Tensor rows, Tensor indptr, Tensor members, MaybeTensor mask, Tensor out, MaybeTensor united) {
  const Checks check(kMean, rows);
  SAGE_WANT(rows.dim() > 0, kMean, "rows", "[B, *shape]", rows, "add a row dimension");
  SAGE_WANT(indptr.dim() == 1 && indptr.size(0) > 0, kMean, "indptr", "[R + 1]", indptr, "no groups are [0]");
  if (mask.has_value() != united.has_value()) refuse(kMean, ": mask and union belong together; pass both, or neither");
  GroupMean args{};
  args.rows = indptr.size(0) - 1;
  args.elements = elements_of(rows);
  args.type = rows_type(rows);
  args.in = check.rows("rows", rows, rows.scalar_type(), rows, nullptr);
  args.indptr = check.vector<int32_t>("indptr", indptr, ScalarType::Int, args.rows + 1);
  args.members = check.index("members", members, -1, rows.size(0));
  args.member_count = members.size(0);
  if (check.on_cpu()) check_values(args);
  args.out = check.output("out", out, rows.scalar_type(), rows, args.rows);
  if (mask) {
    SAGE_WANT(mask->dim() > 0, kMean, "mask", "[B, *mask_shape]", *mask, "add a row dimension");
    args.mask_elements = elements_of(*mask);
    args.mask_type = mask_type(*mask);
    args.mask = check.rows("mask", *mask, mask->scalar_type(), *mask, nullptr);
    check.count("mask", *mask, rows.size(0));
    args.united = check.output("union", *united, mask->scalar_type(), *mask, args.rows);
  }

#ifdef SAGE_CUDA
  if (!check.on_cpu()) return launch(check, group_mean_cuda, args);
#endif
  over_chunks(args.rows, args.elements, kSerialHeavyChunks,
              [&](int64_t row, int64_t begin, int64_t end) { group_mean_cpu(args, row, begin, end); });
  if (mask) {
    for (int64_t row = 0; row < args.rows; row++) group_union_cpu(args, row);
  }
}

}  // namespace sage
